"""Quarantine: which host's calls to a contract rest because they crash it, for how long, and when one may try again.

It counts crashes per contract and host, so that a host whose arguments kill a contract hurts nobody else; what kills it
for two hosts is the contract's own fault, and then it rests for all; so it does for as many crashes of more hosts, such
as programs that connect for one call each. It is told of crashes and asked for leave; it
knows no workers, and what is a crash the dispatcher decides. Times come from outside.

    serving ──CRASHES_MAX crashes within PERIOD_NS──> resting ──back-off over, a call──> trying
       ^                                                 ^ ────── its crash: back-off doubled ─┤
       └──────────── it was run and did not crash ───────────────────────────────────────────┘
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from luacell.protocol.limits import NS_PER_S

CRASHES_MAX: Final = 5  # in a period; these are answered as what they are
CRASHES_OF_ALL_MAX: Final = 2 * CRASHES_MAX  # of hosts that do not rest themselves
PERIOD_NS: Final = 30 * NS_PER_S
REST_FIRST_NS: Final = 1 * NS_PER_S
REST_MAX_NS: Final = 60 * NS_PER_S
TRIAL_WAIT_NS: Final = 1 * NS_PER_S  # what others are told to wait while one call tries
HOSTS_MAX: Final = 64  # whose crashes are remembered; two that rest stop the contract, so that more have no meaning


class Trial(Protocol):
    """What is to be known of the call that tries whether a rest may end."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is under way any more."""

    @property
    def was_handed_over(self) -> bool:
        """Whether a worker had it."""


@dataclass(slots=True, eq=False)
class Rest:
    """The rest of a contract, for one host or for all.

    Attributes:
        length_ns: of the current back-off.
        until_ns: when it is over.
        trial: the call that tries, or tried.
    """

    length_ns: int
    until_ns: int
    trial: Trial | None = None

    def lengthen(self, now_ns: int) -> None:
        """The trial has crashed, too."""
        self.trial = None
        self.length_ns = min(2 * self.length_ns, REST_MAX_NS)
        self.until_ns = now_ns + self.length_ns

    def wait_ns(self, now_ns: int) -> int:
        """Return how long calls have to wait yet; 0 lets one try."""
        trial = self.trial
        if trial is None:
            return max(0, self.until_ns - now_ns)
        return 0 if trial.has_ended else TRIAL_WAIT_NS

    @property
    def is_trying(self) -> bool:
        """Whether a call is under way that tries."""
        return self.trial is not None and not self.trial.has_ended

    @property
    def has_proved_well(self) -> bool:
        """Whether the trial was run and did not crash: `lengthen` would have been told."""
        return self.trial is not None and self.trial.has_ended and self.trial.was_handed_over


class Quarantine:
    """The quarantine of one contract.

    Attributes:
        whole: the rest for all hosts, or None.
        hosts: rests by host.
    """

    def __init__(self) -> None:
        self.whole: Rest | None = None
        self.hosts: dict[bytes, Rest] = {}
        self._crashes: dict[bytes, deque[int]] = {}

    @property
    def is_in_force(self) -> bool:
        """Whether any calls need leave."""
        return self.whole is not None or bool(self.hosts)

    def wait_ns(self, host: bytes, now_ns: int) -> int:
        """Return how long a call of a host has to wait, in nanoseconds; 0 gives it leave.

        A rest whose trial went well ends here, and so does one that nobody has asked about for a period.
        """
        self._forget(now_ns)
        own = self.hosts.get(host)
        if self.whole is not None and self.whole.has_proved_well:
            self.whole = None
        if own is not None and own.has_proved_well:
            del self.hosts[host]
            own = None
        waits_ns = [rest.wait_ns(now_ns) for rest in (self.whole, own) if rest is not None]
        return max(waits_ns, default=0)

    def is_trial(self, call: Trial) -> bool:
        """Whether a call is the one that tries."""
        return any(rest.trial is call for rest in (self.whole, *self.hosts.values()) if rest is not None)

    def accepted(self, host: bytes, call: Trial) -> None:
        """A call that was given leave is accepted; where the contract rests, it is the one that tries."""
        for rest in (self.whole, self.hosts.get(host)):
            if rest is not None:
                rest.trial = call

    def crashed(self, host: bytes, call: Trial, now_ns: int) -> bool:
        """A call of a host has crashed the contract; tell whether calls that wait are to rest from now on."""
        rests = [rest for rest in (self.whole, self.hosts.get(host)) if rest is not None]
        tried = [rest for rest in rests if rest.trial is call]
        for rest in tried:
            rest.lengthen(now_ns)
        if host in self.hosts:  # one that was under way when the rest began says nothing new
            return bool(tried)
        times = self._crashes.setdefault(host, deque(maxlen=CRASHES_MAX))
        times.append(now_ns)
        if len(times) < CRASHES_MAX or now_ns - times[0] > PERIOD_NS:
            self._bound_hosts(host)
            return self._many_hosts_crash(now_ns) or bool(tried)
        del self._crashes[host]
        self._forget(now_ns)
        self.hosts[host] = Rest(REST_FIRST_NS, now_ns + REST_FIRST_NS)
        if len(self.hosts) > 1 and self.whole is None:
            self.whole = Rest(REST_FIRST_NS, now_ns + REST_FIRST_NS)
        return True

    def _many_hosts_crash(self, now_ns: int) -> bool:
        """Have the contract rest for all where hosts of which each crashed it a few times come to many together."""
        times_ns = [time_ns for each in self._crashes.values() for time_ns in each if now_ns - time_ns <= PERIOD_NS]
        if self.whole is not None or len(times_ns) < CRASHES_OF_ALL_MAX:
            return False
        self._crashes.clear()
        self.whole = Rest(REST_FIRST_NS, now_ns + REST_FIRST_NS)
        return True

    def _bound_hosts(self, latest: bytes) -> None:
        """Remember the crashes of so many hosts only, those that crashed last."""
        self._crashes[latest] = self._crashes.pop(latest)
        if len(self._crashes) > HOSTS_MAX:
            del self._crashes[next(iter(self._crashes))]

    def _forget(self, now_ns: int) -> None:
        """End rests that are long over and that nobody asks about: their host may be gone."""
        for host, rest in list(self.hosts.items()):
            if _is_stale(rest, now_ns):
                del self.hosts[host]
        if self.whole is not None and _is_stale(self.whole, now_ns):
            self.whole = None


def _is_stale(rest: Rest, now_ns: int) -> bool:
    return not rest.is_trying and now_ns - rest.until_ns > PERIOD_NS
