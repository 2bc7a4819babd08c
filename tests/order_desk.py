"""A vendor's order desk in a few lines, for tests of the TPM binder: core alone, no TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec

from hwlicense.core.documents import Approval, Credential, Endorsement, TpmBinding
from hwlicense.core.schema import SCHEMA
from hwlicense.core.secret import Secret
from hwlicense.core.tpm import duplicate, policy, signatures
from hwlicense.core.tpm.composing import Conditions
from hwlicense.core.tpm.structures import Public

if TYPE_CHECKING:
    from hwlicense.core.documents import Pcr, TpmEvidence

ENDORSEMENT = Endorsement(basis="recorded", root="", root_class="virtual")


def secret(text: bytes) -> Secret:
    return Secret(bytearray(text))


class OrderDesk:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.policy_key = signatures.policy_key_public(self.key.public_key())

    def approve(self, pcrs: list[Pcr], product: str = "label-reader", generation: int = 1) -> Approval:
        digest = policy.approved_digest(pcrs)
        signature = signatures.sign_approval(self.key, digest, policy.platform_reference(product, generation))
        return Approval(SCHEMA, "0" * 64, product, generation, pcrs, digest, signature)

    def bind(
        self,
        evidence: TpmEvidence,
        product: str | None = None,
        generation: int = 1,
        pin: bytes | None = None,
        ek: int = 0,
        shares: tuple[Secret, Secret] | None = None,
    ) -> tuple[TpmBinding, Secret]:
        """A binding and its member secret. `product` asks for an approved platform."""
        srk, ak = Public.parse(evidence.storage_root_key), Public.parse(evidence.attestation_key)
        endorsement_key = Public.parse(evidence.endorsement_keys[ek].public)
        platform = policy.platform_reference(product, generation) if product else None
        steps = Conditions(self.policy_key if product else None, platform, pin is not None).sealed
        value, (storage, attestation) = Secret.random(), shares or (Secret.random(), Secret.random())
        sealed = duplicate.seal(srk, policy.digest(steps), value, None if pin is None else secret(pin))
        binding = TpmBinding(
            storage_root_key=srk.name,
            attestation_key=ak.name,
            endorsement_key=endorsement_key.name,
            endorsement=ENDORSEMENT,
            public=sealed.public,
            duplicate=sealed.duplicate,
            seed=sealed.seed,
            storage_credential=Credential(*duplicate.make_credential(endorsement_key, srk.name, storage)),
            attestation_credential=Credential(*duplicate.make_credential(endorsement_key, ak.name, attestation)),
            policy_key=self.policy_key.raw if product else None,
            platform=platform,
            pin=pin is not None,
        )
        return binding, duplicate.member_secret(value, storage, attestation)
