"""A counter for a license to come: where it lies, and the authValue that it shares with that license's indexes."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESYS_TR, TPM2_CAP, TSS2_Exception

from hwlicense.binders.tpm.counting import GONE, Indexes
from hwlicense.binders.tpm.failures import code
from hwlicense.core.documents import TpmCounter
from hwlicense.core.errors import DamagedError, HardwareError, Reason
from hwlicense.core.secret import SIZE, Secret
from hwlicense.core.tpm.composing import PLACES
from hwlicense.core.tpm.nv import counter_public, free_block

if TYPE_CHECKING:
    from hwlicense.binders.tpm.connection import Work
    from hwlicense.core.hardware import CounterStore

_FIRST_INDEX: Final = 0x01000000


def provide(work: Work, root: ESYS_TR, store: CounterStore) -> TpmCounter:
    """A counter for a license to come, at an odd value: one that was made before and serves none, or a new one.

    One whose license was removed serves again, after those that never had any: at the odd value that license is dead,
    and what is left of its indexes goes when the new one is put in force. Raises HardwareError: TPM_NV_FULL,
    TPM_AUTHORIZATION.
    """
    taken = set(index_handles(work))
    for handle in sorted(store.spare(), key=lambda handle: any(handle + place in taken for place in PLACES.values())):
        try:
            auth = store.read(handle)
        except DamagedError:  # nobody can use that counter any more
            continue
        if auth is None:
            continue
        with auth:
            found = _odd(Indexes(work, root, auth), handle, made=handle in taken)
        if found is not None:
            return found
    handle = free_block(taken)
    with _auth_value() as auth:
        store.keep(handle, auth)
        found = _odd(Indexes(work, root, auth), handle, made=False)
    if found is None:
        what = "The TPM does not let its new counter be used."
        raise HardwareError(Reason.TPM_FAILED, what, "Run `hwlicense device doctor`.")
    return found


def _odd(indexes: Indexes, handle: int, *, made: bool) -> TpmCounter | None:
    """The counter at an odd value; None where another than ours lies there."""
    public = counter_public(handle)
    if not made:
        indexes.define(public)
    try:
        if not made or indexes.name(handle) == public.unwritten.name:
            indexes.increment(public.unwritten)
        value = indexes.value(public)
        if not value % 2:
            indexes.increment(public)
            value = indexes.value(public)
    except TSS2_Exception as error:
        if code(error) in GONE:
            return None
        raise
    return TpmCounter(handle, value)


def index_handles(work: Work) -> list[int]:
    """Where NV indexes are defined."""
    found: list[int] = []
    more = True
    while more:
        first = found[-1] + 1 if found else _FIRST_INDEX
        answer, capability = work.call("get_capability", TPM2_CAP.HANDLES, first, 254)
        page = list(map(int, capability.data.handles))
        found += page
        more = bool(answer) and bool(page)
    return found


def _auth_value() -> Secret:
    """TPMs drop trailing zeros of an authValue, so the last byte is none."""
    return Secret(bytearray(secrets.token_bytes(SIZE - 1) + bytes([1 + secrets.randbelow(255)])))
