"""Part M: shared memory."""

from __future__ import annotations

from typing import Final

from tests.faults.rows.row import Row

ROWS: Final = (
    Row("M01", "the contract writes to its arguments", "WORKER_CRASHED, signal 11, began yes", "mapped read-only"),
    Row("M02", "the contract makes its arguments writable", "refused", "sealed against new writers; no open of /proc"),
    Row("M03", "a worker or a host resizes a segment", "EPERM", "seals"),
    Row("M04", "sizes and slots that are out of range", "BAD_REQUEST, StaleHandle", "the broker's books"),
    Row("M05", "handles that are unknown, foreign, freed, off by one", "StaleHandle, UNAUTHORIZED", "generations"),
    Row(
        "M06",
        "the contract spoils all that it can write of its segment: the words of its slot, once or for ever",
        "an answer, or a typed failure by the deadline; its worker ends at run_limit; hosts and broker go on",
        "what stands there is compared and clamped; the broker has books of its own",
    ),
    Row(
        "M07",
        "a worker that is timed out writes on, its slot is used again",
        "never seen there",
        "free when it is dead",
    ),
    Row("M08", "the contract writes past `out`", "its own memory at most; WORKER_CRASHED beyond", "an arena each"),
    Row("M10", "no memory at the n-th allocation", "BUSY at the allocation; never SIGBUS", "allocated up front"),
    Row("M12", "kill -9 of a host that holds 100 slots", "its memory is back within 2 s", "its pidfd"),
    Row("M13", "kill -9 of worker, broker, all", "nothing is left", "memory without names"),
    Row(
        "M15",
        "names in the run directory made before: files, links, sockets of others; a directory of another user",
        "refused, naming the path; what a link points to is untouched",
        "checked before it is used",
    ),
    Row("M17", "sizes 0, 1, a page and its neighbours, the limit, one more", "exact bytes; TOO_LARGE", "checked twice"),
    Row("M18", "what one host sent or got, looked for by others", "never seen", "an arena for each host and contract"),
)
