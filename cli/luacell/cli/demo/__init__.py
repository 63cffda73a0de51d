"""Show what luacell is for: a contract that works through the standard library and keeps dying.

Four threads have the contract in `contract/` count every `.py` file of the running Python; on the
way it is made to crash, to end its process and to loop, and its workers are killed from outside.
The books say what became of each call. This package uses luacell as any host does, through
`luacell.client`; it knows nothing of how calls travel.

    source_files ──> Caller (one per thread) ──call──> bridge
                        │   FaultPlan: is a fault due?
                        └─> Books ──> report
"""

from luacell.cli.demo.show import run_demo

__all__ = ["run_demo"]
