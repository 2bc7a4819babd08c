"""Taking a license in: its sealed value, both shares, and the TPM's word on the vendor's approvals."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PRIVATE,
    TPMA_SESSION,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF_OBJECT,
    TSS2_Exception,
)
from tpm2_pytss._libtpm2_pytss import ffi

from hwlicense.binders.tpm import keys
from hwlicense.binders.tpm.failures import NOT_UNWRAPPED, code
from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.secret import Secret
from hwlicense.core.tpm.structures import Attributes, Public

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.binders.tpm.sealed import Sealed
    from hwlicense.core.documents import Credential


def import_sealed(work: Work, root: ESYS_TR, sealed: Sealed) -> bytes:
    """The sealed object as this TPM alone can load it: TPM2B_PRIVATE without its size. Raises DamagedError."""
    session = work.session(root, TPM2_SE.HMAC, TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT)
    duplicate, seed = TPM2B_PRIVATE(sealed.binding.duplicate), TPM2B_ENCRYPTED_SECRET(sealed.binding.seed)
    no_inner_wrap, public = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL), keys.tpm_public(sealed.public)
    try:
        private = work.call("import_", root, b"", public, duplicate, seed, no_inner_wrap, session2=session)
    except TSS2_Exception as error:
        if code(error) not in NOT_UNWRAPPED:
            raise
        what = "The TPM rejects the sealed part of the license: it was changed, or made for another key."
        raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.") from error
    work.ended(session)
    return bytes(private)


def activate(work: Work, root: ESYS_TR, sealed: Sealed) -> tuple[Secret, Secret]:
    """Both shares, which this TPM's endorsement key gives out only beside the very keys that the license names.

    Raises RefusedError WRONG_DEVICE.
    """
    binding = sealed.binding
    seed_size = len(binding.storage_credential.secret)
    endorsement, public = keys.endorsement_key(work, binding.endorsement_key, seed_size)
    storage_share = _share(work, root, root, endorsement, public, binding.storage_credential)
    attestation, attestation_public = keys.attestation_key(work)
    if attestation_public.name != binding.attestation_key:
        raise keys.wrong_device("its attestation key is not this one's")
    attestation_share = _share(work, root, attestation, endorsement, public, binding.attestation_credential)
    work.flush(attestation, endorsement)
    return storage_share, attestation_share


def _share(
    work: Work, root: ESYS_TR, key: ESYS_TR, endorsement: ESYS_TR, public: Public, credential: Credential
) -> Secret:
    answer = work.session(root, TPM2_SE.HMAC, TPMA_SESSION.ENCRYPT)  # the share comes back encrypted to the pinned key
    use = ESYS_TR.PASSWORD
    if not public.attributes & Attributes.USER_WITH_AUTH:  # low-range keys: by policy alone
        use = work.session(root, TPM2_SE.POLICY, TPMA_SESSION(0), public.name_algorithm)
        work.call("policy_secret", ESYS_TR.ENDORSEMENT, use, expiration=0)
    blob, seed = TPM2B_ID_OBJECT(credential=credential.blob), TPM2B_ENCRYPTED_SECRET(credential.secret)
    try:
        share = work.call("activate_credential", key, endorsement, blob, seed, session2=use, session3=answer)
    except TSS2_Exception as error:
        if code(error) not in NOT_UNWRAPPED:
            raise
        raise keys.wrong_device("its endorsement key does not open what the vendor wrapped for it") from error
    work.ended(answer)
    work.ended(use)
    return taken(share)


def ticket(work: Work, key: Public, policy: bytes, reference: bytes, signature: bytes) -> bytes:
    """TPMT_TK_VERIFIED for a policy whose signature has been found good: what PolicyAuthorize asks for."""
    # In the owner hierarchy: a ticket of the null hierarchy satisfies no PolicyAuthorize.
    loaded = work.call("load_external", keys.tpm_public(key), None, ESYS_TR.OWNER)
    signed, _ = TPMT_SIGNATURE.unmarshal(signature)
    verified = work.call("verify_signature", loaded, hashlib.sha256(policy + reference).digest(), signed)
    work.flush(loaded)
    return bytes(verified.marshal())


def taken(buffer: Any) -> Secret:  # noqa: ANN401 - any TPM2B of the library, which has no types
    """A TPM2B's content, moved: the library's copy is overwritten, which bytes() would leave."""
    area = buffer._cdata  # noqa: SLF001
    content = ffi.buffer(area.buffer, area.size)
    secret = Secret(bytearray(content))
    content[:] = bytes(len(content))
    return secret
