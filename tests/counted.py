"""A customer whose license a TPM counts: product and root's own programs reach one TPM over one wire."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_EO,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_SENSITIVE_CREATE,
    TPMA_SESSION,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TSS2_Exception,
)

from hwlicense.binders.tpm.held import Held
from hwlicense.binders.tpm.keys import tpm_public
from hwlicense.binders.tpm.sealed import Sealed
from hwlicense.core.documents import License
from hwlicense.core.envelope import unverified
from hwlicense.core.errors import HwlicenseError
from hwlicense.core.terms import parse_terms
from hwlicense.core.tpm import policy
from hwlicense.core.tpm.structures import STORAGE_ROOT_TEMPLATE
from hwlicense.core.tpm.wire import sized
from hwlicense.device.home import Home
from hwlicense.vendor import evidence, issuing, revising
from hwlicense.vendor.basis import packaged, recorded
from tests.forging import now
from tests.world import NOW, WITH_PCRS, Device, Vendor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hwlicense.core.documents import TpmBinding, TpmIndex
    from hwlicense.core.hardware import Counted
    from hwlicense.core.secret import Secret
    from hwlicense.core.tpm.composing import Conditions
    from hwlicense.core.tpm.nv import NvPublic
    from hwlicense_simulators import Tpm, Wire

PLAIN = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
NV = {0x122: "NV_UndefineSpace", 0x12A: "NV_DefineSpace", 0x134: "NV_Increment", 0x137: "NV_Write"}
"""The commands that change NV, by TPM_CC."""


def limited(opens: int = 2, *, hours: int = 0, extra: str = "", require: str = "") -> str:
    """Terms with PCRs and limits that the TPM holds."""
    limits = (f"opens = {opens}\n" if opens else "") + (f"powered_on_hours = {hours}\n" if hours else "")
    return f"{WITH_PCRS}{require}[limits]\n{limits}{extra}"


class Behind(NamedTuple):
    """What a device is told of its TPM, the wire in between."""

    tcti: str
    ek_root: Path


class Customer:
    """A device with a home, and the vendor's folder of what was sold to it."""

    def __init__(self, vendor: Vendor, folder: Path, tpm: Tpm, wire: Wire) -> None:
        self.vendor, self.tpm, self.wire, self.folder = vendor, tpm, wire, folder
        self.device = Device(Home(folder / "home"), Behind(wire.tcti, tpm.ek_root))  # type: ignore[arg-type]
        self.files: list[bytes] = []

    # ---- the vendor's half

    def issue(self, terms: str, pin: Secret | None = None, request: bytes | None = None) -> bytes:
        """A new license, not yet installed."""
        trusted = evidence.Trusted(evidence.read_roots(self.tpm.ek_root.read_bytes(), "virtual"))
        self.parts = evidence.examine(request or self.device.request(counted=True), trusted, now()).parts
        return self._kept(terms, self.parts, self.packages, pin=pin)

    @property
    def packages(self) -> Any:
        return [packaged(self.vendor.manifest)]

    def revise(self, terms: str, pin: Secret | None = None) -> bytes:
        """The revision after the last one, not yet installed."""
        place = self.vendor.place
        old = place.issued(self.files[-1])
        source = revising.sources(old, place.basis(old), [], [])
        revised = {"license_id": old.grant.license, "revision": old.grant.revision + 1, "since": source.since}
        return self._kept(terms, source.parts, source.packages, pin=pin, **revised)

    def _kept(self, terms: str, parts: Any, packages: Any, pin: Secret | None, **revised: Any) -> bytes:
        agreed, place = parse_terms(terms), self.vendor.place
        known = place.approvals(agreed.product)
        made = issuing.make(
            self.vendor.public, self.vendor.keys, parts, packages, agreed, known, today=NOW.date(), pin=pin, **revised
        )
        if made.approval:
            place.keep_approval(*made.approval)
        place.keep_license(made.license, made.raw, recorded(made.license, parts, packages, revised.get("since", 1)))
        self.files.append(made.raw)
        return made.raw

    # ---- the device's half

    def sell(self, terms: str, pin: Secret | None = None) -> Self:
        """Issue and install."""
        self.install(self.issue(terms, pin))
        return self

    def install(self, raw: bytes) -> None:
        self.device.install(raw, self.vendor)

    def open(self, **options: Any) -> None:
        self.device.open(self.vendor, **options).close()

    def drain(self, most: int = 99, device: Device | None = None) -> int:
        """How often it still opens."""
        opened = 0
        with suppress(HwlicenseError):
            while opened < most:
                (device or self.device).open(self.vendor).close()
                opened += 1
        return opened

    @property
    def license(self) -> License:
        (installed,), _ = self.device.home.licenses([self.vendor.public])
        return installed.license

    @property
    def binding(self) -> TpmBinding:
        (binding,) = self.license.bindings
        return binding  # type: ignore[return-value]

    @property
    def use(self) -> Counted:
        licensed, binding = self.license, self.binding
        with self.device.connect() as hardware:
            return hardware.use(binding, self.device.home.held(licensed, binding))

    @property
    def opens(self) -> int | None:
        """What the TPM says is spent."""
        return self.use.opens

    def loaded(self) -> list[int]:
        """Handles of objects and sessions that are in the TPM now."""
        with ESAPI(self.wire.tcti) as esapi:
            return [h for first in (0x80000000, 0x02000000, 0x03000000) for h in handles(esapi, first)]

    def flush(self, left: list[int]) -> None:
        with ESAPI(self.wire.tcti) as esapi:
            for handle in left:
                esapi.flush_context(esapi.tr_from_tpmpublic(handle))

    def indexes(self) -> list[int]:
        """NV handles that are defined."""
        with ESAPI(self.wire.tcti) as esapi:
            return handles(esapi, 0x01000000)

    @contextmanager
    def root(self, raw: bytes | None = None, pin: bytes = b"") -> Iterator[Root]:
        """Root's own program for the license that is installed, or for one in a file that was installed before."""
        licensed = unverified(raw, License)[0] if raw else self.license
        with ESAPI(self.wire.tcti) as esapi:
            root = Root(esapi, self, licensed, pin)
            try:
                yield root
            finally:
                root.close()


def handles(esapi: ESAPI, first: int) -> list[int]:
    found: list[int] = []
    more: Any = True
    while more:
        more, capability = esapi.get_capability(TPM2_CAP.HANDLES, found[-1] + 1 if found else first, 254)
        found += map(int, capability.data.handles)
    return found


class Root:
    """Everything that the home holds, and nothing of the binder's checks in the way."""

    def __init__(self, esapi: ESAPI, customer: Customer, licensed: License, pin: bytes) -> None:
        self.e, self.pin, self.expecting, self.hierarchy = esapi, pin, False, ESYS_TR.OWNER
        binding: Any = licensed.bindings[0]
        self.binding = binding
        self.approvals = customer.device.home.approvals(licensed, customer.vendor.public)
        self.sealed = Sealed.check(binding, self.approvals)
        self._home = customer.device.home
        self.auth = b""
        if self.binding.counter:
            self.auth = (self._home.path / "counters" / f"{self.binding.counter.handle:08x}").read_bytes()
        self._licensed, self._live = licensed, list[ESYS_TR]()

    @property
    def asked(self) -> Conditions:
        return self.sealed.conditions

    @property
    def held(self) -> Held:
        return Held.read(self._home.held(self._licensed, self.binding), self.binding)

    def close(self) -> None:
        for handle in self._live:
            with suppress(TSS2_Exception):  # its last use has ended it
                self.e.flush_context(handle)

    def flush(self, *live: ESYS_TR) -> None:
        for handle in live:
            with suppress(TSS2_Exception):
                self.e.flush_context(handle)
            if handle in self._live:
                self._live.remove(handle)

    # ---- objects and indexes

    def srk(self) -> ESYS_TR:
        template = tpm_public(STORAGE_ROOT_TEMPLATE)
        key, *_ = self.e.create_primary(TPM2B_SENSITIVE_CREATE(), template, self.hierarchy)
        self._live.append(key)
        return key

    def load(self, private: bytes | None = None) -> ESYS_TR:
        parent = self.srk()
        loaded = self.e.load(parent, TPM2B_PRIVATE(private or self.held.private), tpm_public(self.sealed.public))
        self.flush(parent)
        self._live.append(loaded)
        self.e.tr_set_auth(loaded, self.pin)
        return loaded

    def index(self, handle: int) -> ESYS_TR:
        found = self.e.tr_from_tpmpublic(handle)
        self.e.tr_set_auth(found, self.auth)
        return found

    @property
    def counter(self) -> ESYS_TR:
        return self.index(self.binding.counter.handle)

    @property
    def opens(self) -> TpmIndex:
        return self.of("opens")

    def of(self, purpose: str) -> TpmIndex:
        """The index of this purpose."""
        found: TpmIndex = next(index for index in self.binding.indexes if index.purpose == purpose)
        return found

    def undefine(self, handle: int) -> None:
        self.e.nv_undefine_space(self.e.tr_from_tpmpublic(handle))

    def define(self, public: NvPublic, auth: bytes | None = None) -> ESYS_TR:
        area, _ = TPM2B_NV_PUBLIC.unmarshal(sized(public.unwritten.raw))
        value = self.auth if auth is None else auth
        made = self.e.nv_define_space(value, area)
        self.e.tr_set_auth(made, value)
        return made

    def redefine(self, public: NvPublic, auth: bytes | None = None) -> ESYS_TR:
        with suppress(TSS2_Exception):
            self.undefine(public.handle)
        return self.define(public, auth)

    def increment(self) -> None:
        counter = self.counter
        self.e.nv_increment(counter, auth_handle=counter)

    # ---- policies

    def session(self, kind: TPM2_SE = TPM2_SE.POLICY, attributes: int = TPMA_SESSION.CONTINUESESSION) -> ESYS_TR:
        made = self.e.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, kind, PLAIN, TPM2_ALG.SHA256)
        self.e.trsess_set_attributes(made, TPMA_SESSION(attributes))
        self._live.append(made)
        return made

    def ticket(self, digest: bytes, reference: bytes, signature: bytes) -> Any:
        assert self.sealed.policy_key
        key = self.e.load_external(tpm_public(self.sealed.policy_key), None, ESYS_TR.OWNER)
        try:
            signed, _ = TPMT_SIGNATURE.unmarshal(signature)
            return self.e.verify_signature(key, hashlib.sha256(digest + reference).digest(), signed)
        finally:
            self.e.flush_context(key)

    def pcr(self, session: ESYS_TR, step: policy.PolicyPCR) -> None:
        selection, _ = TPML_PCR_SELECTION.unmarshal(step.selection.marshal())
        self.e.policy_pcr(session, step.values if self.expecting else b"", selection)

    def platform(self, session: ESYS_TR) -> None:
        """PolicyPCR of the approved state, as it is now."""
        for approval in self.approvals[:1]:
            self.pcr(session, policy.pcr_step(approval.pcrs))

    def run(  # noqa: C901  # one branch a step
        self, session: ESYS_TR, steps: Sequence[policy.Step], write: TpmIndex | None = None
    ) -> None:
        """Root's way through a policy. `write` gives what was signed for an index."""
        for step in steps:
            match step:
                case policy.PolicyPCR():
                    self.pcr(session, step)
                case policy.PolicyAuthorize(key, reference):
                    if write and reference == write.reference:
                        digest, signature = policy.digest(self.asked.write(write)), write.write
                    else:
                        digest, signature = self.approvals[0].policy, self.approvals[0].signature
                    ticket = self.ticket(digest, reference, signature)
                    self.e.policy_authorize(
                        session, approved_policy=digest, policy_ref=reference, key_sign=key, check_ticket=ticket
                    )
                case policy.PolicyNV(index, operand):
                    known = self.index(index.handle)
                    self.e.policy_nv(known, known, session, operand, TPM2_EO.EQ)
                case policy.PolicyCounterTimer(offset, operand, operation):
                    self.e.policy_counter_timer(session, operand, operation, offset)
                case policy.PolicyCommandCode(code):
                    self.e.policy_command_code(session, code)
                case policy.PolicyAuthValue():
                    self.e.policy_auth_value(session)
                case policy.PolicySecret(index):
                    self.e.policy_secret(self.index(index.handle), session, expiration=0)
                case policy.PolicyCpHash(digest):
                    self.e.policy_cp_hash(session, digest)
                case policy.PolicyOR(branches):
                    self.e.policy_or(session, TPML_DIGEST(list(branches)))

    def ready(self) -> ESYS_TR:
        """A session that needs nothing but TPM2_Unseal: it has cost an open, if those are counted."""
        session = self.session()
        try:
            self.platform(session)
            self.run(session, self.asked.sealed)
        except BaseException:
            self.flush(session)
            raise
        return session

    def unseal(self, session: ESYS_TR | None = None, private: bytes | None = None) -> bytes:
        session = session or self.ready()
        loaded = self.load(private)
        try:
            return bytes(self.e.unseal(loaded, session1=session))
        finally:
            self.flush(loaded, session)

    def writer(self, index: TpmIndex | None = None) -> ESYS_TR:
        """A session that may write the index, as the vendor permits it."""
        index = index or self.opens
        session = self.session(attributes=0)
        try:
            self.platform(session)
            self.run(
                session, [*self.asked.write(index), self.asked.permitted(index), self.asked.branches(index)], index
            )
        except BaseException:
            self.flush(session)
            raise
        return session

    def write(self, session: ESYS_TR, index: TpmIndex | None = None, data: bytes | None = None) -> None:
        index = index or self.opens
        target = self.index(index.handle)
        content = bytes(4) + index.limit.to_bytes(4, "big") if data is None else data
        try:
            self.e.nv_write(target, content, auth_handle=target, session1=session)
        finally:
            self.flush(session)

    def kept(self, make: Any) -> list[Any]:
        """As many sessions as the TPM keeps, saved; three are left for use."""
        saved: list[Any] = []
        with suppress(TSS2_Exception):
            while True:
                session = make()
                saved.append(self.e.context_save(session))
                self._live.remove(session)
        for _ in range(3):
            self.flush(self.e.context_load(saved.pop()))
        return saved


__all__ = ["NV", "PLAIN", "Behind", "Customer", "Root", "handles", "limited"]
