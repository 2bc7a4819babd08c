"""What an open model says of procedures that would start: what it is asked, and what is left for them."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from hwlicense.core.errors import AbsentError, ExceededError, Reason, UsageError
from hwlicense.device.licensed import Conditions
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from tests.metered import Machine, grant, limited, spend
from tests.packages import nothing_enclosed, pack

INFERENCES = 100


@pytest.fixture
def machine(monkeypatch):
    with Machine().running(monkeypatch) as machine:
        yield machine


@pytest.fixture
def opened(machine, vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path / "package", {"small": b"small"})
    with ExitStack() as stack:

        def open_it(*rates, presence=None, **limits):
            granted = grant(limited(*rates, **limits), continuity=600)
            metering = machine.open(tmp_path / "state", granted)
            file = PackageFile(package, vendor.public)
            return stack.enter_context(Model(file, nothing_enclosed(key), Conditions(granted, presence, metering)))

        yield open_it


@pytest.fixture
def model(opened):
    return opened(inferences=INFERENCES)


class Absent:
    """Presence of a dongle that is not plugged in."""

    here, bridged_left = False, 0.0

    def refusal(self, **_wait):
        return AbsentError(Reason.DONGLE_ABSENT, "It is not here.", "Plug it in.")

    def peek(self):
        return None

    def guard(self, model):
        pass

    close = after_fork = lambda _self: None


@pytest.mark.parametrize("horizon", [-1, -0.5, float("nan"), float("-inf"), "300", None, 1j])
def test_what_is_no_duration(model, horizon):
    with pytest.raises(UsageError):
        model.standing(horizon)


@pytest.mark.parametrize("horizon", [601, 1e300, float("inf"), 10**400])
def test_what_takes_too_long(model, horizon):
    assert model.standing(horizon).reason == Reason.CONTINUITY_TOO_SHORT
    assert model.standing(600)


@pytest.mark.parametrize("count", [-1, 1.0, float("nan"), True, "1", None, 1 << 40])
def test_what_is_no_number_of_inferences(model, count):
    with pytest.raises(UsageError):
        model.standing(inferences=count)
    with pytest.raises(UsageError), model.session(count):
        pytest.fail("it began")


def test_what_is_no_number_of_inferences_where_nothing_is_counted(vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path, {"small": b"small"})
    with (
        Model(PackageFile(package, vendor.public), nothing_enclosed(key)) as model,
        pytest.raises(UsageError),
        model.session(-1),
    ):
        pytest.fail("it began")


def test_nothing_starts_where_all_is_used_up(model):
    spent = spend(model._metering, INFERENCES - 1)
    assert spent == INFERENCES - 1
    assert model.standing()
    model.spend()
    assert model.standing().reason == Reason.INFERENCES_EXHAUSTED
    with pytest.raises(ExceededError) as error, model.session():
        pytest.fail("it began")
    assert (error.value.reason, error.value.wait) == (Reason.INFERENCES_EXHAUSTED, None)


def test_a_batch_that_is_not_spent_yet_is_left(model):
    model._metering._batch = INFERENCES
    model.spend()
    assert model.standing()


def test_what_a_session_has_reserved_is_left_to_it(model):
    assert spend(model._metering, INFERENCES - 10) == INFERENCES - 10
    with model.session(10), model.session():
        assert model.standing()
        model.spend(10)
    assert model.standing().reason == Reason.INFERENCES_EXHAUSTED


def test_what_lasts_is_said_before_what_passes(opened, monkeypatch):
    model = opened((30, 3600), (20, 10), inferences=INFERENCES, presence=(Absent(), None))
    metering = model._metering
    assert model.standing().reason == Reason.DONGLE_ABSENT
    assert model.standing(horizon=601).reason == Reason.CONTINUITY_TOO_SHORT
    assert model.standing(inferences=INFERENCES + 1).reason == Reason.INFERENCES_EXHAUSTED
    denied = ExceededError(Reason.ABNORMAL_USE, "It is.", "Wait.", 60.0)
    monkeypatch.setattr(metering, "_watch", SimpleNamespace(refusal=lambda _now: denied, close=lambda: None))
    assert metering.may_start(1).reason == Reason.ABNORMAL_USE
    assert metering.may_start(INFERENCES + 1).reason == Reason.INFERENCES_EXHAUSTED


def test_a_rate_that_never_allows_so_many_is_named_before_one_that_will(opened):
    model = opened((30, 3600), (20, 10))
    assert spend(model._metering, 10) == 10
    refusal = model.standing(inferences=21).refusal
    assert (refusal.reason, refusal.wait) == (Reason.RATE_EXCEEDED, None)
    assert "(20/10s)" in refusal.what
    assert "20 at a time, or fewer" in refusal.hint
    assert model.standing(horizon=601, inferences=20).reason == Reason.CONTINUITY_TOO_SHORT


def test_the_longest_of_the_waits_is_told(opened, machine):
    model = opened((20, 10), (30, 3600))
    assert spend(model._metering, 20) == 20
    machine.passes(20)
    assert spend(model._metering, 20) == 10
    assert model.standing(inferences=15).refusal.wait > 3000


def test_more_than_are_left_is_told_as_that(model):
    assert spend(model._metering, 90) == 90
    refusal = model.standing(inferences=11).refusal
    assert refusal.reason == Reason.INFERENCES_EXHAUSTED
    assert "The license has 10 of 100 inferences left; 11 were asked for" in refusal.what
    assert "Ask for 10 or fewer" in refusal.hint
    with pytest.raises(ExceededError, match="has 10 of 100 inferences left; 30 were"):
        model.spend(30)
    with pytest.raises(ExceededError, match="has 10 of 100"), model.session(11):
        pytest.fail("it began")
    assert spend(model._metering, 10) == 10
    with pytest.raises(ExceededError, match="inferences are used up: it allowed 100"):
        model.spend()
