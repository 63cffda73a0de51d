"""What callers give a bridge, checked: contracts, buffers, sizes and timeouts become plain numbers and bytes."""

from __future__ import annotations

from typing import Final, NamedTuple

from luacell.client.replies import Buffer
from luacell.protocol.errors import TooLarge
from luacell.protocol.identity import FN_ID_MAX, ContractRef, HostContractId
from luacell.protocol.limits import DEADLINE_MAX_US, PAYLOAD_MAX, SPARES_MAX, US_PER_S

Contract = int | str | HostContractId

IDS_MAX: Final = 4096  # contract names whose id is remembered


class Arguments(NamedTuple):
    """The arguments of one call, in the order in which calls take them."""

    contract_id: int
    fn_id: int
    args: bytes | memoryview | None
    out: memoryview | None
    out_size: int
    timeout_us: int


class Names:
    """The ids of contracts by name; hashing a name takes longer than the rest of a call's checks together.

    Attributes:
        ids: those that are remembered.
    """

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def resolve(self, contract: Contract) -> int:
        """Return the id of a contract.

        Raises:
            ValueError, TypeError: it is none.
        """
        contract_id = self.ids.get(contract) if type(contract) is str else None
        if contract_id is None:
            contract_id = ContractRef.of(contract).id
            if isinstance(contract, str) and len(self.ids) < IDS_MAX:
                self.ids[contract] = contract_id
        return contract_id

    def check(
        self,
        contract: Contract,
        fn_id: int,
        args: Buffer | None,
        out: Buffer | None,
        out_size: int,
        timeout: float | None,
    ) -> Arguments:
        """Check the arguments of a call.

        Args:
            contract: as the user names it.
            fn_id: u32.
            args: bytes the function reads, or None.
            out: a writable buffer; its size is then the out size.
            out_size: bytes the function may write, without `out`.
            timeout: seconds, or None.

        Raises:
            TooLarge: args or out are over the limit.
            ValueError, TypeError: an argument is malformed.
        """
        target = None if out is None else memoryview(out).cast("B")
        if target is not None and target.readonly:
            raise TypeError(f"out must be a writable buffer, not {type(out).__name__}")
        source = args if args is None or type(args) is bytes else memoryview(args).cast("B")
        contract_id = self.resolve(contract)
        if type(fn_id) is not int or not 0 <= fn_id <= FN_ID_MAX:
            raise ValueError(f"fn_id {fn_id!r} is no integer in 0..2**32-1")
        size = out_size if target is None else target.nbytes
        if type(size) is not int:
            raise TypeError(f"out_size {size!r} is no integer")
        if not 0 <= size <= PAYLOAD_MAX or (source is not None and len(source) > PAYLOAD_MAX):
            raise _wrong_size(0 if source is None else len(source), size)
        return Arguments(contract_id, fn_id, source, target, size, 0 if timeout is None else _microseconds(timeout))


def checked_capacity(capacity: int) -> int:
    """Return how many VMs to keep warm.

    Raises:
        ValueError: outside 0..64.
        TypeError: it is no integer.
    """
    if type(capacity) is not int:
        raise TypeError(f"capacity {capacity!r} is no integer")
    if not 0 <= capacity <= SPARES_MAX:
        raise ValueError(f"capacity {capacity} is outside 0..{SPARES_MAX}")
    return capacity


def without_emptiness(args: Buffer | None) -> Buffer | None:
    """Return args as `call` understands them: nothing is NULL."""
    if args is None or type(args) is bytes:
        return args or None
    return args if memoryview(args).nbytes else None


def _wrong_size(args_size: int, out_size: int) -> Exception:
    if out_size < 0:
        return ValueError(f"out_size {out_size} is negative")
    name, size = ("args", args_size) if args_size > PAYLOAD_MAX else ("out", out_size)
    return TooLarge(
        f"{name} of {size} bytes is over the limit of {PAYLOAD_MAX}", began="no", limit=f"{PAYLOAD_MAX} bytes"
    )


def _microseconds(timeout: float) -> int:
    if not 0 < timeout <= DEADLINE_MAX_US / US_PER_S:
        raise ValueError(f"timeout {timeout!r} s is not over 0 and at most {DEADLINE_MAX_US // US_PER_S} s")
    return max(1, int(timeout * US_PER_S))
