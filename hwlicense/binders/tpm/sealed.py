"""What is known of a license's TPM part before the TPM is asked anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import msgspec

from hwlicense.core.errors import DamagedError, Reason
from hwlicense.core.tpm.composing import Conditions
from hwlicense.core.tpm.policy import Step, approved_digest, digest, platform_reference
from hwlicense.core.tpm.signatures import AGAIN, check_approval
from hwlicense.core.tpm.structures import Public, sealed_public

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwlicense.core.documents import Approval, TpmBinding


class Sealed(msgspec.Struct, frozen=True):
    """A binding whose parts fit each other, and the approvals that are meant for it."""

    binding: TpmBinding
    public: Public
    conditions: Conditions
    steps: list[Step]
    approvals: list[Approval]

    @classmethod
    def check(cls, binding: TpmBinding, approvals: Sequence[Approval]) -> Self:
        """Raises DamagedError: LICENSE_DAMAGED unless the sealed object's policy is what the binding says it is,
        SIGNATURE_INVALID for an approval that names the binding's product and generation but is not the vendor's.
        """
        public = Public.parse(binding.public, Reason.LICENSE_DAMAGED)
        conditions = Conditions.of(binding)
        steps = conditions.sealed
        sizes = [(binding.duplicate, 1024), (binding.seed, 512)]
        for credential in (binding.storage_credential, binding.attestation_credential):
            sizes += [(credential.blob, 128), (credential.secret, 512)]
        if public != sealed_public(digest(steps), public.unique[0], pin=binding.pin) or any(
            len(part) > limit for part, limit in sizes
        ):
            what = "The license's TPM part contradicts itself."
            raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.")
        if conditions.policy_key is None or binding.platform is None:
            return cls(binding, public, conditions, steps, [])
        meant = [a for a in approvals if platform_reference(a.product, a.generation) == binding.platform]
        for approval in meant:
            if approved_digest(approval.pcrs) != approval.policy:
                raise DamagedError(
                    Reason.SIGNATURE_INVALID, "The approval signs other PCR values than it shows.", AGAIN
                )
            check_approval(conditions.policy_key, approval.policy, binding.platform, approval.signature)
        return cls(binding, public, conditions, steps, meant)

    @property
    def policy_key(self) -> Public | None:
        """The key of the vendor's approvals, None where nothing is asked of it."""
        return self.conditions.policy_key

    def check_writes(self) -> None:
        """That the vendor permits the indexes to be written. Raises DamagedError LICENSE_DAMAGED.

        Asked before an old revision dies: the TPM itself would find it out too late.
        """
        for index in self.conditions.indexes:
            try:
                policy = digest(self.conditions.write(index))
                if self.policy_key is not None:
                    check_approval(self.policy_key, policy, index.reference, index.write)
            except DamagedError as error:
                what = f"The license does not permit its index 0x{index.handle:08x} to be written."
                raise DamagedError(Reason.LICENSE_DAMAGED, what, "Ask the vendor for the license again.") from error
