"""ONNX Runtime: sessions of a model in a package. Importing raises UsageError EXTRA_MISSING, EXTRA_UNSUPPORTED.

A session's weights are its own: it lives on when the model is closed. Those in members of their own (external data) are
not copied, and wiped when session and options are gone.
"""

from __future__ import annotations

import os
import posixpath
import re
import weakref
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hwlicense.core.errors import DamagedError, HwlicenseError, Reason, UsageError, out_of_memory
from hwlicense.device.memory import SealedFile, no_memory
from hwlicense.integrations.external_data import locations
from hwlicense.integrations.extras import check_model, extra, require

with extra("onnxruntime", "onnxruntime"):
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hwlicense.device.model import Model

require("onnxruntime", "onnxruntime", onnxruntime.__version__, "1.20")

WRITING: Final = (
    "session.optimized_model_external_initializers_file_name",
    "session.enable_saved_runtime_optimizations",
    "session.collect_node_memory_stats_to_file",
    "session.debug_layout_transformation",
    "session.node_partition_config_file",
    "session.moe_expert_counter_state_file",
    "session.moe.offload.derived_cache_dir",
    "session.moe.offload.popularity_file",
    "ep.context_enable",
    "ep.context_file_path",
    "ep.context_model_external_initializers_file_name",
)
"""Entries of session options that have ONNX Runtime write files."""
_WRITING = re.compile("cache|dump|save|ep_(context|ctx)|profiling", re.IGNORECASE)  # among names of providers' options
_LOADING = re.compile(r"Load model from \S+ failed: ?|ORT model verification|Deserialize tensor|External initializer")
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?")
_SHORT = re.compile(  # of memory, threads, descriptors
    r"bad_alloc|failed to allocate|cannot allocate memory|pthread_create|system error number (\d+)", re.IGNORECASE
)
_REFUSED: Final = (runtime.Fail, runtime.InvalidGraph, runtime.InvalidProtobuf, runtime.NotImplemented)
_FORMAT: Final = "session.load_model_format"
_OWN: Final = b"ORTM"  # the identifier of the runtime's own format, after four bytes
_OFF: Final = {"", "0", "false", "none", "off"}

_used: weakref.WeakKeyDictionary[Any, list[memoryview]] = weakref.WeakKeyDictionary()
"""Options point to the buffers that they were given, and hold none."""


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # it has no types
    """An InferenceSession that cannot be made anew from a file, as there is none."""

    def __init__(self, path: str, buffers: list[memoryview], *options: Any) -> None:  # noqa: ANN401
        """`buffers` are what the weights lie in; `options` are the runtime's, its providers and their options."""
        self._buffers = buffers
        super().__init__(path, *options, enable_fallback=0, read_config_from_model=0)

    def set_providers(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Raises UsageError."""
        what = "The session would be made anew from a file, and a licensed model has none."
        raise UsageError(Reason.USAGE, what, "Give providers=... when the session is made.")

    def enable_fallback(self) -> NoReturn:
        """Raises UsageError, for the same reason."""
        self.set_providers()


def session(
    model: Model,
    name: str | os.PathLike[str],
    *,
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
) -> Session:
    """An InferenceSession of the member `name`, in ONNX or ORT format, which its first bytes tell.

    Members that hold its weights are found by the locations that it names, relative to it, and are read whole. Session
    options serve one such model. Raises as `Model.read`, DamagedError MEMBER_MALFORMED for what the runtime cannot
    load, StorageError where it has too little memory, and UsageError PLAINTEXT_CACHE where options would write what is
    in the model to a file.
    """
    check_model(model)
    name = os.fspath(name)
    options = sess_options or onnxruntime.SessionOptions()
    providers = ["CPUExecutionProvider"] if providers is None else providers
    further = [dict(each) for each in provider_options or ()]
    _refuse_caches(options, [*providers, *zip(map(str, providers), further, strict=False)])
    options.add_session_config_entry(_FORMAT, "ONNX")  # they may have served a file of the other before
    apart: list[str] = []

    def fill(view: memoryview) -> None:
        model.readinto(name, view)
        if bytes(view[4:8]) == _OWN:
            options.add_session_config_entry(_FORMAT, "ORT")
        apart.extend(locations(view))

    staged = SealedFile(model.size(name), fill)
    try:
        buffers = _lend(model, name, apart, options) if apart else []
        return Session(staged.path, buffers, options, list(providers), further or None)
    except HwlicenseError:
        raise
    except Exception as error:
        others = any(each not in ("CPUExecutionProvider", ("CPUExecutionProvider", {})) for each in providers)
        if meant := _meaning(error, name, staged.size, others=others):
            raise meant from error
        raise
    finally:
        staged.close()


def _meaning(error: Exception, name: str, size: int, *, others: bool) -> HwlicenseError | None:
    """What a session's failure says of the member, or of the system; None where it says neither.

    `others`: the session has other providers than the CPU's, which fail for reasons, and in memory, of their own.
    """
    said = str(error)
    short = _SHORT.search(said)
    if short and short[1]:
        return no_memory(size, OSError(int(short[1]), os.strerror(int(short[1]))))
    if isinstance(error, MemoryError) or (short and not others):
        return out_of_memory()
    if not _LOADING.search(said) and (others or not isinstance(error, _REFUSED)):
        return None
    what = f"ONNX Runtime cannot load the member {name!r}: {_PREFIX.sub('', said).rstrip('.')}."
    hint = "Ask the vendor for a package with a sound one, or for the version of ONNX Runtime that it was made for."
    return DamagedError(Reason.MEMBER_MALFORMED, what, hint)


def _refuse_caches(
    options: onnxruntime.SessionOptions, providers: Sequence[str | tuple[str, Mapping[str, Any]]]
) -> None:
    asked = [key for key in ("optimized_model_filepath", "enable_profiling") if getattr(options, key)]
    for key in WRITING:
        try:
            value = options.get_session_config_entry(key)
        except RuntimeError:  # not given
            continue
        if value.lower() not in _OFF:
            asked.append(key)
    for provider in providers:
        if not isinstance(provider, str):
            on = [key for key, value in provider[1].items() if str(value).lower() not in _OFF]
            asked += [f"{provider[0]} {key}" for key in on if _WRITING.search(key)]
    if asked:
        what = f"ONNX Runtime would write what is in the licensed model to files ({', '.join(asked)})."
        raise UsageError(Reason.PLAINTEXT_CACHE, what, "Leave these options out.")


def _lend(model: Model, name: str, apart: list[str], options: Any) -> list[memoryview]:  # noqa: ANN401
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        require("onnxruntime", "onnxruntime", onnxruntime.__version__, "1.24")
    if options in _used:
        what = "These session options hold the weights of another session, or of one that could not be made."
        raise UsageError(Reason.USAGE, what, "Make new ones for each session of a model with external data.")
    buffers = [model.read(_beside(model, name, location)) for location in apart]
    _used[options] = buffers
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    options.add_external_initializers_from_files_in_memory(apart, buffers, [len(one) for one in buffers])
    return buffers


def _beside(model: Model, name: str, location: str) -> str:
    member = posixpath.normpath(posixpath.join(posixpath.dirname(name), location))
    if member not in model.names:
        what = f"{name!r} has weights in {location!r}, and the package {model.name!r} has no member {member!r}."
        raise UsageError(
            Reason.MEMBER_ABSENT, what, "Ask the vendor for a package that has them where the network says."
        )
    return member
