"""The TPM's own keys, found or made again from their templates, and its PCRs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESYS_TR, TPM2_CAP, TPM2_RC, TPM2B_PUBLIC, TPML_PCR_SELECTION, TSS2_Exception

from hwlicense.binders.tpm.failures import code
from hwlicense.core.documents import EndorsementKey, Pcr
from hwlicense.core.errors import DamagedError, HardwareError, Reason, RefusedError
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.structures import ATTESTATION_TEMPLATE, STORAGE_ROOT_TEMPLATE, Public, check_storage_root_key
from hwlicense.core.tpm.wire import Algorithm, sized

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work

STORAGE_ROOT_HANDLE: Final = 0x81000001
CERTIFICATES: Final = {
    0x01C0000A: "EK-ECC256",  # first, because an ECC key is made in a fraction of the time
    0x01C00002: "EK-RSA2048",
    0x01C00014: "H-2",
    0x01C00016: "H-3",
    0x01C00012: "H-1",
    0x01C0001C: "H-6",
    0x01C0001E: "H-7",
}
"""NV indices of EK certificates and the templates of their keys (TCG EK Credential Profile 2.5, 2.2.1.4 and B.3, B.4).

H-4 (P-521) and H-5 (SM2) are left out: every TPM that has them has one of the others, too.
"""

_UNKNOWN_KIND: Final = frozenset(
    {TPM2_RC.ASYMMETRIC, TPM2_RC.CURVE, TPM2_RC.HASH, TPM2_RC.KEY_SIZE, TPM2_RC.SYMMETRIC, TPM2_RC.TYPE, TPM2_RC.VALUE}
)
_LARGEST_CERTIFICATE: Final = 4096
_NV_CHUNK: Final = 512  # every TPM reads that much at once


def tpm_public(public: Public) -> TPM2B_PUBLIC:
    """The same public area for the library."""
    return TPM2B_PUBLIC.unmarshal(sized(public.raw))[0]


def wrong_device(why: str) -> RefusedError:
    """The error for a license that another TPM was meant by."""
    hint = "Enroll this device and ask the vendor for a license for it."
    return RefusedError(Reason.WRONG_DEVICE, f"This license was issued for another TPM: {why}.", hint)


# ---- storage root key and attestation key ----------------------------------------------------------------


def storage_root_key(work: Work, name: bytes | None = None) -> tuple[ESYS_TR, Public, int | None]:
    """The persistent key where one is usable (and has `name`), else the template's; its handle if it is persistent.

    Raises RefusedError WRONG_DEVICE where neither has `name`.
    """
    persistent = persistent_storage_root_key(work)
    if persistent is not None and name in (None, persistent.name):
        return work.known(STORAGE_ROOT_HANDLE, persistent), persistent, STORAGE_ROOT_HANDLE
    return *template_storage_root_key(work, name), None


def template_storage_root_key(work: Work, name: bytes | None) -> tuple[ESYS_TR, Public]:
    """Made anew: the same key until TPM2_Clear. Raises RefusedError WRONG_DEVICE where it has another `name`."""
    handle, public = work.primary(ESYS_TR.OWNER, tpm_public(STORAGE_ROOT_TEMPLATE))
    if name not in (None, public.name):
        raise wrong_device("its storage root key is not this one's, or this one was cleared since")
    return handle, public


def persistent_storage_root_key(work: Work) -> Public | None:
    """The key that an operating system has made persistent at the usual handle, if it is fit for use."""
    try:
        key = work.borrow(work.call("tr_from_tpmpublic", STORAGE_ROOT_HANDLE))
        area, *_ = work.call("read_public", key)
    except TSS2_Exception as error:
        if code(error) == TPM2_RC.HANDLE:
            return None
        raise
    try:
        public = Public.parse(area.marshal()[2:])
        check_storage_root_key(public)
    except DamagedError:  # some other key lives there, which is no fault of the device
        return None
    return public


def attestation_key(work: Work) -> tuple[ESYS_TR, Public]:
    """Made anew from its template: the same key as long as the endorsement seed lives."""
    return work.primary(ESYS_TR.ENDORSEMENT, tpm_public(ATTESTATION_TEMPLATE))


# ---- endorsement keys ------------------------------------------------------------------------------------


def certificate_indices(work: Work) -> list[int]:
    """Where this TPM keeps EK certificates, the quicker kinds of key first."""
    defined = _Nv(work).defined
    return [index for index in CERTIFICATES if index in defined]


def endorsement_keys(work: Work) -> list[EndorsementKey]:
    """Those with a certificate in the TPM; where there is none, as on many firmware TPMs, the two common ones."""
    nv, keys = _Nv(work), []
    for template in [CERTIFICATES[index] for index in certificate_indices(work)] or ("EK-ECC256", "EK-RSA2048"):
        certificate, area = _template(template, nv)
        made = _make(work, area)
        if made is not None:
            work.flush(made[0])
            usual = certificate is not None and len(certificate) <= _LARGEST_CERTIFICATE
            keys.append(EndorsementKey(made[1].raw, certificate if usual else None))
    if not keys:
        raise HardwareError(Reason.TPM_UNSUPPORTED, "The TPM makes no endorsement key of a usual kind.")
    return keys


def endorsement_key(work: Work, name: bytes, seed_size: int) -> tuple[ESYS_TR, Public]:
    """The endorsement key with `name`. `seed_size`, of a credential's encrypted seed, spares most of the search.

    Raises RefusedError WRONG_DEVICE where this TPM makes none with that name.
    """
    nv = _Nv(work, certificates=False)
    for template in CERTIFICATES.values():
        _, area = _template(template, nv)
        kind = Public.parse(area.marshal()[2:])
        size = kind.bits // 8 if kind.type == Algorithm.RSA else 2 * (2 + kind.bits // 8)
        if size != seed_size or sized(kind.name)[:4] != sized(name)[:4]:
            continue
        made = _make(work, area)
        if made is not None and made[1].name == name:
            return made
        if made is not None:
            work.flush(made[0])
    raise wrong_device("its endorsement key is not this one's")


def _template(name: str, nv: _Nv) -> tuple[bytes | None, TPM2B_PUBLIC]:
    from tpm2_pytss.utils import create_ek_template  # noqa: PLC0415  # no opening needs it, and it builds all templates

    made: tuple[bytes | None, TPM2B_PUBLIC] = create_ek_template(name, nv)
    return made


def _make(work: Work, area: TPM2B_PUBLIC) -> tuple[ESYS_TR, Public] | None:
    """The key of a template; None where the TPM does not know its algorithms."""
    try:
        return work.primary(ESYS_TR.ENDORSEMENT, area)
    except TSS2_Exception as error:
        if code(error) in _UNKNOWN_KIND:
            return None
        raise


class _Nv:
    """Reads NV indices that the TPM's manufacturer has written, for `create_ek_template`."""

    def __init__(self, work: Work, *, certificates: bool = True) -> None:
        self._work, self._certificates = work, certificates
        _, capability = work.call("get_capability", TPM2_CAP.HANDLES, min(CERTIFICATES), 254)
        self.defined = frozenset(map(int, capability.data.handles))

    def __call__(self, index: int) -> bytes:
        if index in CERTIFICATES and not self._certificates:
            return b""
        if index not in self.defined:
            from tpm2_pytss.utils import NoSuchIndex  # noqa: PLC0415  # as above

            raise NoSuchIndex(index)
        handle = self._work.borrow(self._work.call("tr_from_tpmpublic", index))
        public, _ = self._work.call("nv_read_public", handle)
        content, size = b"", int(public.nvPublic.dataSize)
        while len(content) < size:
            chunk = min(size - len(content), _NV_CHUNK)
            content += bytes(self._work.call("nv_read", handle, chunk, len(content)))
        return content


# ---- PCRs ------------------------------------------------------------------------------------------------


def read_pcrs(work: Work, selection: Selection) -> list[Pcr]:
    """The present values, in the selection's order. Nothing vouches for them: quotes and policies do that.

    Raises RefusedError PCR_UNUSABLE for a PCR of a bank that the TPM does not keep.
    """
    pcrs: list[Pcr] = []
    for bank, index in selection:  # one at a time: a TPM gives out as many as it likes, eight at the most
        _, _, values = work.call("pcr_read", tpm_selection(Selection(((bank, (index,)),))))
        if len(values) != 1:
            raise RefusedError(
                Reason.PCR_UNUSABLE,
                f"The TPM keeps no {bank} bank, so it has no PCR {index} ({bank}).",
                "Use another bank, or let the firmware activate this one.",
            )
        pcrs.append(Pcr(bank, index, bytes(values[0])))  # type: ignore[arg-type]  # Selection has checked the bank
    return pcrs


def tpm_selection(selection: Selection) -> TPML_PCR_SELECTION:
    """The same selection for the library."""
    return TPML_PCR_SELECTION.unmarshal(selection.marshal())[0]
