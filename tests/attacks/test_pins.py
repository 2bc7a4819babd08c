"""PINs: offered to one license alone, and taken in every form that an application may have them in."""

import pytest

import hwlicense
from hwlicense.binders.tpm.probing import probe
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.pcrs import Selection
from tests.forging import refused
from tests.world import TERMS, licensed


def pin(text):
    return Secret(bytearray(text.encode()))


def wrong_pins(device):
    return probe(device.tpm.tcti, Selection()).wrong_pins


@pytest.mark.parametrize("form", [str, str.encode, lambda text: bytearray(text.encode()), pin])
def test_a_pin_in_any_form(vendor, device, form):
    licensed(vendor, device, TERMS, pin=pin("2468"))
    device.open(vendor, pin=lambda _prompt: form("2468")).close()
    with refused("PIN_WRONG"):
        device.open(vendor, pin=lambda _prompt: form("1357"))


@pytest.mark.parametrize("nothing", [None, "", b"", 2468])
def test_what_is_no_pin(vendor, device, nothing):
    licensed(vendor, device, TERMS, pin=pin("2468"))
    with refused("PIN_NEEDED"):
        device.open(vendor, pin=lambda _prompt: nothing)
    assert wrong_pins(device) == 0


def test_a_wrong_pin_is_offered_to_one_license_alone(vendor, device):
    for each in ("1111", "2222", "3333"):
        licensed(vendor, device, TERMS, pin=pin(each))
    prompts = []

    def wrong(prompt):
        prompts.append(prompt)
        return "0000"

    with refused("PIN_WRONG"):
        device.open(vendor, pin=wrong)
    assert len(prompts) == 1
    assert "label-reader" in prompts[0]
    assert wrong_pins(device) == 1


def test_a_license_without_a_pin_is_tried_first(vendor, device):
    licensed(vendor, device, TERMS)
    licensed(vendor, device, TERMS, pin=pin("2468"))
    device.open(vendor, pin=lambda _prompt: pytest.fail("no PIN was needed")).close()


def test_the_public_face_names_what_an_application_needs():
    assert {hwlicense.Model.__name__, hwlicense.Secret.__name__} == {"Model", "Secret"}
    with pytest.raises(AttributeError):
        assert hwlicense.nothing_of_the_kind
