"""What root can try with a license that is sealed to the TPM: with its own code, other files, other machines."""

import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_SE,
    TPM2B_DIGEST,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PRIVATE,
    TPM2B_SENSITIVE,
    TPML_PCR_SELECTION,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMT_TK_VERIFIED,
    TSS2_Exception,
)
from tpm2_pytss.utils import NVReadEK, create_ek_template

from hwlicense.binders.tpm.held import Held
from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.core.errors import AbsentError, DamagedError, Reason, RefusedError
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.policy import platform_reference
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE, STORAGE_ROOT_TEMPLATE, Public, sealed_public
from hwlicense.core.tpm.wire import sized
from tests.machines import PRODUCT, SELECTION, Machine
from tests.order_desk import OrderDesk, secret

PLAIN = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)


@pytest.fixture(scope="module")
def machine():
    with Machine() as shared:
        yield shared
        assert shared.loaded() == []


@pytest.fixture
def fresh():
    with Machine() as own:
        yield own


def refused(action, *reasons):
    with pytest.raises((RefusedError, DamagedError)) as caught:
        action()
    assert caught.value.reason in reasons, caught.value
    assert caught.value.hint


class Root:
    """Root's own program: the installed object is loaded, nothing of the binder's checks is in the way."""

    def __init__(self, machine, binding, held):
        self.binding, self.held = binding, Held.read(held, binding)
        self._esapi = machine.esapi()

    def __enter__(self):
        self.e = self._esapi.__enter__()
        self.srk, *_ = self.e.create_primary(None, tpm_public(STORAGE_ROOT_TEMPLATE), ESYS_TR.OWNER)
        public = tpm_public(Public.parse(self.binding.public))
        self.sealed = self.e.load(self.srk, TPM2B_PRIVATE(self.held.private), public)
        self.session = self.e.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, PLAIN, TPM2_ALG.SHA256)
        return self

    def __exit__(self, *exception):
        for handle in (self.session, self.sealed, self.srk):
            self.e.flush_context(handle)
        self._esapi.__exit__(*exception)

    def pcr(self, pcrs):
        step = policy.pcr_step(pcrs)
        selection = step.selection.marshal()
        self.e.policy_pcr(self.session, b"", _selection(selection))

    def authorize(self, approved, key, reference, ticket):
        self.e.policy_authorize(
            self.session, approved_policy=approved, key_sign=key, check_ticket=ticket, policy_ref=reference
        )


def _selection(marshalled):
    return TPML_PCR_SELECTION.unmarshal(marshalled)[0]


# ---- changed files ----


@pytest.mark.parametrize("field", ["public", "duplicate", "seed", "storage_credential", "attestation_credential"])
def test_no_byte_of_the_wrapped_parts_may_change(machine, field):
    """Holds: integrity of duplicate and credentials is the TPM's; the public area must be what the policy makes it."""
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT)
    whole = getattr(binding, field)
    parts = [("", whole)] if isinstance(whole, bytes) else [("blob", whole.blob), ("secret", whole.secret)]
    for name, part in parts:
        for at in {*range(0, len(part), 9), 0, 1, len(part) - 1}:
            changed = part[:at] + bytes([part[at] ^ 1]) + part[at + 1 :]
            value = msgspec.structs.replace(whole, **{name: changed}) if name else changed
            forged = msgspec.structs.replace(binding, **{field: value})
            refused(lambda: machine.hardware.install(forged, []), Reason.LICENSE_DAMAGED, Reason.WRONG_DEVICE)  # noqa: B023


def test_another_policy_key_reference_or_a_missing_pin_contradicts_the_sealed_policy(machine):
    """Holds: the license's words about its policy are checked against the policy itself, before the TPM is asked."""
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT, pin=b"2468")
    machine.wire.forget()
    for changes in (
        {"policy_key": OrderDesk().policy_key.raw},
        {"platform": platform_reference(PRODUCT, 2)},
        {"policy_key": None, "platform": None},
        {"policy_key": None},
        {"pin": False},
        {"duplicate": bytes(4000)},
        {"public": sealed_public(bytes(32), bytes(32), pin=True).raw},
    ):
        refused(
            lambda: machine.hardware.install(msgspec.structs.replace(binding, **changes), []),  # noqa: B023
            Reason.LICENSE_DAMAGED,
        )
    assert machine.wire.commands == []


def test_a_share_of_the_home_does_not_help_another_license(machine):
    """Holds: both shares enter the secret; those of another license give another secret."""
    (one, member), (other, _) = (machine.desk.bind(machine.evidence) for _ in range(2))
    mine, foreign = (Held.read(machine.hardware.install(b, []), b) for b in (one, other))
    for field in ("storage_share", "attestation_share"):
        mixed = msgspec.structs.replace(mine, **{field: getattr(foreign, field)})
        assert machine.hardware.unwrap(one, mixed.write(), [], None).secret != member


# ---- root's own program ----


def test_neither_the_empty_password_nor_a_wrong_or_missing_policy_unseals(machine):
    """Holds: no userWithAuth; every part of the policy is asked for by the TPM."""
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT)
    approval = machine.desk.approve(machine.evidence.pcrs)
    held = machine.hardware.install(binding, [approval])
    other = machine.desk.approve(machine.evidence.pcrs, PRODUCT, 2)
    reference, foreign = platform_reference(PRODUCT, 1), platform_reference(PRODUCT, 2)
    key = machine.desk.policy_key.name
    ticket = TPMT_TK_VERIFIED.unmarshal(Held.read(held, binding).tickets[0].ticket)[0]
    empty = TPMT_TK_VERIFIED(tag=0x8022, hierarchy=0x40000001, digest=TPM2B_DIGEST(b""))

    def unseal(root, *steps):
        for step in steps:
            step(root)
        return bytes(root.e.unseal(root.sealed, session1=root.session if steps else ESYS_TR.PASSWORD))

    pcr, command = lambda r: r.pcr(approval.pcrs), lambda r: r.e.policy_command_code(r.session, TPM2_CC.Unseal)
    authorize = lambda r: r.authorize(approval.policy, key, reference, ticket)  # noqa: E731
    for steps in (
        [],  # the empty password
        [command],
        [pcr, command],
        [pcr, authorize],  # without the command code
        [command, pcr, authorize],
        [pcr, authorize, pcr, command],
        [lambda r: r.authorize(approval.policy, key, reference, ticket), command],  # without PolicyPCR
        [pcr, lambda r: r.authorize(approval.policy, key, foreign, ticket), command],  # another reference
        [pcr, lambda r: r.authorize(other.policy, key, foreign, empty), command],  # no ticket
        [pcr, lambda r: r.authorize(approval.policy, OrderDesk().policy_key.name, reference, ticket), command],
        [lambda r: r.e.policy_pcr(r.session, b"", _selection(Selection().marshal())), authorize, command],
    ):
        with Root(machine, binding, held) as root, pytest.raises(TSS2_Exception):
            unseal(root, *steps)
    with Root(machine, binding, held) as root:
        assert len(unseal(root, pcr, authorize, command)) == 32  # the control: this policy is what opens it


def test_the_object_cannot_be_duplicated_nor_its_pin_taken_off(machine):
    """Holds: adminWithPolicy, and a policy that is good for TPM2_Unseal alone."""
    binding, _ = machine.desk.bind(machine.evidence, pin=b"2468")
    held = machine.hardware.install(binding, [])
    for policed in (False, True):
        with Root(machine, binding, held) as root:
            if policed:
                root.e.policy_pcr(root.session, b"", _selection(Selection().marshal()))
                root.e.policy_command_code(root.session, TPM2_CC.Unseal)
            use = root.session if policed else ESYS_TR.PASSWORD
            with pytest.raises(TSS2_Exception):
                root.e.duplicate(
                    root.sealed, ESYS_TR.NULL, b"", TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL), session1=use
                )
            with pytest.raises(TSS2_Exception):
                root.e.object_change_auth(root.sealed, root.srk, b"", session1=use)


def test_importing_the_license_again_does_not_lose_the_pin(machine):
    """Holds: the PIN is inside the wrapped object, and the public area says that it is needed."""
    binding, _ = machine.desk.bind(machine.evidence, pin=b"2468")
    held = machine.hardware.install(binding, [])
    refused(lambda: machine.hardware.unwrap(binding, held, [], lambda _: secret(b"")), Reason.PIN_WRONG)
    with Root(machine, binding, held) as root:
        root.e.policy_pcr(root.session, b"", _selection(Selection().marshal()))
        root.e.policy_command_code(root.session, TPM2_CC.Unseal)
        root.e.policy_auth_value(root.session)
        with pytest.raises(TSS2_Exception):
            root.e.unseal(root.sealed, session1=root.session)


# ---- approvals ----


def test_approvals_of_other_products_generations_and_keys_do_not_open(machine):
    """Holds: one reference per product and generation, signed by the vendor's policy key alone."""
    binding, _ = machine.desk.bind(machine.evidence, PRODUCT, 2)
    pcrs = machine.evidence.pcrs
    held = machine.hardware.install(binding, [])
    good = machine.desk.approve(pcrs, PRODUCT, 2)
    for foreign in (machine.desk.approve(pcrs, PRODUCT, 1), machine.desk.approve(pcrs, "other", 2)):
        refused(lambda: machine.hardware.unwrap(binding, held, [foreign], None), Reason.PLATFORM_UNAPPROVED)  # noqa: B023
        refused(lambda: machine.hardware.admit(binding, held, foreign), Reason.PLATFORM_UNAPPROVED)  # noqa: B023
        renamed = msgspec.structs.replace(foreign, product=PRODUCT, generation=2)
        with pytest.raises(DamagedError) as caught:
            machine.hardware.unwrap(binding, held, [renamed], None)
        assert caught.value.reason == Reason.SIGNATURE_INVALID
    state = msgspec.structs.replace(pcrs[0], value=b"x" * 32)
    for forged in (
        OrderDesk().approve(pcrs, PRODUCT, 2),
        msgspec.structs.replace(good, pcrs=[state, *pcrs[1:]]),
        msgspec.structs.replace(good, signature=good.signature[:-1] + bytes([good.signature[-1] ^ 1])),
    ):
        for action in (machine.hardware.unwrap, machine.hardware.admit):
            with pytest.raises(DamagedError) as caught:
                action(binding, held, *(([forged], None) if action == machine.hardware.unwrap else (forged,)))
            assert caught.value.reason == Reason.SIGNATURE_INVALID


def test_an_approval_of_the_old_state_does_not_open_the_new(fresh):
    """Holds: the TPM compares its own PCRs; the ticket and the signature alone open nothing."""
    approval = fresh.desk.approve(fresh.evidence.pcrs)
    binding, _ = fresh.desk.bind(fresh.evidence, PRODUCT)
    held = fresh.hardware.install(binding, [approval])
    fresh.tpm.reboot(boot=dict(fresh.tpm.boot) | {4: b"another boot loader"})
    refused(lambda: fresh.hardware.unwrap(binding, held, [approval], None), Reason.PCR_MISMATCH)
    ticket = TPMT_TK_VERIFIED.unmarshal(Held.read(held, binding).tickets[0].ticket)[0]
    with Root(fresh, binding, held) as root:
        root.pcr(approval.pcrs)
        with pytest.raises(TSS2_Exception):
            root.authorize(approval.policy, fresh.desk.policy_key.name, platform_reference(PRODUCT, 1), ticket)


# ---- other TPMs ----


def test_after_tpm2_clear_nothing_opens_and_nothing_can_be_imported_again(fresh):
    """Holds: wrapped to the storage root key, whose seed Clear destroys; so a reset clock brings no license back."""
    approval = fresh.desk.approve(fresh.evidence.pcrs)
    binding, _ = fresh.desk.bind(fresh.evidence, PRODUCT)
    held = fresh.hardware.install(binding, [approval])
    fresh.tpm.clear()
    refused(lambda: fresh.hardware.unwrap(binding, held, [approval], None), Reason.WRONG_DEVICE)
    refused(lambda: fresh.hardware.install(binding, [approval]), Reason.WRONG_DEVICE)
    with pytest.raises(AbsentError):
        fresh.hardware.present(binding, held)
    with fresh.esapi() as esapi:  # root, past the binder's own check of the name
        srk, *_ = esapi.create_primary(None, tpm_public(STORAGE_ROOT_TEMPLATE), ESYS_TR.OWNER)
        public, none = tpm_public(Public.parse(binding.public)), TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
        duplicate, seed = TPM2B_PRIVATE(binding.duplicate), TPM2B_ENCRYPTED_SECRET(binding.seed)
        with pytest.raises(TSS2_Exception):
            esapi.import_(srk, b"", public, duplicate, seed, none)
        with pytest.raises(TSS2_Exception):
            esapi.load(srk, TPM2B_PRIVATE(Held.read(held, binding).private), public)


@pytest.mark.parametrize(
    "borrowed",
    [{"storage_root_key"}, {"attestation_key"}, {"endorsement_keys"}, {"storage_root_key", "attestation_key"}],
)
def test_keys_of_two_tpms_make_a_license_that_opens_on_neither(machine, fresh, borrowed):
    """Holds: the shares are for one EK, and name the storage root key and the attestation key beside it."""
    theirs = {field: getattr(fresh.evidence, field) for field in borrowed}
    binding, _ = machine.desk.bind(msgspec.structs.replace(machine.evidence, **theirs))
    for hardware in (machine.hardware, fresh.hardware):
        refused(lambda: hardware.install(binding, []), Reason.WRONG_DEVICE, Reason.LICENSE_DAMAGED)  # noqa: B023


def software_key(template):
    key = ec.generate_private_key(ec.SECP256R1())
    point = key.public_key().public_numbers()
    unique = point.x.to_bytes(32, "big"), point.y.to_bytes(32, "big")
    public = Public(  # a public area that lies about where it was born
        template.type,
        template.name_algorithm,
        template.attributes,
        b"",
        unique,
        template.symmetric_bits,
        template.scheme,
        template.bits,
    )
    return key, public


@pytest.mark.parametrize("field", ["storage_root_key", "attestation_key"])
def test_a_key_made_in_software_never_gets_its_share(machine, field):
    """Holds: no TPM loads a key that lies about fixedTPM, and without the loaded key the EK gives nothing out."""
    template = STORAGE_ROOT_TEMPLATE if field == "storage_root_key" else ATTESTATION_TEMPLATE
    key, public = software_key(template)
    evidence = msgspec.structs.replace(machine.evidence, **{field: public.raw})
    ek = next(i for i, k in enumerate(evidence.endorsement_keys) if len(k.public) < 200)  # with userWithAuth
    binding, _ = machine.desk.bind(evidence, ek=ek)
    refused(lambda: machine.hardware.install(binding, []), Reason.WRONG_DEVICE, Reason.LICENSE_DAMAGED)
    credential = binding.storage_credential if field == "storage_root_key" else binding.attestation_credential
    blob, seed = TPM2B_ID_OBJECT(credential=credential.blob), TPM2B_ENCRYPTED_SECRET(credential.secret)
    private = key.private_numbers().private_value.to_bytes(32, "big")
    sensitive = TPM2B_SENSITIVE.unmarshal(sized(b"\0\x23" + sized(b"") + sized(os.urandom(32)) + sized(private)))[0]
    template = Public.parse(evidence.endorsement_keys[ek].public)
    with machine.esapi() as esapi:
        area = create_ek_template("H-3", NVReadEK(esapi))[1]
        endorsement, made, *_ = esapi.create_primary(None, area, ESYS_TR.ENDORSEMENT)
        assert made.marshal()[2:] == template.raw
        with pytest.raises(TSS2_Exception):
            esapi.load_external(tpm_public(public), sensitive, ESYS_TR.NULL)
        alone = esapi.load_external(tpm_public(public), None, ESYS_TR.OWNER)
        with pytest.raises(TSS2_Exception):
            esapi.activate_credential(alone, endorsement, blob, seed)
        esapi.flush_context(alone)
        esapi.flush_context(endorsement)


def test_a_quote_of_another_tpm_or_another_state_is_not_sent(machine, fresh):
    """Holds: the binder quotes with this TPM's own key, and checks its quote against what the request says."""
    pcrs = fresh.hardware.describe(SELECTION).pcrs
    other = msgspec.structs.replace(
        machine.evidence, pcrs=[msgspec.structs.replace(pcrs[0], value=b"x" * 32), *pcrs[1:]]
    )
    with pytest.raises(DamagedError) as caught:
        machine.hardware.prove(other, b"a request")
    assert caught.value.reason == Reason.QUOTE_INVALID
