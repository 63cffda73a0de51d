"""Fills a registry to its limit: `python -m tests.support.full_registry STATE_DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

from luacell.broker.registry import ContractRecord
from luacell.broker.registry_store import RegistryStore
from luacell.protocol.identity import ContractRef
from luacell.protocol.limits import CONTRACTS_MAX
from luacell.protocol.messages import Settings
from luacell.protocol.paths import REGISTRY_FILE
from tests.support.contracts import function


def main(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    store = RegistryStore(directory / REGISTRY_FILE, durable=False)
    for number in range(CONTRACTS_MAX):
        ref = ContractRef.of(f"host.n{number}@1")
        source = function(f'ffi.cast("uint32_t *", out)[0] = {number}').encode()
        store.put(ContractRecord(ref.id, ref.name, ref.version, source, f"={ref}", {}, Settings()))
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
