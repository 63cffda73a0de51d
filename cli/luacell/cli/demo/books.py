"""The books: what became of each call, and what the contract counted."""

import collections
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from luacell.cli.demo.counting import Statistics, count_in_python
from luacell.cli.demo.faults import Fault


@dataclass
class Books:
    """What became of each call. Methods are safe from any thread; fields are final when the callers end."""

    calls_issued: int = 0
    calls_answered: int = 0
    calls_again: int = 0
    files_count: int = 0
    size: int = 0  # bytes of all counted files
    lines: int = 0
    blank_lines: int = 0
    words: int = 0
    identifiers: int = 0
    longest_line: tuple[int, str] = (0, "")
    top_names: collections.Counter[bytes] = field(default_factory=collections.Counter)
    top_name_files: collections.Counter[bytes] = field(default_factory=collections.Counter)
    survived: collections.Counter[Fault] = field(default_factory=collections.Counter)
    slowest_recovery_s: float = 0.0
    to_check: list[tuple[Path, bytes, Statistics]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _waiting: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def calls_lost(self) -> int:
        """Calls that have had no answer."""
        return self.calls_issued - self.calls_answered

    @property
    def crashes_survived(self) -> int:
        """Deaths of workers that the demo brought about."""
        return self.survived.total()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Book a call: answered when the block ends, lost if it ends by an exception or not at all."""
        caller = threading.get_ident()
        with self._lock:
            self.calls_issued += 1
            self._waiting[caller] = time.monotonic()
        answered_count = 0
        try:
            yield
            answered_count = 1
        finally:
            with self._lock:
                self.calls_answered += answered_count
                del self._waiting[caller]

    def longest_wait_s(self, now: float) -> float:
        """Return how long the oldest unanswered call has waited, in seconds."""
        with self._lock:
            return now - min(self._waiting.values(), default=now)

    def recovered(self, seconds: float) -> None:
        """Book the time from a failed answer to the next good one."""
        with self._lock:
            self.slowest_recovery_s = max(self.slowest_recovery_s, seconds)

    def died(self, fault: Fault) -> None:
        """Book the death of a worker."""
        with self._lock:
            self.survived[fault] += 1

    def called_again(self) -> None:
        """Book that a file is called for again: somebody killed its worker, or it was refused."""
        with self._lock:
            self.calls_again += 1

    def went_wrong(self, problem: str) -> None:
        """Book an answer that should not have been."""
        with self._lock:
            self.problems.append(problem)

    def counted(self, path: Path, source: bytes, answer: Statistics, *, check: bool) -> None:
        """Book a file's statistics; with `check` they are verified in the end."""
        with self._lock:
            self.files_count += 1
            self.size += len(source)
            self.lines += answer.lines
            self.blank_lines += answer.blank_lines
            self.words += answer.words
            self.identifiers += answer.identifiers
            self.longest_line = max(self.longest_line, (answer.longest_line, path.name))
            if answer.top_name:
                self.top_names[answer.top_name] += answer.top_count
                self.top_name_files[answer.top_name] += 1
            if check:
                self.to_check.append((path, source, answer))

    def check_answers(self) -> None:
        """Count the samples again in Python and book each difference."""
        for path, source, answer in self.to_check:
            if answer != (expected := count_in_python(source)):
                self.went_wrong(f"{path}: the contract answered {answer}, Python counts {expected}")
