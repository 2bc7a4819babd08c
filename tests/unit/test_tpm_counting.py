"""NV indexes and the policies of counted licenses: against frozen vectors, and what is refused without a TPM."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwlicense.core.documents import TpmCounter, TpmIndex
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.tpm import composing, nv, policy
from hwlicense.core.tpm.composing import Conditions
from hwlicense.core.tpm.structures import Public

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "tpm-counting.json").read_text())
assert VECTORS["licenses"]
HANDLE = nv.FIRST


def conditions(vector):
    made = vector["binding"]
    counter = TpmCounter(**made["counter"])
    indexes = [
        TpmIndex(i["purpose"], i["handle"], i["limit"], bytes.fromhex(i["reference"]), b"") for i in made["indexes"]
    ]
    platform = bytes.fromhex(made["platform"]) if made["platform"] else None
    key = Public.parse(bytes.fromhex(VECTORS["policy_key"]))
    return Conditions(key, platform, made["pin"], counter, indexes, made["deadline"], made["cap"])


# ---- vectors: a TPM made these Names, and its trial sessions these digests ----


@pytest.mark.parametrize("vector", VECTORS["licenses"], ids=lambda vector: vector["comment"])
def test_names_and_policies(vector):
    asked = conditions(vector)
    assert nv.counter_public(asked.counter.handle).name.hex() == vector["counter_name"]
    assert policy.digest(asked.sealed).hex() == vector["sealed_policy"]
    for index, expected in zip(asked.indexes, vector["indexes"], strict=True):
        public = asked.public(index)
        assert public.raw.hex() == expected["public"]
        assert public.name.hex() == expected["name"]
        assert public.unwritten.name.hex() == expected["unwritten_name"]
        assert nv.write_hash(public, nv.limit_data(index.limit)).hex() == expected["write_hash"]
        assert policy.digest(asked.write(index)).hex() == expected["write_policy"]


@pytest.mark.parametrize("vector", VECTORS["references"], ids=lambda vector: vector["purpose"])
def test_references(vector):
    of = vector["purpose"], vector["vendor"], vector["license"], vector["value"]
    assert composing.write_reference(*of).hex() == vector["reference"]


def test_a_write_reference_is_one_purpose_of_one_vendor_license_and_revision():
    base = ("opens", "aa" * 32, "bb" * 16, 4)
    others = [("anchor", *base[1:]), (base[0], "ab" * 32, *base[2:]), (*base[:2], "ba" * 16, 4), (*base[:3], 6)]
    assert len({composing.write_reference(*of) for of in (base, *others)}) == 5


# ---- indexes ----


def test_a_name_tells_handle_type_attributes_policy_and_whether_it_was_written():
    counter, index = nv.counter_public(HANDLE), nv.pin_pass_public(HANDLE, b"p" * 32)
    names = [
        counter.name,
        counter.unwritten.name,
        nv.counter_public(HANDLE + 4).name,
        index.name,
        index.unwritten.name,
        nv.pin_pass_public(HANDLE, b"q" * 32).name,
        nv.NvPublic(HANDLE, counter.attributes ^ nv.NvAttributes.COUNTER).name,
    ]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {34}


@given(st.integers(nv.FIRST, nv.LAST), st.integers(1, 2**64 - 1))
def test_counters_of_requests(handle, value):
    fine = handle % nv.BLOCK == 0 and value % 2 == 1
    try:
        nv.check_counter(TpmCounter(handle, value))
    except DamagedError as error:
        assert error.reason == Reason.EVIDENCE_INVALID  # noqa: PT017
        assert not fine
    else:
        assert fine


@pytest.mark.parametrize("handle", [nv.FIRST - 4, nv.LAST + 1, 0x01800000, nv.FIRST + 1, nv.FIRST + 2])
def test_counters_elsewhere(handle):
    with pytest.raises(DamagedError):
        nv.check_counter(TpmCounter(handle, 1))


def test_a_block_is_free_as_a_whole():
    taken = set(range(nv.FIRST, nv.LAST + 1))
    free = nv.FIRST + 8 * nv.BLOCK
    taken -= set(range(free, free + nv.BLOCK))
    taken.discard(nv.FIRST)  # the counter's place alone is not enough
    assert nv.free_block(taken) == free


def test_a_limit_starts_at_nothing_counted():
    assert nv.limit_data(258) == bytes(6) + b"\1\2"


# ---- policies ----


def test_the_index_of_opens_comes_last_and_what_it_is_good_for_is_in_every_policy():
    for vector in VECTORS["licenses"]:
        asked = conditions(vector)
        kinds = [type(step) for step in asked.sealed]
        assert kinds.count(policy.PolicySecret) == sum(index.purpose == "opens" for index in asked.indexes)
        if policy.PolicySecret in kinds:
            assert kinds[-1] is policy.PolicySecret
        assert policy.PolicyCommandCode(policy.UNSEAL) in asked.sealed
        for index in asked.indexes:
            assert isinstance(asked.write(index)[0], policy.PolicyAuthorize | policy.PolicyPCR)
            assert isinstance(asked.write(index)[-1], policy.PolicyCpHash)


def test_revisions_purposes_and_limits_have_policies_of_their_own():
    asked = conditions(VECTORS["licenses"][0])
    index = asked.indexes[0]
    digests = {policy.digest(asked.write(index))}
    for changed in ({"limit": index.limit + 1}, {"handle": index.handle + 1}, {"reference": bytes(32)}):
        digests.add(policy.digest(asked.write(msgspec.structs.replace(index, **changed))))
    assert len(digests) == 4


def _index(purpose="opens", place=1, limit=5):
    return TpmIndex(purpose, HANDLE + place, limit, bytes(32), b"")


@pytest.mark.parametrize(
    "changes",
    [
        {"counter": None},  # what goes with a counter, and none
        {"counter": None, "indexes": (), "deadline": None},
        {"counter": None, "indexes": (), "cap": None},
        {"policy_key": None},
        {"counter": TpmCounter(HANDLE, 3)},  # an odd value is a write window
        {"indexes": (_index(), _index())},
        {"indexes": (_index(place=2),)},
        {"indexes": (_index("anchor", 1, nv.UNCOUNTABLE),)},
        {"indexes": (_index("anchor", 2, 7),)},  # an anchor only counts
    ],
)
def test_parts_that_contradict_each_other(changes):
    key = Public.parse(bytes.fromhex(VECTORS["policy_key"]))
    good: dict[str, Any] = {
        "policy_key": key,
        "platform": None,
        "pin": False,
        "counter": TpmCounter(HANDLE, 2),
        "indexes": (_index(), _index("anchor", 2, nv.UNCOUNTABLE)),
        "deadline": 5,
        "cap": 15,
    }
    assert Conditions(**good)._consistent()
    assert not Conditions(**good | changes)._consistent()
