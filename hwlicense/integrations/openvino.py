"""OpenVINO: networks of a model in a package. Importing raises UsageError EXTRA_MISSING, EXTRA_UNSUPPORTED.

Weights beside an .xml are decrypted into memory that OpenVINO itself allots and shares out between network and compiled
network; those of a network in one file it copies out of sealed memory, which is given back at once. They live as long
as it uses them, whatever is closed, and are not zeroed when it frees them.
"""

from __future__ import annotations

import os
import posixpath
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from hwlicense.core.errors import Reason, UsageError
from hwlicense.device.memory import SealedFile
from hwlicense.integrations.external_data import locations
from hwlicense.integrations.extras import check_model, extra, require

with extra("openvino", "openvino"):
    import openvino

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwlicense.device.model import Model

require("openvino", "openvino", openvino.__version__.partition("-")[0], "2024.6")

CACHE = "CACHE_DIR"
STANDING_FOR_OTHERS: Final = ("AUTO", "MULTI", "HETERO", "BATCH")
TRACING: Final = ("OV_ENABLE_SERIALIZE_TRACING", "OV_ENABLE_VISUALIZE_TRACING", "OPENVINO_HETERO_VISUALIZE")
"""What in the environment has OpenVINO write the network into the working folder, the first with its weights."""


def read_model(
    model: Model, name: str | os.PathLike[str], *, weights: str | None = None, core: openvino.Core | None = None
) -> openvino.Model:
    """The network in the member `name`: OpenVINO's own format (.xml) or another that it knows by content, as ONNX.

    `weights` are by default in the member beside it that ends with .bin, if there is one. Raises as `Model.read`, and
    UsageError: EXTRA_UNSUPPORTED for ONNX with weights in files of their own, PLAINTEXT_CACHE where the core has a
    folder for a cache, be it of one device, or the environment asks for files.
    """
    check_model(model)
    name = posixpath.normpath(os.fspath(name))
    _refuse_writing(core, {})
    core = core or openvino.Core()
    beside = str(PurePosixPath(name).with_suffix(".bin"))
    if weights is None and name.endswith(".xml") and beside in model.names:
        weights = beside
    if weights is None:
        return _read_one_file(model, name, core)
    network = bytes(model.read(name))
    _refuse_files(name, _apart(memoryview(network)))
    allotted = openvino.Tensor(openvino.Type.u8, [model.size(weights)])
    model.readinto(weights, allotted.data)
    return core.read_model(network, allotted)


def compile_model(
    model: Model,
    name: str | os.PathLike[str],
    device_name: str = "CPU",
    config: Mapping[str, Any] | None = None,
    *,
    weights: str | None = None,
    core: openvino.Core | None = None,
) -> openvino.CompiledModel:
    """The same, compiled. UsageError PLAINTEXT_CACHE too where `config` names a folder for the cache."""
    given = dict(config or {})
    _refuse_writing(core, given)
    network = read_model(model, name, weights=weights, core=core)
    # Said in the call, this wins over whatever `core` did not tell of
    return (core or openvino.Core()).compile_model(network, device_name, given | {CACHE: ""})


def _read_one_file(model: Model, name: str, core: openvino.Core) -> openvino.Model:
    apart: list[str] = []

    def fill(view: memoryview) -> None:
        model.readinto(name, view)
        apart.extend(_apart(view))

    staged = SealedFile(model.size(name), fill)
    try:
        _refuse_files(name, apart)
        return core.read_model(staged.path)
    finally:
        staged.close()


def _apart(network: memoryview) -> list[str]:
    """Where ONNX has external data; what is XML has none."""
    return [] if network[:1].tobytes() == b"<" else locations(network)


def _refuse_files(name: str, apart: list[str]) -> None:
    """OpenVINO would read them from the disk, below the working folder."""
    if apart:
        what = f"{name!r} has its weights in {apart[0]!r}, which OpenVINO reads from a disk alone."
        hint = "Pack it with its weights in one file or as .xml (`openvino.save_model`), or load it with ONNX Runtime."
        raise UsageError(Reason.EXTRA_UNSUPPORTED, what, hint)


def _refuse_writing(core: openvino.Core | None, config: Mapping[Any, Any]) -> None:
    """OpenVINO's own encryption of its cache covers how the network is built, and no weights."""
    if traced := [name for name in TRACING if os.environ.get(name, "").lower() not in {"", "0", "false", "off"}]:
        what = f"OpenVINO would write the licensed model to files ({', '.join(traced)} in the environment)."
        raise UsageError(Reason.PLAINTEXT_CACHE, what, "Start the application without it.")
    if _asked(config) or (core is not None and _set(core)):
        what = f"OpenVINO would keep the licensed model's weights in files ({CACHE})."
        raise UsageError(Reason.PLAINTEXT_CACHE, what, "Leave it out; OpenVINO's encryption does not cover weights.")


def _asked(config: Mapping[Any, Any]) -> bool:
    """In the properties of single devices too, which may be mappings, or text in a form of OpenVINO's own."""
    for key, given in config.items():
        value = given.value if isinstance(given, openvino.OVAny) else given
        if hasattr(value, "items"):
            if _asked(value):
                return True
        elif value and (str(key) == CACHE or CACHE in str(value)):
            return True
    return False


def _set(core: openvino.Core) -> bool:
    """For all devices or for one, be it one that stands for others: AUTO:CPU uses what is set for CPU."""
    if core.get_property(CACHE):
        return True
    for device in (*core.available_devices, *STANDING_FOR_OTHERS):
        with suppress(RuntimeError):  # a device that knows no such property, or is not installed
            if core.get_property(device, CACHE):
                return True
    return False
