"""Every command, given files that it does not expect: one clear error, nothing half-written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwlicense.binders.tpm.held import Held
from hwlicense.cli import _run
from hwlicense.cli.commands import root
from hwlicense.core.documents import Approval, License, TpmBinding, VendorPublic
from hwlicense.core.envelope import disassemble
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.schema import SCHEMA, encode
from hwlicense.core.terms import parse_terms
from hwlicense.device.home import Home, read_vendor, verified_by_any
from hwlicense.device.reading import PackageFile
from hwlicense.vendor import approving, evidence, signing
from hwlicense.vendor.folder import Folder
from hwlicense_simulators import Tpm
from tests.forging import flipped, listing, now, rejoined
from tests.world import PROGRAM, TERMS, WITH_PCRS, Device, Vendor, licensed, run

GOLDEN = f'[sha256]\n7 = "{"5a" * 32}"\n'


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A vendor, a device that is licensed, and one good file of every kind."""
    folder = tmp_path_factory.mktemp("shop")
    with Tpm() as tpm:
        vendor = Vendor(folder)
        device = Device(Home(folder / "home"), tpm)
        (folder / "a.hwreq").write_bytes(device.request())
        (folder / "a.hwlic").write_bytes(licensed(vendor, device))
        (folder / "a.hwapp").write_bytes(vendor.approve(device.request()))
        (folder / "terms.toml").write_text(WITH_PCRS)
        (folder / "golden.toml").write_text(GOLDEN)
        (folder / "pin").write_text("2468\n")
        shutil.copy(tpm.ek_root, folder / "root.pem")
        shutil.copy(vendor.folder / "vendor" / "vendor.pub.json", folder / "vendor.pub.json")
        folder.joinpath("out").mkdir()
        device.home.keep_enrolled(tpm.tcti, "sha256:0,7")
        yield folder


@pytest.fixture
def cli(monkeypatch, capsys):
    """The command line in this process: status, and what it wrote."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hwlicense", *map(str, arguments)])
        status = _run(root)
        return status, *capsys.readouterr()

    return call


def clear(status, errors, *, allowed=(1, 2, 4, 5)):
    """One error with its reason and hint, and an exit status that is not an accident's."""
    lines = errors.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["error", "reason", "hint"], errors
    assert "INTERNAL" not in errors
    assert "Traceback" not in errors
    assert status in allowed, errors
    return lines[1].removeprefix("reason: ")


# ---- the wrong file in every place ------------------------------------------------------------------------

ISSUE = {
    "--vendor": "vendor",
    "--request": "a.hwreq",
    "--package": "model.hwpkg",
    "--terms": "terms.toml",
    "--ek-root": "root.pem",
    "--pin-file": "pin",
    "-o": "out/new",
}
COMMANDS = {
    "trust": ["device", "trust", "--home", "out/home", "BAD"],
    "install": ["device", "install", "--home", "home", "BAD"],
    "check": ["device", "check", "--home", "home", "BAD"],
    "open": ["device", "check", "--open", "--home", "home", "BAD"],
    "inspect": ["inspect", "BAD"],
    "inspect --vendor": ["inspect", "--vendor", "BAD", "a.hwlic"],
    "pack": ["vendor", "pack", "--vendor", "BAD", "--name", "n", "--version", "1", "-o", "out/new", "files"],
    "approve --pcrs": ["vendor", "approve", "--vendor", "vendor", "--product", "p", "--pcrs", "BAD", "-o", "out/new"],
    "approve --request": [
        *("vendor", "approve", "--vendor", "vendor", "--product", "p", "--request", "BAD", "--ek-root", "root.pem"),
        *("-o", "out/new"),
    ],
    "status": ["device", "status", "--home", "BAD/home"],
    **{
        f"issue {option}": ["vendor", "issue", *sum(({**ISSUE, option: "BAD"}).items(), ())]
        for option in list(ISSUE)[:-1]
    },
}
RIGHT = {
    "trust": {"vendor.pub.json"},
    "install": {"a.hwlic", "a.hwapp"},
    "check": {"model.hwpkg"},
    "open": {"model.hwpkg"},
    "inspect": {"a.hwreq", "a.hwlic", "a.hwapp", "model.hwpkg", "vendor.pub.json"},
    "inspect --vendor": {"vendor.pub.json"},
    "pack": set(),
    "approve --pcrs": {"golden.toml"},
    "approve --request": {"a.hwreq"},
    "status": set(),
    "issue --vendor": set(),
    "issue --request": {"a.hwreq"},
    "issue --package": {"model.hwpkg"},
    "issue --terms": {"terms.toml"},
    "issue --ek-root": {"root.pem"},
    "issue --pin-file": {"golden.toml", "pin", "root.pem", "terms.toml"},
}
PACKAGES = {"check", "open"}  # of any size
SIGNED = {"a.hwreq", "a.hwlic", "a.hwapp", "model.hwpkg", "vendor.pub.json"}
FILES = [*sorted(SIGNED), "terms.toml", "golden.toml", "root.pem", "pin"]


def given_to(shop, command, path):
    known = {"files", "home", "vendor", "out/new", "out/home", *FILES}
    words = [word.replace("BAD", str(path)) for word in COMMANDS[command]]
    return [shop / word if word in known else word for word in words]


@pytest.mark.parametrize("command", COMMANDS)
def test_one_kind_of_file_in_place_of_another(shop, cli, command):
    before = listing(shop)
    for name in FILES:
        if name not in RIGHT[command]:
            status, _, errors = cli(*given_to(shop, command, shop / name))
            clear(status, errors)
    assert listing(shop) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_are_none(shop, cli, command, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # a sparse tebibyte: refused by its size, never read
    (tmp_path / "nested").write_bytes(b"[" * 1_000_000)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    bad = ["empty", "folder", "fifo", "loop", "huge", "nested", "binary", "absent", "x" * 300, "/dev/zero", "/dev/null"]
    before = listing(shop)
    for name in bad:
        if command == "issue --pin-file" and name in {"fifo", "binary", "huge"}:
            continue  # a pipe is a way to give a PIN, and any bytes are one
        if command == "status" and name in {"folder", "absent"}:
            continue  # a home with nothing in it
        status, _, errors = cli(*given_to(shop, command, tmp_path / name))
        reason = clear(status, errors)
        assert name != "huge" or reason == "DOCUMENT_TOO_LARGE" or COMMANDS[command][-1] != "BAD" or command in PACKAGES
    assert listing(shop) == before


@pytest.mark.parametrize("command", [name for name, files in RIGHT.items() if files & SIGNED])
def test_files_cut_lengthened_or_with_a_bit_changed(shop, cli, command, tmp_path):
    """Through each command. What has no signature (PEM, vendor.pub.json) may survive a changed bit."""
    before = listing(shop)
    for name in sorted(RIGHT[command] & SIGNED):
        raw, bad = (shop / name).read_bytes(), tmp_path / name
        whole = [raw[: len(raw) // 3], raw[:-1], raw[:16], raw + b"\n{}", raw * 2]
        bits = [flipped(raw, place, 1 << place % 7) for place in range(5, len(raw), len(raw) // 9)]
        for content in whole + bits:
            bad.write_bytes(content)
            status, _, errors = cli(*given_to(shop, command, bad))
            harmless = name == "vendor.pub.json" and content in [*bits, raw[:-1]]
            if command == "inspect" or harmless:
                assert "INTERNAL" not in errors
                shutil.rmtree(shop / "out")
                (shop / "out").mkdir()
            else:
                clear(status, errors)
    assert {path: kept for path, kept in listing(shop).items() if "/issued/" not in path} == before


def test_every_file_of_the_vendors_folder_damaged(shop, cli, tmp_path):
    """Packing needs them all but the approvals; each damage is refused before anything is written."""
    shutil.copytree(shop / "vendor", tmp_path / "vendor")
    for path in sorted((tmp_path / "vendor").rglob("*.[jp]*")):
        raw = path.read_bytes()
        for content in (b"", raw[: len(raw) // 2], raw[:-40], b"\xff" * 100, raw + raw):
            path.write_bytes(content)
            where = ("--vendor", tmp_path / "vendor", "-o", tmp_path / "new.hwpkg")
            status, _, errors = cli("vendor", "pack", *where, "--name", "n", "--version", "1", shop / "files")
            clear(status, errors)
            assert not (tmp_path / "new.hwpkg").exists()
        path.write_bytes(raw)


# ---- what decoders must not swallow -----------------------------------------------------------------------


TOKENS = [
    b"null",
    b'"',
    b"{}",
    b"[]",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"\0",
    b"\xff",
    b"1979-05-27T07:32:00Z",
    b"[" * 2000,
]


def readers(shop):
    vendor = Folder(shop / "vendor").public
    pinned = evidence.read_roots((shop / "root.pem").read_bytes(), "virtual")

    def package(raw):
        (shop / "out" / "fuzzed").write_bytes(raw)
        try:
            with PackageFile(shop / "out" / "fuzzed", vendor) as file:
                file.verify()
        finally:
            (shop / "out" / "fuzzed").unlink()

    (held,) = (shop / "home" / "licenses").rglob("held/*")
    licensed, _ = verified_by_any((shop / "a.hwlic").read_bytes(), License, [vendor])
    (binding,) = (binding for binding in licensed.bindings if isinstance(binding, TpmBinding))
    return {
        "a.hwreq": lambda raw: evidence.examine(raw, evidence.Trusted(pinned), now()),
        "a.hwlic": lambda raw: verified_by_any(raw, License, [vendor]),
        "a.hwapp": lambda raw: verified_by_any(raw, Approval, [vendor]),
        "model.hwpkg": package,
        held: lambda raw: Held.read(raw, binding),
        "vendor.pub.json": read_vendor,
        "root.pem": lambda raw: evidence.read_roots(raw, "virtual"),
        "vendor/keys/content.pem": lambda raw: signing.from_pem(raw, None),
        "terms.toml": lambda raw: parse_terms(raw.decode("latin-1")),
        "golden.toml": lambda raw: approving.parse_pcrs(raw.decode("latin-1")),
    }


@pytest.mark.parametrize("which", range(10))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_ends_in_one_of_our_errors(shop, which, data):
    """In-process: bytes changed, cut, repeated, put in, in the files that people send each other or keep."""
    name, read = list(readers(shop).items())[which]
    raw = (shop / name).read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 60)))
    put_in = data.draw(st.one_of(st.binary(max_size=40), st.just(raw[start:end] * 2), st.sampled_from(TOKENS)))
    bad = raw[:start] + put_in + raw[end:]
    signed = name in {"a.hwreq", "a.hwlic", "a.hwapp", "model.hwpkg"}
    try:
        read(bad)
    except HwlicenseError as error:
        ended = error.hint and error.reason != "INTERNAL"
    else:
        ended = not signed or bad == raw
    assert ended


@pytest.mark.parametrize(
    "wrong",
    [
        lambda raw: raw.replace(b'{"payload":', b'{"payload":"","payload":', 1),
        lambda raw: raw.replace(b'"signatures":[', b'"signatures":[],"signatures":[', 1),
        lambda raw: raw.replace(b'{"payload"', b'{"more":1,"payload"', 1),
        lambda raw: raw.replace(b'{"payload"', b'{ "payload"', 1),
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b'{"payload":"', b'{"payload":"\\u0065', 1),
        lambda raw: rejoined(raw, payloadType="application/vnd.hwlicense.manifest+json"),
        lambda raw: rejoined(raw, payload=None),
        lambda raw: rejoined(raw, signatures=[{"keyid": str(i), "sig": ""} for i in range(9)]),
        lambda raw: rejoined(raw, signatures=[{"keyid": "", "sig": ""}] * 2),
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.decode().encode("utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["a.hwreq", "a.hwlic", "a.hwapp"])
def test_envelopes_have_one_encoding(shop, cli, name, wrong, tmp_path):
    bad = tmp_path / name
    bad.write_bytes(wrong((shop / name).read_bytes()))
    status, _, errors = cli("inspect", bad)
    assert clear(status, errors, allowed=(4,)) == "DOCUMENT_MALFORMED"
    with pytest.raises(HwlicenseError):
        dict(readers(shop))[name](bad.read_bytes())


def test_an_absurd_size_is_refused_before_it_is_read():
    with pytest.raises(HwlicenseError, match="larger than") as caught:
        disassemble(b" " * (100 << 20))
    assert caught.value.reason == "DOCUMENT_TOO_LARGE"
    with pytest.raises(HwlicenseError) as caught:
        read_vendor(b" " * (2 << 20))
    assert caught.value.reason == "DOCUMENT_TOO_LARGE"


def test_keys_of_the_wrong_kind_are_no_vendor(shop):
    good = Folder(shop / "vendor").public
    one, two = good.classical, good.ml_dsa_65
    for keys in ((two, one), (one, one), (two, two), (b"", b""), (one[:-1], two), (one, two[:-1])):
        with pytest.raises(HwlicenseError) as caught:
            read_vendor(encode(VendorPublic(SCHEMA, "Other", *keys, good.policy)))
        assert caught.value.reason == "DOCUMENT_MALFORMED"


# ---- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["vendor", "init", "OUT", "--no-passphrase", "--name", "x" * 201],
        ["vendor", "init", "OUT", "--no-passphrase", "--name", "\udcff"],
        ["vendor", "init", "OUT", "--no-passphrase", "--passphrase-file", "pin"],
        ["vendor", "approve", "--vendor", "vendor", "--product", "x" * 201, "--pcrs", "golden.toml", "-o", "OUT"],
        ["vendor", "approve", "--vendor", "vendor", "--product", "\udcff", "--pcrs", "golden.toml", "-o", "OUT"],
        [
            *("vendor", "approve", "--vendor", "vendor", "--product", "x", "--pcrs", "golden.toml", "-o", "OUT"),
            "--generation",
            "4294967296",
        ],
        ["vendor", "pack", "--vendor", "vendor", "--name", "x" * 201, "--version", "1", "-o", "OUT", "files"],
        ["vendor", "pack", "--vendor", "vendor", "--name", "\udcff", "--version", "1", "-o", "OUT", "files"],
        ["device", "enroll", "--home", "home", "--name", "x" * 201, "-o", "OUT"],
        ["device", "enroll", "--home", "home", "--name", "\udcff", "-o", "OUT"],
        ["device", "enroll", "--home", "home", "--tpm", "cmd:touch OUT", "-o", "OUT"],
        ["device", "enroll", "--home", "home", "--tpm", "/evil.so", "-o", "OUT"],
        ["device", "enroll", "--home", "home", "--pcrs", "sha1:7", "-o", "OUT"],
        ["device", "enroll", "--home", "home", "-o", "a.hwreq"],
        ["device", "enroll", "--home", "home", "-o", "absent/a.hwreq"],
        ["device", "enroll", "--home", "home", "-o", "files"],
        ["device", "enroll", "--home", "home", "-o", "/dev/null", "--force"],
        ["vendor", "issue", *sum(({**ISSUE, "-o": "a.hwlic"}).items(), ())],
        ["vendor", "issue", *sum(({**ISSUE, "-o": "absent/a.hwlic"}).items(), ())],
        ["vendor", "issue", *sum(({**ISSUE, "-o": "files"}).items(), ())],
    ],
    ids=lambda arguments: " ".join(arguments[:2]) + " " + arguments[-1][:20],
)
def test_arguments_that_would_make_something_unreadable(shop, cli, arguments):
    """Refused before anything is recorded: no license in issued/, no first approval, no device.json."""
    known = {"vendor", "files", "home", "absent/a.hwreq", "absent/a.hwlic", *FILES}
    before = listing(shop)
    group, *rest = arguments
    words = [shop / w if w in known else w.replace("OUT", str(shop / "out" / "new")) for w in rest]
    status, _, errors = cli(group, *words)
    clear(status, errors, allowed=(2,))
    assert listing(shop) == before


def test_a_number_too_long_for_python_is_not_toml():
    with pytest.raises(HwlicenseError) as caught:
        parse_terms(TERMS + "x = " + "9" * 5000)
    assert caught.value.reason == "TERM_INVALID"


# ---- the real command line --------------------------------------------------------------------------------


def test_the_installed_program_does_the_same(shop, tmp_path):
    (tmp_path / "cut.hwlic").write_bytes((shop / "a.hwlic").read_bytes()[:-100])
    os.mkfifo(tmp_path / "fifo")
    for arguments, status in (
        (("device", "install", "--home", shop / "home", tmp_path / "cut.hwlic"), 4),
        (("device", "check", "--home", shop / "home", tmp_path / "fifo"), 2),
        (("inspect", "/dev/zero"), 2),
        (("device", "status", "--home", "x" * 5000), 5),
    ):
        clear(status, run(*arguments, status=status).stderr)


def test_closed_and_full_streams(shop, tmp_path):
    """A service may start without standard input, and log to a full disk."""
    where = f'"{PROGRAM}" vendor init "{tmp_path / "v"}" <&-'
    done = subprocess.run(["sh", "-c", where], capture_output=True, text=True, check=False)
    assert clear(done.returncode, done.stderr) == "PASSPHRASE_NEEDED"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [PROGRAM, "inspect", shop / "a.hwlic"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert clear(done.returncode, done.stderr) == "STORAGE"


def test_no_option_takes_a_secret_itself():
    """Passphrases and PINs come from prompts, files and descriptors, never from arguments or the environment."""

    def options(command):
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from options(command.get_command(context, name))
        else:
            yield from command.params

    named = {p.name for p in options(root) if any(word in p.name for word in ("pin", "pass", "secret", "key"))}
    allowed = {"pin_file", "token_pin_file", "with_pin", "no_pin", "passphrase_file", "no_passphrase", "recorded_keys"}
    assert named == allowed | {"new_key"}  # which is a choice of algorithms
    assert all(p.envvar is None for p in options(root))
