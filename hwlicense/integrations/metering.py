"""Inferences spent by the call that makes them, as many as its batch is long."""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping
from functools import wraps
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, ParamSpec, SupportsIndex, TypeVar

from hwlicense.core.errors import ExceededError, Reason, UsageError
from hwlicense.device.starting import check_count, check_seconds
from hwlicense.integrations.extras import check_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hwlicense.device.model import Model

_POLL: Final = 0.05  # seconds
P = ParamSpec("P")
R = TypeVar("R")


def metered(
    call: Callable[P, R], model: Model, size: Callable[P, SupportsIndex] | None = None, *, wait: float = 0.0
) -> Callable[P, R]:
    """`call` (a session's `run`, a network, its `generate`), which spends the license's inferences before it begins.

    It spends what `size` says of its arguments, a whole number from 1 on: by default, the length of the first axis of
    the first array among them, else of the first nested list of numbers, list of texts, or list of numbers. An array
    without axes, a single text and an empty batch count as one. What is refused and passes within `wait` seconds is
    waited for, LEASE_PENDING above all. A call that is refused does not begin. Raises what `model.spend` raises, and
    UsageError: BATCH_UNKNOWN where nothing among the arguments tells it, USAGE where `size` gives no such number.
    """
    check_model(model)
    functions: tuple[object, ...] = (call,) if size is None else (call, size)
    if not all(map(callable, functions)):
        what = "`metered` takes a function that makes inferences, a model and, as `size`, a function."
        raise UsageError(Reason.USAGE, what, "Give metered(session.run, model).")
    check_seconds(wait, "how long a call may wait for its inferences")

    @wraps(call)
    def spend_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
        count = _whole(size(*args, **kwargs)) if size else max(1, _first_axis(*args, **kwargs))
        give_up = time.monotonic() + wait
        while (pause := _spent(model, count, give_up)) is not None:
            time.sleep(pause)
        return call(*args, **kwargs)

    return spend_and_call


def _spent(model: Model, count: int, give_up: float) -> float | None:
    """None once it is spent, else the seconds after which to try again. Raises what is not worth waiting for."""
    try:
        model.spend(count)
    except ExceededError as error:
        left = give_up - time.monotonic()
        if error.wait is None or left <= 0:
            raise
        if error.reason == Reason.LEASE_PENDING:  # it is renewed in steps, and each is asked for
            return min(error.wait, left, _POLL)
        if error.wait > left:
            raise
        return error.wait
    return None


def _whole(count: SupportsIndex) -> int:
    """As an int: other libraries have integers of their own. Raises UsageError below 1, and for what is no number."""
    try:
        found = count if isinstance(count, bool) else int(operator.index(count))
    except TypeError:  # which the check says in our words
        found = count  # type: ignore[assignment]
    check_count(found)
    return found


def _first_axis(*args: object, **kwargs: object) -> int:
    given = (*args, *kwargs.values())
    try:
        for found in (_arrays(given), _lists(given, least=2), _texts(given), _lists(given, least=1)):
            for length in found:
                return length
    except RecursionError:
        raise _unknown("are nested too deeply, or in themselves") from None
    raise _unknown("hold no array, list of numbers or text")


def _unknown(why: str) -> UsageError:
    what = f"The arguments of this call {why}, so the size of its batch cannot be told."
    return UsageError(Reason.BATCH_UNKNOWN, what, "Give `metered` a function of the same arguments: size=...")


def _arrays(values: Iterable[object]) -> Iterable[int]:
    """The length of each array, in lists and mappings too, in the order in which they are given."""
    for value in values:
        length = _length(value)
        if length is not None:
            yield length
        elif isinstance(value, Mapping):
            yield from _arrays(value.values())
        elif isinstance(value, list | tuple):
            yield from _arrays(value)


def _length(value: Any) -> int | None:  # noqa: ANN401  # of any framework
    """Of the first axis of an array, 1 where it has none; None for what is no array."""
    try:
        shape = getattr(value, "shape", None)
        if callable(shape):  # as ONNX Runtime's OrtValue has it
            shape = shape()
        if shape is None:
            return None
        length = operator.index(shape[0]) if len(shape) else 1
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # a name, no number, or not known yet
        raise _unknown(f"hold a {type(value).__name__} whose shape gives no length") from error
    if length < 0:
        raise _unknown(f"hold a {type(value).__name__} with a first axis of {length}")
    return length


def _lists(values: Iterable[object], least: int) -> Iterable[int]:
    """The length of each list of numbers that is nested `least` times or deeper, in mappings too."""
    for value in values:
        if isinstance(value, Mapping):
            yield from _lists(value.values(), least)
        elif isinstance(value, list | tuple) and _axes(value) >= least:
            yield len(value)


def _axes(value: object) -> int:
    """How deep lists of numbers are nested, by the first of each; 0 for what are none."""
    axes = 0
    while isinstance(value, list | tuple) and value:
        value, axes = value[0], axes + 1
    return axes if isinstance(value, Real) else 0


def _texts(values: Iterable[object]) -> Iterable[int]:
    for value in values:
        if isinstance(value, str):
            yield 1
        elif isinstance(value, list | tuple) and value and all(isinstance(one, str | tuple | list) for one in value):
            yield len(value)
