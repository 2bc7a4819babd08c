"""Calls that spend inferences before they begin, from a real account."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy
import onnxruntime
import pytest

from hwlicense.core.errors import ClosedError, ExceededError, Reason, UsageError
from hwlicense.device.licensed import Conditions
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from hwlicense.integrations import metered
from hwlicense.integrations.onnxruntime import session
from tests.frameworks.conftest import picture
from tests.metered import Machine, grant, limited
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
        metered(print, spending(spent))(5, [1, 2], file=None)
    assert refused.value.reason == Reason.BATCH_UNKNOWN
    assert metered(sum, spending(spent), len)([1, 2, 3]) == 6
    assert spent == [3]


def test_what_a_size_says(metering):
    calls: list[int] = []

    def sized(length: Any) -> None:
        metered(calls.append, metering, lambda _given: length)(1)

    for length, remaining in ((numpy.int64(3), 5), (0, 4)):
        sized(length)
        assert left(metering) == remaining
    with pytest.raises(UsageError):
        sized(-3)
    for wrong in (2.0, None, float("nan")):
        with pytest.raises(TypeError):
            sized(wrong)
    assert (len(calls), left(metering)) == (2, 4)
