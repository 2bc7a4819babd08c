"""Wrapping without a TPM, against swtpm, tpm2-tools and tpm2-pytss, which are other hands' work."""

import hashlib
import os
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss import TPM2B_PRIVATE, TPM2B_PUBLIC, TPM2B_SENSITIVE, TPMT_SENSITIVE
from tpm2_pytss.utils import unwrap

from hwlicense.core.secret import Secret
from hwlicense.core.tpm import duplicate, policy
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.structures import STORAGE_ROOT_TEMPLATE, Attributes, Public
from hwlicense.core.tpm.wire import Algorithm, sized
from hwlicense_simulators import Tpm
from tests.order_desk import secret


@pytest.fixture(scope="module")
def tpm():
    with Tpm(banks=("sha256", "sha384")) as machine:
        yield machine


@pytest.fixture
def tools(tpm, tmp_path):
    def run(command, *more):
        """tpm2-tools, with nothing left in the TPM's three slots afterwards."""
        command = [*command.split(), *more]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | tpm.environment, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        subprocess.run(["tpm2_flushcontext", "-t"], env=os.environ | tpm.environment, check=True)
        return done.stdout

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


def public_of(path):
    area = path.read_bytes()
    assert int.from_bytes(area[:2], "big") == len(area) - 2
    return Public.parse(area[2:])


PARENTS = {
    "P-256, AES-128, SHA-256": ("-G", "ecc256:null:aes128cfb", "-g", "sha256"),
    "P-384, AES-256, SHA-384": ("-G", "ecc384:null:aes256cfb", "-g", "sha384"),
    "P-384, AES-128, SHA-256": ("-G", "ecc384:null:aes128cfb", "-g", "sha256"),
    "P-256, AES-256, SHA-384": ("-G", "ecc256:null:aes256cfb", "-g", "sha384"),
    "RSA-2048, AES-128, SHA-256": ("-G", "rsa2048:null:aes128cfb", "-g", "sha256"),
    "RSA-2048, AES-256, SHA-384": ("-G", "rsa2048:null:aes256cfb", "-g", "sha384"),
}


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
@pytest.mark.parametrize("pin", [None, b"2468"], ids=["no PIN", "PIN"])
def test_tpm2_tools_import_load_and_unseal_what_is_sealed_here(tools, parent, pin):
    tools("tpm2_createprimary -C o -c parent.ctx", *parent)
    tools("tpm2_readpublic -c parent.ctx -o parent.pub -n parent.name")
    public = public_of(tools.folder / "parent.pub")
    assert public.name == (tools.folder / "parent.name").read_bytes()
    steps: list[policy.Step] = [policy.PolicyCommandCode(policy.UNSEAL), *([policy.PolicyAuthValue()] if pin else [])]
    value = secret(b"thirty-two bytes for the license")
    sealed = duplicate.seal(public, policy.digest(steps), value, secret(pin) if pin else None)
    (tools.folder / "public").write_bytes(sized(sealed.public))
    (tools.folder / "duplicate").write_bytes(sized(sealed.duplicate))
    (tools.folder / "seed").write_bytes(sized(sealed.seed))
    tools("tpm2_import -C parent.ctx -u public -i duplicate -s seed -r private")
    tools("tpm2_load -C parent.ctx -u public -r private -c sealed.ctx -n name")
    assert (tools.folder / "name").read_bytes() == Public.parse(sealed.public).name
    tools("tpm2_startauthsession --policy-session -S session")
    tools("tpm2_policycommandcode -S session TPM2_CC_Unseal")
    auth = "session:session"
    if pin:
        tools("tpm2_policyauthvalue -S session")
        auth += "+hex:" + duplicate.pin_value(secret(pin)).buffer.hex()
    assert tools("tpm2_unseal -c sealed.ctx -p", auth) == bytes(value.buffer)
    tools("tpm2_flushcontext session")


@pytest.mark.parametrize("kind", ["rsa", "ecc"])
def test_tpm2_tools_activate_what_is_made_here(tools, kind):
    tools("tpm2_createek -c ek.ctx -u ek.pub -f tss -G", kind)
    tools("tpm2_createak -C ek.ctx -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub -n ak.name")
    tools("tpm2_readpublic -c ek.ctx -o ek.pub")
    endorsement_key = public_of(tools.folder / "ek.pub")
    share = b"a share of the license secret..."
    credential = duplicate.make_credential(endorsement_key, (tools.folder / "ak.name").read_bytes(), secret(share))
    header = bytes.fromhex("badcc0de00000001")  # of tpm2-tools
    (tools.folder / "credential").write_bytes(header + sized(credential.blob) + sized(credential.secret))
    tools("tpm2_startauthsession --policy-session -S session")
    tools("tpm2_policysecret -S session -c e")
    activate = "tpm2_activatecredential -c ak.ctx -C ek.ctx -i credential -o share -P session:session"
    tools(*activate.split())
    assert (tools.folder / "share").read_bytes() == share


def test_tpm2_tools_compute_the_same_policies(tools):
    tools("tpm2_pcrread sha256:4,7+sha384:7 -o values")
    selection = Selection.parse("sha256:4,7+sha384:7")
    values = (tools.folder / "values").read_bytes()
    digest = subprocess.run(["sha256sum"], input=values, capture_output=True, check=True).stdout.split()[0].decode()
    tools("tpm2_createpolicy --policy-pcr -l sha256:4,7+sha384:7 -L policy")
    expected = policy.digest([policy.PolicyPCR(selection, bytes.fromhex(digest))])
    assert (tools.folder / "policy").read_bytes() == expected


# ---- against tpm2-pytss, without a TPM ----

KEYS = {
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "RSA": rsa.generate_private_key(65537, 2048),
}


def parent_of(key, hash_, aes):
    attributes = STORAGE_ROOT_TEMPLATE.attributes
    if isinstance(key, rsa.RSAPrivateKey):
        modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
        return Public(Algorithm.RSA, hash_, attributes, b"", (modulus,), aes, None, 2048)
    point, size = key.public_key().public_numbers(), key.key_size // 8
    unique = point.x.to_bytes(size, "big"), point.y.to_bytes(size, "big")
    return Public(Algorithm.ECC, hash_, attributes, b"", unique, aes, None, key.key_size)


def private_of(key):
    if isinstance(key, rsa.RSAPrivateKey):
        return Algorithm.RSA, key.private_numbers().p.to_bytes(128, "big")
    return Algorithm.ECC, key.private_numbers().private_value.to_bytes(key.key_size // 8, "big")


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(KEYS)),
    st.sampled_from([Algorithm.SHA256, Algorithm.SHA384]),
    st.sampled_from([128, 256]),
    st.binary(min_size=1, max_size=128),
    st.none() | st.binary(min_size=1, max_size=40),
)
def test_tpm2_pytss_unwraps_what_is_sealed_here(name, hash_, aes, value, pin):
    key = KEYS[name]
    parent = parent_of(key, hash_, aes)
    sealed = duplicate.seal(parent, b"p" * 32, secret(value), None if pin is None else secret(pin))
    kind, number = private_of(key)
    private = TPM2B_SENSITIVE.unmarshal(sized(kind.to_bytes(2, "big") + sized(b"") + sized(b"") + sized(number)))[0]
    opened = unwrap(
        TPM2B_PUBLIC.unmarshal(sized(parent.raw))[0].publicArea,
        private.sensitiveArea,
        TPM2B_PUBLIC.unmarshal(sized(sealed.public))[0],
        TPM2B_PRIVATE(sealed.duplicate),
        sealed.seed,
    )
    area: TPMT_SENSITIVE = opened.sensitiveArea
    assert bytes(area.sensitive.bits) == value
    expected = b"" if pin is None else bytes(duplicate.pin_value(secret(pin)).buffer)
    assert bytes(area.authValue) == expected
    public = Public.parse(sealed.public)
    assert public.unique[0] == hashlib.sha256(bytes(area.seedValue) + value).digest()


def test_wrapping_is_never_the_same_twice():
    parent = parent_of(KEYS["P-256"], Algorithm.SHA256, 128)
    one, other = (duplicate.seal(parent, b"p" * 32, secret(b"v" * 32), None) for _ in range(2))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_a_pin_value_ends_in_no_zero_byte():
    """TPMs drop trailing zeros of an authValue; a PIN whose value has some must still open."""
    values = [duplicate.pin_value(secret(b"%d" % i)).buffer for i in range(2000)]
    assert not any(value.endswith(b"\0") for value in values)
    assert {len(value) for value in values} >= {31, 32}


def test_every_part_enters_the_member_secret():
    parts = [Secret(bytearray([i] * 32)) for i in range(3)]
    secrets = {bytes(duplicate.member_secret(*parts).buffer)}
    for i in range(3):
        changed = [secret(b"x" * 32) if i == j else part for j, part in enumerate(parts)]
        secrets.add(bytes(duplicate.member_secret(*changed).buffer))
    secrets.add(bytes(duplicate.member_secret(*reversed(parts)).buffer))
    assert len(secrets) == 5
    assert (
        Attributes.USER_WITH_AUTH
        not in Public.parse(
            duplicate.seal(parent_of(KEYS["P-256"], Algorithm.SHA256, 128), b"p" * 32, parts[0], None).public
        ).attributes
    )
