"""Licenses for tokens under attack: files that choose code, tokens that look alike, modules that lie or die."""

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hwlicense.binders.pkcs11 import TokenHardware
from hwlicense.core.documents import Request
from hwlicense.core.envelope import assemble, unverified
from hwlicense.core.errors import AbsentError, DamagedError, HardwareError, HwlicenseError, RefusedError, UsageError
from hwlicense.core.uri import TokenUri
from hwlicense.vendor import evidence
from hwlicense_simulators import Reader
from tests.forging import now, replace, signed_anew
from tests.pieces import Bench, Kit, TokenPiece
from tests.refusals import lay, nobody, refusal, sent, spying_module
from tests.world import MEMBERS, TERMS, everything

MODULUS, PUBLIC_EXPONENT, LOCAL, NEVER_EXTRACTABLE, SENSITIVE = 0x120, 0x122, 0x163, 0x164, 0x103


@pytest.fixture(scope="module")
def bench():
    with Bench() as own:
        yield own


@pytest.fixture(scope="module", params=["p256", "rsa2048"])
def either(bench, vendor, request, tmp_path_factory):
    """A device with a license for a token of either kind, and the license as it was sent."""
    kit = Kit(bench, tmp_path_factory.mktemp("either"), [TokenPiece(bench, request.param)])
    return kit, kit.license(vendor, TERMS)


@pytest.fixture(scope="module")
def licensed(bench, vendor, tmp_path_factory):
    kit = Kit(bench, tmp_path_factory.mktemp("licensed"), [TokenPiece(bench)])
    return kit, kit.license(vendor, TERMS)


@pytest.fixture(autouse=True)
def healed(bench, vendor, licensed):
    """After each test nothing is left open, and the license that is there is the good one."""
    bench.reader.forget()
    yield
    bench.reader.heal()
    assert bench.reader.open_sessions == 0
    assert not bench.reader.logged_in
    kit, raw = licensed
    lay(kit, sent(raw), vendor)


def opens(kit, vendor):
    kit.bench.reader.heal()
    with kit.open(vendor) as model:
        assert everything(model) == MEMBERS


def with_binding(raw, **changes):
    licensed = sent(raw)
    return replace(licensed, bindings=[replace(licensed.bindings[0], **changes)])


# ---- files that choose code or PINs -------------------------------------------------------------------------

CHOOSING = [
    "pkcs11:token=hwlicense?module-path={}",
    "pkcs11:?module-name=spy",
    "pkcs11:token=hwlicense?pin-value=123456",
    "pkcs11:token=hwlicense?pin-source=file:{}",
    "pkcs11:token=hwlicense?pin-source=%7Ctouch%20{}",
    "pkcs11:pin-value=123456",
    "pkcs11:token=hwlicense;module-path={}",
    "pkcs11:token=hwlicense?",
    "file:{}",
]


@pytest.mark.parametrize("uri", CHOOSING)
def test_a_license_names_neither_module_nor_pin(vendor, bench, licensed, uri, tmp_path):
    """Signed by both document keys of the vendor, into whose hands they may have got."""
    kit, raw = licensed
    spy, mark = spying_module(tmp_path)
    forged = with_binding(raw, uri=uri.format(spy))
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.install(signed_anew(forged, vendor), vendor)
    lay(kit, forged, vendor)
    with refusal(DamagedError, "LICENSE_DAMAGED"):
        kit.open(vendor, pin=nobody)
    assert not mark.exists()
    assert bench.reader.calls == []
    lay(kit, sent(raw), vendor)
    with refusal(HardwareError, "TOKEN_FAILED"):  # the control: a person's own URI has the spy loaded
        kit.open(vendor, token=f"pkcs11:?module-path={spy}", pin=nobody)
    assert mark.exists()


@pytest.mark.parametrize("uri", CHOOSING)
def test_a_request_names_neither_module_nor_pin(vendor, licensed, uri, tmp_path):
    kit, _ = licensed
    honest = unverified(kit.request(vendor), Request)[0]
    forged = replace(honest, hardware=[replace(honest.hardware[0], uri=uri.format(tmp_path))])
    with refusal(DamagedError, "EVIDENCE_INVALID"):
        evidence.examine(assemble(forged, []), kit.pieces[0].trusted(), now())
    evidence.examine(assemble(honest, []), kit.pieces[0].trusted(), now())


def test_a_pin_in_a_uri_is_not_repeated_in_the_error(vendor, licensed):
    kit, _ = licensed
    for where in ("?pin-value=918273", ";object=918273?pin-value=918273", "?pin-value=918273&x"):
        with pytest.raises(HwlicenseError) as caught:
            kit.open(vendor, token=f"pkcs11:token=a{where}", pin=nobody)
        assert caught.value.reason == "USAGE"
        assert "918273" not in repr(caught.value) + caught.value.hint + str(caught.value.args)


@pytest.mark.parametrize("how", ["argument", "environment", "home"])
@pytest.mark.parametrize(
    ("module", "reason", "kind"),
    [
        ("simulated-token.so", "USAGE", UsageError),
        ("./simulated-token.so", "USAGE", UsageError),
        ("/nonexistent/module.so", "TOKEN_UNCONFIGURED", UsageError),
        ("/tmp", "USAGE", UsageError),  # noqa: S108
        ("/dev/null", "USAGE", UsageError),
        ("/etc/passwd", "TOKEN_FAILED", HardwareError),
        ("LIBC", "TOKEN_FAILED", HardwareError),
    ],
)
def test_what_is_no_module(vendor, bench, licensed, monkeypatch, how, module, reason, kind):
    kit, _ = licensed
    if module == "LIBC":
        maps = Path("/proc/self/maps").read_text().split()
        module = next(word for word in maps if word.endswith("/libc.so.6"))
    monkeypatch.chdir(bench.reader.module.parent)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(bench.reader.module.parent))
    uri = f"pkcs11:?module-path={module}"
    given: dict[str, str | None] = {"token": None}
    if how == "argument":
        given = {"token": uri}
    elif how == "environment":
        monkeypatch.setenv("HWLICENSE_TOKEN", uri)
    else:
        kit.home.keep_enrolled(None, "", [uri])
    try:
        with refusal(kind, reason):
            kit.open(vendor, pin=nobody, **given)
    finally:
        (kit.home.path / "device.json").unlink(missing_ok=True)
    assert bench.reader.calls == []


def test_without_any_module_it_is_said_how_to_name_one(vendor, licensed):
    kit, _ = licensed
    with refusal(UsageError, "TOKEN_UNCONFIGURED"):
        kit.open(vendor, token=None, pin=nobody)


# ---- tokens that look alike ---------------------------------------------------------------------------------


@pytest.fixture
def own(vendor, tmp_path):
    """A device and a reader of its own, where tokens are swapped."""
    with Bench() as bench:
        piece = TokenPiece(bench, label="the token")
        kit = Kit(bench, tmp_path / "home", [piece])
        kit.license(vendor, TERMS)
        bench.reader.forget()
        yield kit, piece.token
        assert bench.reader.open_sessions == 0


def impostor(kit, token):
    """A token that says it is the same, with a P-256 key of its own under the same label and identifier."""
    other = TokenPiece(kit.bench, label=token.label)
    token.pull()
    with other.hardware():
        pass
    token.plug()
    other.token.present_as(serial=token.serial)
    kit.bench.reader.forget()
    return other.token


def test_the_same_label_and_serial_but_another_key(vendor, own):
    kit, token = own
    fake = impostor(kit, token)
    token.pull()
    with refusal(AbsentError, "TOKEN_ABSENT"):
        kit.open(vendor, pin=nobody)
    assert "C_Login" not in kit.bench.reader.calls
    token.plug()
    kit.open(vendor).close()
    assert fake.tries_left == 3
    assert kit.bench.reader.calls.count("C_Login") == 1


def test_a_token_swapped_for_another_in_its_slot(vendor, own):
    kit, token = own
    fake = impostor(kit, token)
    fake.pull()
    token.swap(fake)
    with refusal(AbsentError, "TOKEN_ABSENT"):
        kit.open(vendor, pin=nobody)
    fake.swap(token)
    kit.open(vendor).close()


def test_of_two_tokens_that_match_none_is_enrolled_by_chance(vendor, own):
    kit, token = own
    impostor(kit, token)
    uri = f"pkcs11:token=the%20token?module-path={kit.bench.reader.module}"
    with (
        refusal(UsageError, "USAGE", words="several tokens"),
        TokenHardware([], TokenUri.parse(uri)) as hardware,
    ):
        hardware.enroll(nobody)
    kit.open(vendor).close()


def test_a_copied_softhsm_folder_is_a_copied_token(vendor, own, tmp_path):
    """As documented: SoftHSM's folder is the key. Hardware has no such folder."""
    kit, token = own
    shutil.copytree(kit.bench.reader.installation.home, tmp_path / "copy")
    token.pull()
    with Reader(tmp_path / "copy") as copy:
        with kit.open(vendor, token=f"pkcs11:?module-path={copy.module}") as model:
            assert everything(model) == MEMBERS
        assert not copy.logged_in


def test_an_environment_that_names_another_token_is_harmless(vendor, own, monkeypatch):
    kit, token = own
    fake = impostor(kit, token)
    monkeypatch.setenv("HWLICENSE_TOKEN", fake.uri)
    kit.open(vendor, token=None).close()  # the module is the same, and a token is known by its key
    with Reader() as another:
        stranger = another.token("the token")
        monkeypatch.setenv("HWLICENSE_TOKEN", stranger.uri)
        with refusal(AbsentError, "TOKEN_ABSENT"):
            kit.open(vendor, token=None, pin=nobody)
        assert "C_Login" not in another.calls
        assert stranger.tries_left == 3
        kit.open(vendor).close()  # an argument goes before the environment


# ---- modules that lie ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["wrong_secret", "short_secret", "long_secret"])
def test_a_module_that_answers_with_another_secret(vendor, bench, either, lie):
    kit, _ = either
    getattr(bench.reader, lie)()
    with refusal(HardwareError, "TOKEN_FORGED"):
        kit.open(vendor)
    opens(kit, vendor)


@pytest.mark.parametrize("by", [32, 200, 0x4000])
def test_a_module_that_answers_with_nothing_or_too_much(vendor, bench, either, by):
    kit, _ = either
    bench.reader.short_secret(by)
    with refusal(HardwareError, "TOKEN_FORGED", "TOKEN_FAILED", "TOKEN_UNSUPPORTED", "TOKEN_CRASHED"):
        kit.open(vendor)
    bench.reader.long_secret(by)
    with refusal(HardwareError, "TOKEN_FORGED", "TOKEN_FAILED", "TOKEN_UNSUPPORTED", "TOKEN_CRASHED"):
        kit.open(vendor)
    opens(kit, vendor)


def test_a_module_that_shows_another_key(vendor, bench, licensed):
    kit, _ = licensed
    theirs = ec.generate_private_key(ec.SECP256R1()).public_key()
    bench.reader.forge_point(theirs.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    with refusal(AbsentError, "TOKEN_ABSENT"):
        kit.open(vendor, pin=nobody)
    with refusal(HardwareError, "TOKEN_UNSUPPORTED"):  # nor is it enrolled: the token must answer for it
        kit.request(vendor)


@pytest.mark.parametrize("attribute", [LOCAL, NEVER_EXTRACTABLE, SENSITIVE])
def test_attributes_that_praise_a_key_prove_nothing(vendor, bench, licensed, attribute):
    kit, _ = licensed
    bench.reader.forge(attribute, b"\1")
    with refusal(RefusedError, "TOKEN_UNTRUSTED"):
        evidence.examine(kit.request(vendor), evidence.Trusted(), now())


@pytest.fixture(scope="module")
def odd(bench, vendor, tmp_path_factory):
    kit = Kit(bench, tmp_path_factory.mktemp("odd"), [TokenPiece(bench, "rsa2048", "odd numbers")])
    kit.request(vendor)
    return kit


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        *[(PUBLIC_EXPONENT, value) for value in ("00", "01", "02", "04", "010000", "01" + 254 * "00" + "01")],
        *[(MODULUS, value) for value in ("00", "01", "80" + 255 * "00", "80" + 126 * "00" + "01", "ff" * 1024)],
    ],
    ids=lambda value: value[:6] + f"... ({len(value) // 2})" if isinstance(value, str) else f"{value:x}",
)
def test_odd_numbers_for_an_rsa_key_are_an_error_of_ours(vendor, bench, odd, attribute, value):
    """Whatever the module says of the key, the application that enrolls it gets an error that it knows."""
    bench.reader.forge(attribute, bytes.fromhex(value))
    with pytest.raises(HwlicenseError) as caught:
        odd.request(vendor)
    assert caught.value.reason in {"USAGE", "TOKEN_UNSUPPORTED", "EVIDENCE_INVALID"}, caught.value
    assert caught.value.hint
