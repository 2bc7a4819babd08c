"""Inferences spent by the call that makes them, as many as its batch is long."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from operator import index
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from hwlicense.core.errors import Reason, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hwlicense.device.model import Model

P = ParamSpec("P")
R = TypeVar("R")


def metered(call: Callable[P, R], model: Model, size: Callable[P, int] | None = None) -> Callable[P, R]:
    """`call` (a session's `run`, a network, its `generate`), which spends the license's inferences before it begins.

    It spends what `size` says of its arguments: by default, the length of the first axis of the first array among them,
    and of the first list of texts where there is no array; an array without axes and a single text count as one, and an
    empty batch as one. A call that is refused does not begin. Raises what `model.spend` raises, and UsageError
    BATCH_UNKNOWN where nothing among the arguments is an array or a text; TypeError where `size` gives no whole number.
    """
    count = size or _first_axis

    @wraps(call)
    def spend_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
        model.spend(index(count(*args, **kwargs)) or 1)
        return call(*args, **kwargs)

    return spend_and_call


def _first_axis(*args: object, **kwargs: object) -> int:
    given = (*args, *kwargs.values())
    for found in (_arrays(given), _texts(given)):
        for length in found:
            return length
    what = "The arguments of this call hold no array and no text, so the size of its batch cannot be told."
    raise UsageError(Reason.BATCH_UNKNOWN, what, "Give `metered` a function of the same arguments: size=...")


def _arrays(values: Iterable[object]) -> Iterable[int]:
    """The length of each array, in lists and mappings too, in the order in which they are given."""
    for value in values:
        shape: Any = getattr(value, "shape", None)
        if callable(shape):  # as ONNX Runtime's OrtValue has it
            shape = shape()
        if shape is not None:
            yield int(shape[0]) if len(shape) else 1
        elif isinstance(value, Mapping):
            yield from _arrays(value.values())
        elif isinstance(value, list | tuple):
            yield from _arrays(value)


def _texts(values: Iterable[object]) -> Iterable[int]:
    for value in values:
        if isinstance(value, str):
            yield 1
        elif isinstance(value, list | tuple) and value and all(isinstance(one, str | tuple | list) for one in value):
            yield len(value)
