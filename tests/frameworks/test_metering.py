"""Calls that spend inferences before they begin, from a real account."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy
import onnxruntime
import pytest

from hwlicense.core.errors import ClosedError, ExceededError, HardwareError, Reason, UsageError
from hwlicense.device.licensed import Conditions
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from hwlicense.integrations import metered
from hwlicense.integrations.onnxruntime import session
from tests.frameworks.conftest import picture
from tests.metered import SECOND, Machine, grant, limited
from tests.packages import nothing_enclosed


@pytest.fixture
def metering(vendor, made, tmp_path, monkeypatch):
    """A model with 8 inferences left, and what says how many are."""
    with Machine().running(monkeypatch) as machine:
        granted = grant(limited(inferences=8))
        account = machine.open(tmp_path / "state", granted)
        file = PackageFile(made.package, vendor.public)
        with Model(file, nothing_enclosed(made.key), Conditions(granted, None, account)) as model:
            yield model


def left(model) -> int:
    return next((count for count in range(8, 0, -1) if model.standing(inferences=count)), 0)


def test_a_batch_is_spent_before_the_run_and_refused_as_a_whole(metering):
    network = session(metering, "cls.onnx")
    run = metered(network.run, metering)
    name = network.get_inputs()[0].name
    plain = network.run(None, {name: picture()})[0]
    assert run(None, {name: picture()})[0].tobytes() == plain.tobytes()
    assert left(metering) == 5
    assert run(output_names=None, input_feed={name: picture()[:1]})[0].shape[0] == 1
    assert left(metering) == 4
    before = numpy.concatenate([picture()] * 2)[:5]
    with pytest.raises(ExceededError) as refused:
        run(None, {name: before})
    assert refused.value.reason == Reason.INFERENCES_EXHAUSTED
    assert left(metering) == 4
    assert run(None, {name: before[:4]})[0].shape[0] == 4
    assert left(metering) == 0


def test_a_run_that_is_refused_does_not_begin_and_one_that_fails_is_paid(metering):
    calls = []

    def call(batch):
        calls.append(len(batch))
        raise ValueError("the network is not well")

    run = metered(call, metering)
    with pytest.raises(ValueError, match="not well"):
        run(numpy.zeros((6, 2)))
    assert (calls, left(metering)) == ([6], 2)
    with pytest.raises(ExceededError):
        run(numpy.zeros((3, 2)))
    assert calls == [6]
    metering.close()
    with pytest.raises(ClosedError):
        run(numpy.zeros((1, 2)))
    assert calls == [6]


VALUE = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.zeros((6, 2), "f4"))


@pytest.mark.parametrize(
    ("arguments", "named", "count"),
    [
        ((numpy.zeros((4, 3)),), {}, 4),
        ((numpy.zeros(()),), {}, 1),
        ((numpy.zeros((0, 3)),), {}, 1),
        ((None, {"a": numpy.zeros((2, 3)), "b": numpy.zeros((5, 3))}), {}, 2),
        ((None, {"a": VALUE}), {}, 6),
        (([numpy.zeros((3, 1))],), {}, 3),
        ((), {"input_ids": numpy.zeros((7, 9), "i8"), "max_new_tokens": 5}, 7),
        (("a text",), {}, 1),
        ((["a text", "and another"],), {}, 2),
        (([("a question", "its answer")] * 3,), {}, 3),
        (("a text",), {"past": numpy.zeros((2, 2))}, 2),
        ((None, {"x": [[1, 2], [3, 4], [5, 6]]}), {}, 3),
        ((["y"], {"x": [[1.0, 2.0], [3.0, 4.0]]}), {}, 2),
        (([[[1, 2]], [[3, 4]]],), {}, 2),
        ((["a text"],), {"stops": [1, 2, 3]}, 1),
        (([1, 2],), {}, 2),
        ((numpy.int64(5), [0.5, 1.5, 2.5]), {}, 1),
    ],
)
def test_how_long_a_batch_is(arguments, named, count):
    spent: list[int] = []
    run = metered(lambda *_arguments, **_named: "done", spending(spent))
    assert run(*arguments, **named) == "done"
    assert spent == [count]


def spending(spent: list[int]) -> Any:
    """A model without limits, that says what is spent."""
    return SimpleNamespace(spend=spent.append)


def test_what_cannot_be_told_is_asked_for():
    spent: list[int] = []
    with pytest.raises(UsageError) as refused:
        metered(print, spending(spent))(5, [object(), []], file=None)
    assert refused.value.reason == Reason.BATCH_UNKNOWN
    assert metered(sum, spending(spent), len)([1, 2, 3]) == 6
    assert spent == [3]


def shaped(shape):
    return SimpleNamespace(shape=shape)


def nested(levels):
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


IN_ITSELF: list[Any] = []
IN_ITSELF.append(IN_ITSELF)
NAMED: dict[str, Any] = {}
NAMED["a"] = NAMED


@pytest.mark.parametrize(
    "argument",
    [
        *(shaped((length, 3)) for length in (None, "n", "3", -1, float("nan"), float("inf"), 2.0)),
        shaped(7),
        shaped(lambda _needed: (3,)),
        shaped({1: 2}),
        numpy.ndarray,
        IN_ITSELF,
        NAMED,
        nested(5000),
    ],
)
def test_what_has_no_whole_length_is_asked_for(argument):
    spent: list[int] = []
    called: list[object] = []
    with pytest.raises(UsageError) as refused:
        metered(called.append, spending(spent))(argument)
    assert (refused.value.reason, spent, called) == (Reason.BATCH_UNKNOWN, [], [])
    metered(called.append, spending(spent), lambda _argument: 3)(argument)
    assert (spent, len(called)) == ([3], 1)


@pytest.mark.parametrize("count", [numpy.int64(3), numpy.uint8(3), numpy.array(3)])
def test_whole_numbers_of_other_libraries_are_counts(metering, count):
    metered(lambda: None, metering, lambda: count)()
    assert left(metering) == 5


@pytest.mark.parametrize("count", [0, -1, numpy.int64(0), True, numpy.True_, 2.0, numpy.float64(2), None, "3", 1 << 31])
def test_what_a_function_says_is_a_count_or_refused(count):
    spent: list[int] = []
    called: list[int] = []
    with pytest.raises(UsageError) as refused:
        metered(called.append, spending(spent), lambda _one: count)(1)
    assert (refused.value.reason, spent, called) == (Reason.USAGE, [], [])


@pytest.mark.parametrize("wait", [-1.0, float("nan"), "5", None])
def test_what_is_no_time_to_wait(wait):
    with pytest.raises(UsageError) as refused:
        metered(print, spending([]), wait=wait)
    assert refused.value.reason == Reason.USAGE


@pytest.fixture
def under(vendor, made, tmp_path, monkeypatch):
    """Models under limits, on a machine whose account is looked after whenever time passes."""
    with Machine().running(monkeypatch) as machine, monkeypatch.context() as patched, ExitStack() as stack:

        def opened(*rates, **limits):
            granted = grant(limited(*rates, **limits))
            account = machine.open(tmp_path / "state", granted)

            def sleep(seconds):
                machine.passes(seconds + 0.001)
                account._tended.tend()

            patched.setattr(time, "sleep", sleep)
            file = PackageFile(made.package, vendor.public)
            return stack.enter_context(Model(file, nothing_enclosed(made.key), Conditions(granted, None, account)))

        yield SimpleNamespace(machine=machine, opened=opened)


@pytest.mark.parametrize(
    ("rates", "total", "batch", "calls"), [([], 10_000, 256, 20), ([(9000, 60)], None, 3, 1000), ([], 10_000, 1000, 8)]
)
def test_a_lease_that_is_not_renewed_yet_is_waited_for(under, rates, total, batch, calls):
    model = under.opened(*rates, inferences=total)
    done: list[int] = []
    hasty = metered(done.append, model, lambda _call: batch)
    with pytest.raises(ExceededError) as refused:
        list(map(hasty, range(calls)))
    assert refused.value.reason == Reason.LEASE_PENDING
    patient = metered(done.append, model, lambda _call: batch, wait=5.0)
    for _ in range(calls - len(done)):
        patient(1)
    assert len(done) == calls


def test_no_longer_is_waited_than_was_said(under):
    model = under.opened((10, 60), inferences=1000)
    run = metered(lambda _batch: None, model, wait=5.0)
    run(numpy.zeros(10))
    before = under.machine.boot
    with pytest.raises(ExceededError) as refused:
        run(numpy.zeros(1))
    assert (refused.value.reason, under.machine.boot) == (
        Reason.RATE_EXCEEDED,
        before,
    )  # it is known that it is in vain
    metered(lambda _batch: None, model, wait=70.0)(numpy.zeros(1))
    assert under.machine.boot - before < 70 * SECOND
    with pytest.raises(ExceededError) as refused:
        metered(lambda _batch: None, model, wait=float("inf"))(numpy.zeros(1000))
    assert refused.value.wait is None


def test_a_lease_that_the_tpm_does_not_renew_is_waited_for_so_long(under):
    model = under.opened(inferences=10_000)
    under.machine.failing = HardwareError(Reason.TPM_FAILED, "The TPM failed.")
    before = under.machine.boot
    with pytest.raises(ExceededError) as refused:
        metered(lambda _batch: None, model, wait=7.0)(numpy.zeros(2000))
    assert refused.value.reason == Reason.LEASE_PENDING
    assert 7 * SECOND <= under.machine.boot - before < 8 * SECOND
    under.machine.failing = None


def test_what_is_no_model_or_no_function_is_refused_before_the_first_call():
    model: Any = spending([])
    wrong: list[Any] = [("base.hwpkg",), (print,), (None,), (model, 4)]
    for arguments in wrong:
        with pytest.raises(UsageError) as refused:
            metered(print, *arguments)
        assert refused.value.reason == Reason.USAGE
    with pytest.raises(UsageError):
        metered(model, model)
