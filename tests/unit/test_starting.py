"""What an open model says of procedures that would start: what it is asked, and what is left for them."""

from __future__ import annotations

import pytest

from hwlicense.core.errors import ExceededError, Reason, UsageError
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
def model(machine, vendor, tmp_path):
    package, key, _ = pack(vendor, tmp_path / "package", {"small": b"small"})
    granted = grant(limited(inferences=INFERENCES), continuity=600)
    metering = machine.open(tmp_path / "state", granted)
    with Model(PackageFile(package, vendor.public), nothing_enclosed(key), granted, None, metering) as model:
        yield model


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


def test_more_than_are_left_is_told_as_that(model):
    assert spend(model._metering, 90) == 90
    refusal = model.standing(inferences=11).refusal
    assert refusal.reason == Reason.INFERENCES_EXHAUSTED
    assert "10 of the license's 100 inferences are left; 11 were asked for" in refusal.what
    with pytest.raises(ExceededError, match="10 of the license's 100 inferences are left; 30 were"):
        model.spend(30)
    with pytest.raises(ExceededError, match="10 of the license's 100"), model.session(11):
        pytest.fail("it began")
    assert spend(model._metering, 10) == 10
    with pytest.raises(ExceededError, match="100 inferences are used up"):
        model.spend()
