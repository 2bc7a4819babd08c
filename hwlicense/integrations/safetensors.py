"""safetensors: tensors of a member for NumPy and torch. Importing raises UsageError EXTRA_MISSING, EXTRA_UNSUPPORTED.

The library's own parser checks the header: sizes, offsets without overlaps or holes, at most 100 MB of it. Tensors live
on when the model is closed, and are zeroed when nobody holds them.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Final, Self

from hwlicense.core.errors import ClosedError, DamagedError, Reason, UsageError, memory_needed
from hwlicense.device.memory import Memory, lend, memory_file, no_memory
from hwlicense.integrations.extras import check_model, extra, require

with extra("safetensors", "safetensors"):
    import safetensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwlicense.device.model import Model

require("safetensors", "safetensors", safetensors.__version__, "0.6")

TORCH: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""The format's types by torch's names. NumPy names its own alike, and ml_dtypes the others."""
MOST: Final = 100_000_000
"""Bytes of a header: the library's own limit."""
AXES: Final = 32
"""The most that every NumPy takes; since 2.0 it takes 64. The format itself has no limit."""
_MOST_ELEMENTS: Final = (1 << 63) // 16 - 1
"""By axes that are not empty: NumPy multiplies them even where another is, and an element has 16 bytes at the most."""
_OWN: Final = {name for name in TORCH.values() if not name.startswith(("bfloat", "float8"))}


class Tensors:
    """A member in safetensors format, as safetensors' `safe_open` gives a file: one tensor costs what it is long.

    Only the package's chunks that a tensor lies in are read and decrypted. Threads may share it. A context manager.
    """

    def __init__(self, model: Model, name: str | os.PathLike[str], framework: str = "np") -> None:
        """`framework` is np or pt. Raises as `Model.open`, and DamagedError MEMBER_MALFORMED, UsageError."""
        check_model(model)
        self.name = os.fspath(name)
        self._array, self._type = _numpy() if framework in {"np", "numpy"} else _torch(framework)
        self._file, self._ended = model.open(name), False
        try:
            with memory_needed():
                self._places, self._metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def keys(self) -> list[str]:
        """The names of the tensors, in the order in which they are stored."""
        return list(self._places)

    offset_keys = keys

    def metadata(self) -> dict[str, str] | None:
        """What the member says of itself."""
        return self._metadata

    def get_tensor(self, name: str) -> Any:  # noqa: ANN401  # an array or a tensor
        """The tensor, in memory of its own. Raises UsageError TENSOR_ABSENT, and as `Model.read`."""
        kind, shape, offset = self._place(name)
        return self._read(kind, shape, offset)

    def get_tensors(self) -> dict[str, Any]:
        """All by their names, each in memory of its own; `load` has them over one buffer. Raises as above."""
        return {name: self.get_tensor(name) for name in self._places}

    def get_slice(self, name: str) -> Slice:
        """The tensor, to be indexed: only the rows (of the first axis) that are asked for are read. Raises as above."""
        kind, shape, offset = self._place(name)
        return Slice(name, kind, shape, lambda rows, start: self._read(kind, rows, offset + start))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended = True
        self._file.close()

    def _place(self, name: str) -> tuple[str, tuple[int, ...], int]:
        try:
            return self._places[name]
        except KeyError:
            what = f"{self.name!r} has no tensor {name!r}."
            raise UsageError(Reason.TENSOR_ABSENT, what, "`keys()` lists the tensors.") from None

    def _read(self, kind: str, shape: tuple[int, ...], offset: int) -> Any:  # noqa: ANN401  # as get_tensor
        dtype, size = self._type(kind), math.prod(shape) * _bits(kind) // 8
        if not size:
            return self._array(bytearray(), dtype, shape)
        if self._ended:
            what = f"The tensors of {self.name!r} were closed, as their block ended."
            raise ClosedError(Reason.MODEL_CLOSED, what, "Read within the `with` block, or make new ones.")
        memory = Memory(size)
        self._file.readinto_at(memory.view, offset)
        return self._array(lend(memory), dtype, shape)

    def _header(self) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str] | None]:
        """Where each tensor lies, by the library's parser.

        It wants a file: one in memory that has the header, and as many bytes that are never read as tensors follow.
        """
        start = self._file.read(8)
        size = min(int.from_bytes(start, "little"), MOST)  # a longer one is refused below
        fd = -1
        try:
            fd = memory_file()
            os.close(os.dup(fd))  # the parser opens it anew, and calls it not found where no descriptor is left
            os.truncate(fd, self._file.size)
            os.pwrite(fd, start + self._file.read(size), 0)
            with safetensors.safe_open(f"/proc/self/fd/{fd}", "np") as parsed:
                places, offset = {}, 8 + size
                for name in parsed.offset_keys():
                    found = parsed.get_slice(name)
                    shape = tuple(found.get_shape())
                    if len(shape) > AXES or math.prod(filter(None, shape)) > _MOST_ELEMENTS:
                        raise self._malformed(f"the shape of {name!r} is none that an array may have")
                    places[name] = found.get_dtype(), shape, offset
                    offset += math.prod(shape) * _bits(found.get_dtype()) // 8
                return places, parsed.metadata()
        except safetensors.SafetensorError as error:
            raise self._malformed(str(error)) from error
        except OSError as error:
            raise no_memory(self._file.size, error) from error
        finally:
            if fd >= 0:
                os.close(fd)

    def _malformed(self, why: str) -> DamagedError:
        what = f"The member {self.name!r} is no safetensors file: {why}."
        return DamagedError(Reason.MEMBER_MALFORMED, what, "Ask the vendor for a package with a sound one.")


class Slice:
    """A tensor that is read as it is indexed."""

    def __init__(
        self, name: str, kind: str, shape: tuple[int, ...], read: Callable[[tuple[int, ...], int], Any]
    ) -> None:
        """`read` gives a tensor of that shape from that offset in bytes."""
        self._name, self._kind, self._shape, self._rows = name, kind, shape, read

    def get_shape(self) -> list[int]:
        """The length of each axis."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The type, by the format's name."""
        return self._kind

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401  # what NumPy and torch take
        """As of a whole tensor. Integers and slices of the first axis are read alone; others need all of it."""
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        within: int | slice
        if isinstance(first, int) and self._shape:
            if not -self._shape[0] <= first < self._shape[0]:
                raise IndexError(
                    f"index {first} is out of bounds for {self._name!r}, whose first axis is {self._shape[0]}"
                )
            start = range(self._shape[0])[first]
            stop, within = start + 1, 0
        elif isinstance(first, slice) and self._shape and (first.step is None or first.step > 0):
            start, stop, step = first.indices(self._shape[0])
            stop, within = max(start, stop), slice(None, None, step)
        else:
            return self._rows(self._shape, 0)[index]
        row = math.prod(self._shape[1:]) * _bits(self._kind) // 8
        return self._rows((stop - start, *self._shape[1:]), start * row)[(within, *rest)]


def load(model: Model, name: str | os.PathLike[str], framework: str = "np") -> dict[str, Any]:
    """All tensors of a member over one buffer, which is decrypted by several threads.

    NumPy's arrays are read-only, over the buffer that `model.read` lends to all; torch's may be written to, and share a
    buffer of their own. Raises as `Tensors`.
    """
    with Tensors(model, name, framework) as tensors:
        if framework in {"np", "numpy"}:
            buffer: Any = model.read(name)
        else:
            memory = Memory(max(1, model.size(name)))
            model.readinto(name, memory.view[: model.size(name)])
            buffer = memoryview(lend(memory)).cast("B")
        found = {}
        for key, (kind, shape, offset) in tensors._places.items():  # noqa: SLF001  # of this module
            size = math.prod(shape) * _bits(kind) // 8
            found[key] = tensors._array(buffer[offset : offset + size], tensors._type(kind), shape)  # noqa: SLF001
        return found


def _bits(kind: str) -> int:
    return int("".join(filter(str.isdigit, kind.partition("_")[0])) or 8)


def _named(kind: str) -> str:
    if kind not in TORCH:  # those of less than a byte
        what = f"Tensors of the type {kind} are not read here."
        raise UsageError(
            Reason.EXTRA_UNSUPPORTED, what, "Store them as bytes (U8), and unpack them in the application."
        )
    return TORCH[kind]


def _numpy() -> tuple[Callable[..., Any], Callable[[str], Any]]:
    with extra("safetensors", "numpy"):
        import numpy  # noqa: PLC0415  # torch's users need not have it

    def dtype(kind: str) -> Any:  # noqa: ANN401
        name = _named(kind)
        if name in _OWN:
            return numpy.dtype(name)
        with extra("safetensors", "ml_dtypes"):
            import ml_dtypes  # noqa: PLC0415  # few models have such types
        return numpy.dtype(getattr(ml_dtypes, name))

    def array(buffer: Any, kind: Any, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        return numpy.frombuffer(buffer, kind).reshape(shape)

    return array, dtype


def _torch(framework: str) -> tuple[Callable[..., Any], Callable[[str], Any]]:
    if framework not in {"pt", "torch", "pytorch"}:
        what = f"{framework!r} is no framework that tensors are made for."
        raise UsageError(Reason.USAGE, what, "Give np (NumPy) or pt (torch).")
    with extra("torch", "torch"):
        import torch  # noqa: PLC0415  # NumPy's users need not have it

    def dtype(kind: str) -> Any:  # noqa: ANN401
        name = _named(kind)
        if not hasattr(torch, name):
            require("torch", "torch", torch.__version__, "2.7")
        return getattr(torch, name)

    def array(buffer: Any, kind: Any, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        if not len(buffer):
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(buffer, dtype=kind).reshape(shape)

    return array, dtype
