from luacell.broker.causes import NO_VITALS, Cause, Vitals
from luacell.broker.deaths import cpu_of, death_record, episode_of
from luacell.broker.model import Record
from luacell.protocol.limits import NS_PER_MS
from luacell.protocol.slots import Answer
from tests.broker.bench import SEGFAULT, Bench


def begun(sequence: int, cpu_us: int = 0) -> Answer:
    return Answer(sequence, 0, 0, 0, 0, 0, cpu_us)


def test_an_episode_tells_how_long_its_call_waited_and_ran() -> None:
    bench = Bench(spares=0)
    bench.serve()
    call = bench.call()
    call.sent_ns = call.arrived_ns + 10 * NS_PER_MS
    now_ns = call.arrived_ns + 250 * NS_PER_MS
    episode = episode_of(call, begun(call.sequence, 1_000), Vitals(cpu_us=31_000), now_ns)
    assert episode == (call, "yes", 0.01, 0.24, 0.03)


def test_a_call_that_was_not_begun_took_no_time_of_its_worker() -> None:
    bench = Bench(spares=0)
    bench.serve()
    call = bench.call()
    call.sent_ns = 0
    episode = episode_of(call, begun(0), Vitals(cpu_us=31_000), call.arrived_ns + 10 * NS_PER_MS)
    assert episode == (call, "no", 0.01, 0.0, None)


def test_cpu_time_is_told_only_where_it_is_known_and_not_absurd() -> None:
    assert cpu_of(begun(1), NO_VITALS) is None
    assert cpu_of(begun(1, cpu_us=5), Vitals(cpu_us=4)) is None
    assert cpu_of(begun(1, cpu_us=4), Vitals(cpu_us=4)) == 0.0


def test_the_record_of_a_death_in_a_call_names_call_and_host() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.dispatcher.sessions[b"h" * 16].name = "pid 7 of uid 8"
    call = bench.call()
    bench.begin(call)
    bench.now_ns += 20 * NS_PER_MS
    vitals = Vitals(cpu_us=19_000, memory=9 << 20)
    bench.die(worker, Cause(signal=11, last_words="oops", vitals=vitals))
    fields = dict(bench.only(Record).fields)
    assert fields == {
        "worker": worker.id,
        "pid": worker.pid,
        "contract": "0x0000000000000001",
        "state": "busy",
        "cause": "signal 11 (SIGSEGV)",
        "verdict": "",
        "served": 0,
        "function": 7,
        "call": call.header.call_id,
        "host": "pid 7 of uid 8",
        "began": "yes",
        "queued": 0.0,
        "ran": 0.02,
        "cpu": 0.019,
        "process_cpu": 0.019,
        "memory": 9 << 20,
        "stderr": "oops",
    }


def test_the_record_of_a_death_between_calls_has_no_call() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.finish(call := bench.call())
    record = death_record(worker, SEGFAULT, bench.dispatcher._last_episode(worker, SEGFAULT, bench.now_ns))
    assert "call" not in record.fields
    bench.done(call)
    assert bench.dispatcher._last_episode(worker, SEGFAULT, bench.now_ns) is None


def test_a_worker_that_died_before_it_began_died_of_no_call() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.call()
    bench.die(worker, SEGFAULT)
    assert "call" not in bench.only(Record).fields


def test_a_host_without_a_name_is_told_by_its_session() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.begin(bench.call())
    bench.die(worker, SEGFAULT)
    assert bench.only(Record).fields["host"] == (b"h" * 16).hex()
    assert "cpu" not in bench.only(Record).fields
