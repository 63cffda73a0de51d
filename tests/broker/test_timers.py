from luacell.broker.timers import BUCKET_NS, TimerWheel


def due(wheel: TimerWheel[str], now_ns: int) -> list[str]:
    return list(wheel.expired(now_ns))


def test_a_timer_is_never_early_and_at_most_a_bucket_late() -> None:
    for when_ns in (1, BUCKET_NS - 1, BUCKET_NS, BUCKET_NS + 1, 10 * BUCKET_NS):
        wheel: TimerWheel[str] = TimerWheel()
        wheel.set(when_ns, "it")
        assert due(wheel, when_ns) == []
        assert due(wheel, when_ns + BUCKET_NS) == ["it"]


def test_each_timer_expires_once() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.set(0, "one")
    wheel.set(0, "two")
    assert sorted(due(wheel, BUCKET_NS)) == ["one", "two"]
    assert due(wheel, BUCKET_NS) == []


def test_earlier_buckets_come_first() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.set(9 * BUCKET_NS, "late")
    wheel.set(2 * BUCKET_NS, "early")
    assert due(wheel, 20 * BUCKET_NS) == ["early", "late"]


def test_a_cancelled_timer_does_not_expire_and_leaves_nothing() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.cancel(wheel.set(5, "it"), "it")
    assert len(wheel) == 0
    assert wheel.next_ns() is None
    assert due(wheel, 10 * BUCKET_NS) == []


def test_cancelling_an_expired_timer_is_harmless() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    bucket = wheel.set(5, "it")
    due(wheel, BUCKET_NS)
    wheel.cancel(bucket, "it")
    assert len(wheel) == 0


def test_a_timer_that_is_cancelled_while_others_of_its_time_are_dealt_with_does_not_expire() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    buckets = {name: wheel.set(0, name) for name in ("one", "two")}
    expired = wheel.expired(BUCKET_NS)
    other = "one" if next(expired) == "two" else "two"
    wheel.cancel(buckets[other], other)
    assert list(expired) == []


def test_a_timer_that_is_set_while_others_are_dealt_with_keeps_its_time() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.set(0, "first")
    expired = wheel.expired(5 * BUCKET_NS)
    assert next(expired) == "first"
    wheel.set(0, "overdue already")
    wheel.set(6 * BUCKET_NS, "later")
    assert list(expired) == ["overdue already"]
    assert wheel.next_ns() == 7 * BUCKET_NS


def test_a_subject_can_be_set_again_after_it_has_expired() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.set(0, "it")
    due(wheel, BUCKET_NS)
    wheel.set(BUCKET_NS, "it")
    assert due(wheel, 2 * BUCKET_NS) == ["it"]


def test_next_ns_is_when_something_expires() -> None:
    wheel: TimerWheel[str] = TimerWheel()
    wheel.set(3 * BUCKET_NS, "later")
    bucket = wheel.set(BUCKET_NS, "sooner")
    assert wheel.next_ns() == 2 * BUCKET_NS
    wheel.cancel(bucket, "sooner")
    next_ns = wheel.next_ns()
    assert next_ns == 4 * BUCKET_NS
    assert due(wheel, next_ns - 1) == []
    assert due(wheel, next_ns) == ["later"]
