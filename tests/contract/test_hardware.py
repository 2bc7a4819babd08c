"""What every binder, and every combination of them, must do: one suite, run over all."""

import itertools
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

import hwlicense
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HwlicenseError, Reason
from hwlicense.core.schema import encode
from hwlicense.device.reporting import status
from tests.pieces import PIECES, Bench, DonglePiece, Kit, TokenPiece, TpmPiece
from tests.world import MEMBERS, NOW, TERMS, everything

COMBINATIONS: dict[str, tuple[Any, ...]] = {
    "TPM and token, both": ("TPM", "token, P-256", "all"),
    "TPM and dongle, both": ("TPM", "dongle, less than 64", "all"),
    "token and dongle, both": ("token, RSA", "dongle, fixed 64", "all"),
    "TPM or dongle": ("TPM", "dongle, less than 64", "any"),
    "either of two dongles": ("dongle, less than 64", "dongle, fixed 64", "any"),
    "either of two tokens": ("token, P-256", "token, RSA", "any"),
    "two of three": ("TPM", "token, P-256", "dongle, less than 64", 2),
    "two of three dongles": ("dongle, less than 64", "dongle, enrolled", "dongle, fixed 64", 2),
    "three of three": ("TPM", "token, P-256", "dongle, less than 64", "all"),
}
EVERY: dict[str, tuple[Any, ...]] = {**{name: (name, "all") for name in PIECES}, **COMBINATIONS}
needed = pytest.mark.parametrize("combination", EVERY)


@pytest.fixture(scope="module")
def shared():
    with Bench() as bench:
        yield bench


@pytest.fixture
def bench():
    with Bench() as own:
        yield own


def terms(need, extra=""):
    bindings = f'"{need}"' if isinstance(need, str) else need
    return f"{TERMS}[require]\nbindings = {bindings}\n{extra}"


def kit(bench, tmp_path, combination):
    *names, need = EVERY[combination]
    return Kit(bench, tmp_path / "home", [PIECES[name](bench) for name in names]), need


def count(need, pieces):
    return {"all": len(pieces), "any": 1}.get(need, need)


@needed
def test_every_subset_that_suffices_opens_and_no_other(shared, vendor, tmp_path, combination):
    device, need = kit(shared, tmp_path, combination)
    device.license(vendor, terms(need))
    with device.open(vendor) as model:
        assert everything(model) == MEMBERS
    pieces = device.pieces
    for away in range(1, len(pieces) + 1):
        for gone in itertools.combinations(pieces, away):
            for piece in gone:
                piece.pull()
            try:
                if len(pieces) - away >= count(need, pieces):
                    device.open(vendor).close()
                else:
                    with pytest.raises(HwlicenseError) as caught:
                        device.open(vendor)
                    assert caught.value.reason in {piece.absent for piece in gone}
                    assert caught.value.exit_status == 3
                    assert caught.value.hint
            finally:
                for piece in gone:
                    piece.plug()
    device.open(vendor).close()


@needed
def test_the_same_kinds_of_hardware_but_others_open_nothing(bench, vendor, tmp_path, combination):
    device, need = kit(bench, tmp_path, combination)
    device.license(vendor, terms(need))
    others, _ = kit(bench, tmp_path / "others", combination)
    for piece in others.pieces:  # as plugged and as programmed as the right ones
        piece.prepare(vendor)
        with piece.hardware():
            pass
    for piece in device.pieces:
        piece.pull()
    with pytest.raises(HwlicenseError) as caught:
        device.open(vendor, tpm=others.tcti)
    expected = {piece.absent for piece in device.pieces}
    assert caught.value.reason in expected | {Reason.WRONG_DEVICE}, caught.value


@needed
def test_a_license_names_what_it_is_bound_to_and_holds_nothing_secret(shared, vendor, tmp_path, combination):
    device, need = kit(shared, tmp_path, combination)
    raw = device.license(vendor, terms(need))
    licensed = unverified(raw, License)[0]
    assert [binding.__struct_config__.tag for binding in licensed.bindings] == [p.kind for p in device.pieces]
    assert licensed.need == count(need, device.pieces)
    subsets = itertools.combinations(range(len(device.pieces)), licensed.need)
    assert [tuple(wrap.members) for wrap in licensed.wraps] == list(subsets)
    everywhere = raw + encode(licensed) + b"".join(f.read_bytes() for f in device.home.path.rglob("*") if f.is_file())
    for piece in device.pieces:
        if isinstance(piece, DonglePiece):
            assert piece.dongle.secret not in everywhere
            assert piece.dongle.secret.hex().encode() not in everywhere


@needed
def test_threads_and_forked_processes_open_and_use_one_license(bench, vendor, tmp_path, combination):
    device, need = kit(bench, tmp_path, combination)
    device.license(vendor, terms(need))
    failed = []

    def work():
        try:
            with device.open(vendor) as model, model.session():
                assert bytes(model.read("labels/names.txt")) == MEMBERS["labels/names.txt"]
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test shows it
            failed.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with device.open(vendor) as model:
        child = os.fork()
        if not child:
            status = 1
            with suppress(BaseException):
                with model.session():
                    assert bytes(model.read("labels/names.txt")) == MEMBERS["labels/names.txt"]
                status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert everything(model) == MEMBERS


@needed
def test_pulled_hardware_refuses_the_next_session_and_coming_back_unlocks(bench, vendor, tmp_path, combination):
    device, need = kit(bench, tmp_path, combination)
    device.license(vendor, terms(need, '[presence]\ninterval = "1s"\nanswers = 40\n'))
    pieces = device.pieces
    gone = pieces[count(need, pieces) - 1 :]  # one fewer than suffices stays
    with device.open(vendor) as model:
        held = model.read("labels/names.txt")
        with model.session():
            for piece in gone:
                piece.pull()
            until(lambda: not model.standing())
            assert bytes(held) == MEMBERS["labels/names.txt"]  # the session goes on
        with pytest.raises(HwlicenseError) as caught, model.session():
            pass
        assert caught.value.reason in {piece.absent for piece in gone} | {Reason.TPM_GONE}
        with pytest.raises(HwlicenseError):
            model.read("weights.bin")
        until(lambda: not any(model._keys.memory.view))
        assert bytes(held) == MEMBERS["labels/names.txt"]
        for piece in gone:
            piece.plug()
        until(model.standing)
        with model.session():
            assert everything(model) == MEMBERS


@needed
def test_a_forked_process_that_does_nothing_keeps_no_keys_longer_than_its_parent(bench, vendor, tmp_path, combination):
    device, need = kit(bench, tmp_path, combination)
    device.license(vendor, terms(need, '[presence]\ninterval = "1s"\nanswers = 40\n'))
    pieces = device.pieces
    with device.open(vendor) as model:
        gone = pieces[count(need, pieces) - 1 :]
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            with suppress(BaseException):
                os.read(reading, 1)
                for piece in gone:
                    if isinstance(piece, DonglePiece):  # the bus of this process is a copy
                        piece.pull()
                time.sleep(2.5)
                assert not any(model._keys.memory.view)
                with pytest.raises(HwlicenseError):
                    model.read("weights.bin")
                status = 0
            os._exit(status)
        for piece in gone:
            piece.pull()
        os.write(writing, b"!")
        assert os.waitpid(child, 0)[1] == 0
        os.close(reading)
        os.close(writing)


def test_a_closed_model_stays_closed_in_a_forked_process(shared, vendor, tmp_path):
    device, _ = kit(shared, tmp_path, "dongle, less than 64")
    device.license(vendor, terms("all", '[presence]\ninterval = "1s"\nanswers = 40\n'))
    with device.open(vendor) as model:
        pass
    child = os.fork()
    if not child:
        status = 1
        with suppress(BaseException):
            with pytest.raises(hwlicense.ClosedError):
                model.size("weights.bin")
            status = threading.active_count() != 1
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pin_function_that_fails_once_is_asked_again_at_the_next_opening_only(bench, vendor, tmp_path):
    device, _ = kit(bench, tmp_path, "token, P-256")
    device.license(vendor, terms("all", '[presence]\ninterval = "1s"\n'))
    asked = []

    def pin(prompt):
        asked.append(prompt)
        if len(asked) == 2:
            raise ZeroDivisionError("of the application")
        return bytearray(b"123456")

    with device.open(vendor, pin=pin) as model:
        device.pieces[0].pull()
        until(lambda: not model.standing())
        device.pieces[0].plug()
        until(lambda: len(asked) == 2)
        time.sleep(1.5)
        assert len(asked) == 2
        assert model.standing().reason == Reason.PIN_NEEDED
    with device.open(vendor, pin=pin) as model:
        assert model.standing()


def test_a_bytearray_that_holds_a_pin_is_wiped(bench, vendor, tmp_path):
    device, _ = kit(bench, tmp_path, "token, P-256")
    device.license(vendor, terms("all"))
    given = bytearray(b"123456")
    device.open(vendor, pin=lambda _prompt: given).close()
    assert given == bytes(6)


def test_a_license_that_lacks_a_piece_it_can_do_without_is_not_damaged(bench, vendor, tmp_path):
    device, need = kit(bench, tmp_path, "TPM or dongle")
    raw = device.issue(vendor, terms(need))
    device.pieces[0].pull()
    told: list[HwlicenseError] = []
    device.install(raw, vendor, absent=told.append)
    assert [error.reason for error in told] == ["TPM_ABSENT"]
    (entry,), _ = status(device.home, NOW.date())
    assert entry["state"] == "installed"
    device.open(vendor).close()
    device.pieces[1].pull()
    with pytest.raises(HwlicenseError):
        device.open(vendor)


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@needed
def test_edited_terms_open_nothing(bench, vendor, tmp_path, combination):
    """By whoever holds the vendor's document keys, but not what the hardware holds."""
    from msgspec.structs import replace  # noqa: PLC0415

    from hwlicense.core.envelope import seal  # noqa: PLC0415

    device, need = kit(bench, tmp_path, combination)
    licensed = unverified(device.license(vendor, terms(need)), License)[0]
    edited = replace(licensed, grant=replace(licensed.grant, licensee="Someone else"))
    device.install(seal(edited, vendor.keys.signers), vendor)
    with pytest.raises(HwlicenseError) as caught:
        device.open(vendor)
    assert caught.value.reason == Reason.LICENSE_DAMAGED


def opened(package, text, home, options, out):
    try:
        with hwlicense.open(package, vendor=text, home=home, pin=lambda _prompt: "123456", **options) as model:
            out.put(bytes(model.read("labels/names.txt")))
    except HwlicenseError as error:
        out.put(repr(error))


@pytest.mark.parametrize("name", ["TPM", "token, P-256", "token, RSA"])
def test_a_spawned_process_opens_for_itself(bench, vendor, tmp_path, name):
    device = Kit(bench, tmp_path / "home", [PIECES[name](bench)])
    device.license(vendor, terms("all"))
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    options = {"tpm": device.tcti, "token": device.token}
    child = context.Process(target=opened, args=(vendor.package, vendor.text, device.home.path, options, out))
    child.start()
    assert out.get(timeout=60) == MEMBERS["labels/names.txt"]
    child.join()


def test_every_kind_of_piece_is_in_the_suite():
    assert {piece.kind for piece in (TpmPiece, TokenPiece, DonglePiece)} == {"tpm", "pkcs11", "usb"}
