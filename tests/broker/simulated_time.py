"""Virtual time and the ways that messages take: everything that happens in a simulation happens here, in order.

Nothing waits: the clock jumps to the next event. All chance comes from one seeded generator.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from random import Random

from luacell.protocol.limits import NS_PER_MS, NS_PER_US

Act = Callable[[], None]


class Schedule:
    """What is going to happen, by time.

    Attributes:
        now_ns: the virtual clock.
        rng: the only source of chance.
    """

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_ns = 1_000 * NS_PER_MS
        self._events: list[tuple[int, int, Act]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._events)

    def after(self, delay_ns: int, act: Act) -> None:
        """Let something happen later."""
        self.at(self.now_ns + delay_ns, act)

    def at(self, when_ns: int, act: Act) -> None:
        """Let something happen at a point in time; events of the same time keep their order."""
        self._count += 1
        heapq.heappush(self._events, (when_ns, self._count, act))

    def step(self) -> bool:
        """Let the next event happen; tell whether there was one."""
        if not self._events:
            return False
        self.now_ns, _, act = heapq.heappop(self._events)
        act()
        return True

    def chance(self, probability: float) -> bool:
        """Throw a coin."""
        return self.rng.random() < probability

    def between(self, low_ns: int, high_ns: int) -> int:
        """Choose a duration."""
        return low_ns + int(self.rng.random() * (high_ns - low_ns))


class Wire:
    """One direction of a connection: what is sent arrives later, in order, or not at all once it is cut."""

    QUICK_NS = (20 * NS_PER_US, 800 * NS_PER_US)
    SLOW_NS = (2 * NS_PER_MS, 40 * NS_PER_MS)

    def __init__(self, schedule: Schedule, slow: float = 0.01) -> None:
        self._schedule = schedule
        self._slow = slow
        self._under_way: deque[Act] = deque()
        self._last_ns = 0
        self.is_cut = False

    def send(self, act: Act) -> None:
        """Send a message; `act` is what its arrival does."""
        if self.is_cut:
            return
        schedule = self._schedule
        low_ns, high_ns = self.SLOW_NS if schedule.chance(self._slow) else self.QUICK_NS
        self._last_ns = max(self._last_ns, schedule.now_ns + schedule.between(low_ns, high_ns))
        self._under_way.append(act)
        schedule.at(self._last_ns, self._arrive)

    def cut(self, survivors_max: int) -> None:
        """The sender is dead: at most so many of the messages under way still arrive, the oldest ones."""
        self.is_cut = True
        while len(self._under_way) > survivors_max:
            self._under_way.pop()

    def _arrive(self) -> None:
        if self._under_way:
            self._under_way.popleft()()
