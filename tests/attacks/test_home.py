"""The device's home in the hands of someone who can read it, write it, copy it or fill its disk."""

import base64
import collections
import re
import shutil
import stat

import msgspec
import pytest

from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.keys import unwrap_for_vendor, unwrap_license_secret
from hwlicense.core.schema import encode
from hwlicense.device import diagnosing
from hwlicense.device.home import Home, verified_by_any
from hwlicense.device.installing import install
from hwlicense.device.opening import unlock, utc_today
from hwlicense.device.selecting import tpm_address
from tests.forging import flipped, listing, refused
from tests.world import MEMBERS, TERMS, WITH_PCRS, Device, everything, licensed


def held_of(home):
    return [path for path in sorted((home.path / "licenses").rglob("held/*")) if path.is_file()]


def key(vendor, device):
    """The content key, without the package's content: what opening comes to."""
    return unlock(vendor.manifest, vendor.public, device.home, device.connect, None, utc_today()).content.key


def content_key_of(vendor):
    return unwrap_for_vendor(vendor.manifest.wrapped_content_key, vendor.manifest.content_key, vendor.keys.content)


def test_a_copied_home_opens_nowhere_else(vendor, device, hwlicense_tpms, tmp_path):
    licensed(vendor, device)
    shutil.copytree(device.home.path, tmp_path / "copy")
    for options in ({}, {"storage_key": "ecc"}):
        with refused("WRONG_DEVICE"):
            Device(Home(tmp_path / "copy"), hwlicense_tpms(**options)).open(vendor)
    with Device(Home(tmp_path / "copy"), device.tpm).open(vendor) as model:
        assert everything(model) == MEMBERS


def test_no_byte_of_what_the_hardware_gave_may_differ(vendor, device):
    licensed(vendor, device, TERMS)
    (path,) = held_of(device.home)
    raw, ends = path.read_bytes(), collections.Counter[str]()
    for place in range(len(raw)):
        path.write_bytes(flipped(raw, place))
        try:
            key(vendor, device)
        except HwlicenseError as error:
            ends[error.reason if error.hint else "no hint"] += 1
        else:
            pytest.fail(f"byte {place} may be changed")
    print(f"\nheld file of {len(raw):,} bytes, {sum(ends.values()):,} flips, none opened: {dict(ends)}")  # noqa: T201
    assert set(ends) == {"HOME_DAMAGED", "WRONG_DEVICE", "LICENSE_DAMAGED"}
    path.write_bytes(raw)
    assert key(vendor, device) == content_key_of(vendor)


def test_a_damaged_ticket_is_only_a_lost_short_cut(vendor, device):
    """A ticket says what the TPM has checked before; the TPM checks again where it does not know its own ticket."""
    licensed(vendor, device)
    (path,) = held_of(device.home)
    held = msgspec.json.decode(path.read_bytes())
    ticket = base64.b64decode(held["tickets"][0]["ticket"])
    for damaged in (b"", ticket[:-1], flipped(ticket, 20), flipped(ticket, 3), bytes(72)):
        held["tickets"][0]["ticket"] = base64.b64encode(damaged).decode()
        path.write_bytes(msgspec.json.encode(held))
        assert key(vendor, device) == content_key_of(vendor)
    device.tpm.reboot(firmware=b"firmware 2")
    with refused("PCR_MISMATCH"):
        key(vendor, device)


def test_files_cut_deleted_or_exchanged(vendor, device):
    for _ in range(2):
        licensed(vendor, device)
    first, second = held_of(device.home)
    one, other = first.read_bytes(), second.read_bytes()
    for contents in ((other, one), (one[: len(one) // 2], b""), (b"{}", b"\0" * 300_000), (None, None)):
        for path, content in zip((first, second), contents, strict=True):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        with refused("HOME_DAMAGED", "DOCUMENT_TOO_LARGE"):
            device.open(vendor)
    for raw in (unverified_license(first), unverified_license(second)):  # what the hint says does mend it
        device.install(raw, vendor)
    device.open(vendor).close()


def unverified_license(held):
    return (held.parent.parent / "license.hwlic").read_bytes()


def test_a_home_where_files_are_other_things(vendor, device):
    licensed(vendor, device)
    (path,) = held_of(device.home)
    shutil.move(path, path.with_name("away"))
    path.mkdir()
    with refused("USAGE", "HOME_DAMAGED"):
        device.open(vendor)
    path.rmdir()
    path.symlink_to("/dev/zero")
    with refused("USAGE", "HOME_DAMAGED"):
        device.open(vendor)
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")
    with refused("USAGE", "HOME_DAMAGED"):
        device.open(vendor)


@pytest.mark.parametrize("name", ["device.json", "trust.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema":2}', b"\xff\xfe", b"[" * 100_000, b" " * (5 << 20)])
def test_damaged_small_files_are_named_with_what_mends_them(vendor, device, name, content):
    licensed(vendor, device)
    device.home.keep_enrolled(device.tpm.tcti, "")
    (device.home.path / name).write_bytes(content)
    with refused("HOME_DAMAGED", "DOCUMENT_TOO_LARGE", words=name):
        tpm_address(None, device.home)
        device.home.trusted()
    # Applications bring their own trust, and may name their TPM
    device.open(vendor).close()


def test_every_byte_of_the_small_files_is_read_strictly_or_harmless(vendor, device):
    """No flip ends in anything but one of our errors, and none makes another vendor trusted."""
    raw_license = licensed(vendor, device)
    path = device.home.path / "trust.json"
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(flipped(raw, place))
        try:
            trusted = device.home.trusted()
            verified_by_any(raw_license, License, trusted)
        except HwlicenseError:
            continue
        (changed,) = trusted
        assert (changed.classical, changed.ml_dsa_65) == (vendor.public.classical, vendor.public.ml_dsa_65)


def test_doctor_notes_a_home_that_others_can_read(vendor, device):
    licensed(vendor, device)
    found = diagnosing.examine(device.home, device.tpm.tcti)
    assert ("ok", "home") in {(f.state, f.subject) for f in found}
    device.home.path.chmod(0o755)
    (note,) = [f for f in diagnosing.examine(device.home, device.tpm.tcti) if f.subject == "home"]
    assert (note.state, note.mend) == ("note", f"chmod go= {device.home.path}")


def test_two_vendors_on_one_device(vendor, own_vendor, device):
    for each in (vendor, own_vendor):
        licensed(each, device)
    for each in (vendor, own_vendor):
        with device.open(each) as model:
            assert everything(model) == MEMBERS
    with refused("WRONG_VENDOR"):
        device.open(vendor, own_vendor.package)
    (device.home.path / "trust.json").unlink()
    with device.open(vendor) as model:
        assert everything(model) == MEMBERS


def test_changes_go_to_the_state_folder(own_vendor, device, tmp_path):
    licensed(own_vendor, device)
    before = listing(device.home.path)
    device.tpm.reboot(firmware=b"firmware 2")
    apart = Device(Home(device.home.path, tmp_path / "state"), device.tpm)
    approval = own_vendor.approve(device.request())
    install(apart.home, approval, apart.connect)
    assert listing(device.home.path) == before
    with refused("PCR_MISMATCH"):
        device.open(own_vendor)
    apart.open(own_vendor, state=tmp_path / "state").close()
    # Damage there is mended by installing the license again, as the hint says
    (kept,) = sorted((tmp_path / "state").rglob("held/*"))
    kept.write_bytes(b"")
    with refused("HOME_DAMAGED"):
        apart.open(own_vendor, state=tmp_path / "state")
    install(apart.home, unverified_license(held_of(device.home)[0]), apart.connect)
    apart.open(own_vendor, state=tmp_path / "state").close()


def test_what_lies_on_the_disk_holds_no_secret(vendor, device):
    """Neither plaintext nor content key nor license secret, in any file of vendor and device; keys are the owner's."""
    licensed(vendor, device, WITH_PCRS)
    licensed(vendor, device, TERMS)
    device.tpm.reboot(firmware=b"firmware 2")
    secrets = [content_key_of(vendor)]
    for installed in device.home.licenses([vendor.public])[0]:
        document = installed.license
        if not document.grant.pcrs:
            with device.connect() as hardware:
                held = device.home.held(document, document.bindings[0])
                member = hardware.unwrap(document.bindings[0], held, [], None).secret
            secrets += [member, unwrap_license_secret(document.wraps, {0: member})]
    assert len(secrets) == 3
    marker = MEMBERS["weights.bin"][:26]
    seen = 0
    for path in [*device.home.path.rglob("*"), *(vendor.folder / "vendor").rglob("*"), vendor.package]:
        if not path.is_file():
            continue
        seen += 1
        content = path.read_bytes()
        unpacked = content + b"".join(_decoded(content))
        assert marker not in unpacked, path
        for secret in secrets:
            for form in (bytes(secret.buffer), secret.buffer.hex().encode(), base64.b64encode(secret.buffer)[:42]):
                assert form not in unpacked, path
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path.name in {"vendor.pub.json", vendor.package.name}
        assert mode == (0o644 if public else 0o600), path
    assert seen > 10
    for folder in [device.home.path, *device.home.path.rglob("*"), *(vendor.folder / "vendor").rglob("*")]:
        if folder.is_dir():
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def _decoded(content):
    """What base64 in a file stands for, and what base64 in that stands for."""
    for text in re.findall(rb"[A-Za-z0-9+/]{24,}={0,2}", content):
        try:
            inner = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        yield inner
        yield from _decoded(inner)


def test_the_search_for_secrets_would_find_them(vendor):
    secret = bytes(content_key_of(vendor).buffer)
    wrapped = base64.b64encode(msgspec.json.encode({"payload": base64.b64encode(b"x" * 30 + secret).decode()}))
    assert any(secret in part for part in _decoded(encode(vendor.public) + wrapped))


def test_the_license_in_the_home_is_the_file_as_it_was_sent(vendor, device):
    raw = licensed(vendor, device)
    document = unverified(raw, License)[0]
    assert (device.home.path / "licenses" / document.grant.license / "license.hwlic").read_bytes() == raw
