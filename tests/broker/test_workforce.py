import pytest

from luacell.broker import workforce as workforce_module
from luacell.broker.causes import Cause
from luacell.broker.model import (
    BLANK,
    DOOMED,
    LEAVING,
    LOADING,
    STARTING,
    Effect,
    KillWorker,
    LoadWorker,
    Record,
    SendCall,
    SendReply,
    StartWorker,
)
from luacell.broker.workforce import BACKOFF_MAX_NS, STARTS_AT_ONCE_MAX, backoff_ns
from luacell.protocol.confinement import UNGRANTED, Confinement, Layer
from luacell.protocol.limits import NS_PER_MS, WORKERS_MAX
from tests.broker.bench import CONTRACT, HOST, KILLED, SEGFAULT, SPARES_PAUSE_MS, Bench, of_kind

NOT_STARTED = Cause(problem="a worker could not be started: Cannot allocate memory")


def test_backoff_doubles_from_ten_milliseconds_to_five_seconds() -> None:
    assert [backoff_ns(failures) // NS_PER_MS for failures in (1, 2, 3)] == [10, 20, 40]
    assert backoff_ns(10) == backoff_ns(10_000) == BACKOFF_MAX_NS


# -- starts -----------------------------------------------------------------------------------------------------
def test_nothing_is_started_before_a_worker_host_is_there() -> None:
    bench = Bench(spares=3, has_worker_host=False)
    bench.register()
    assert not bench.has(StartWorker)
    assert len(bench.join_worker_host()) == 4, "three spares, and one for the contract"


def test_spares_are_kept() -> None:
    bench = Bench(spares=2)
    assert bench.workforce.starting_count == 2
    bench.ready()
    bench.ready()
    assert len(bench.workforce.blank) == 2
    assert not bench.has(StartWorker)


def test_a_spare_that_is_used_is_replaced_a_moment_later_whether_or_not_its_contract_has_loaded() -> None:
    bench = Bench(spares=1)
    bench.ready()
    bench.register()
    assert bench.only(LoadWorker).worker is bench.worker(0)
    assert not bench.has(StartWorker), "calls wait for the load, which a start would slow down"
    bench.pass_ms(SPARES_PAUSE_MS)
    assert bench.only(StartWorker).worker is bench.worker(1)


def test_spares_are_not_put_off_by_one_load_after_another() -> None:
    bench = Bench(spares=2)
    bench.ready()
    bench.ready()
    bench.register(1)
    bench.pass_ms(SPARES_PAUSE_MS / 2)
    bench.register(2)
    assert not bench.has(StartWorker)
    bench.pass_ms(SPARES_PAUSE_MS / 2)
    assert len(of_kind(bench.effects, StartWorker)) == 2


def test_what_a_contract_waits_for_is_started_at_once() -> None:
    bench = Bench(spares=1)
    bench.ready()
    bench.register(1)
    bench.register(2)
    assert bench.only(StartWorker).worker is bench.worker(1)
    bench.load_next()
    bench.pass_ms(SPARES_PAUSE_MS)
    assert bench.only(StartWorker).worker is bench.worker(2)


def test_without_spares_a_worker_is_started_when_a_contract_needs_it() -> None:
    bench = Bench(spares=0)
    assert not bench.workforce.by_id
    bench.register()
    bench.only(StartWorker)
    bench.ready()
    bench.only(LoadWorker)


def test_no_more_workers_start_at_once_than_the_bound() -> None:
    bench = Bench(spares=20)
    assert bench.workforce.starting_count == STARTS_AT_ONCE_MAX
    bench.ready()
    assert bench.workforce.starting_count == STARTS_AT_ONCE_MAX


def test_there_are_never_more_workers_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workforce_module, "WORKERS_MAX", 2)
    bench = Bench(spares=5)
    assert len(bench.workforce.by_id) == 2 < WORKERS_MAX
    bench.ready()
    bench.ready()
    assert not bench.has(StartWorker)


def test_worker_numbers_and_routing_ids_are_never_used_twice() -> None:
    bench = Bench(spares=1)
    seen = set()
    for _ in range(5):
        worker = bench.worker()
        assert bench.workforce.by_routing_id[worker.routing_id] is worker
        seen |= {worker.id, worker.routing_id}
        bench.die(worker)
        bench.pass_ms(6_000)
    assert len(seen) == 10


def test_a_worker_that_does_not_become_ready_is_killed_and_replaced() -> None:
    bench = Bench(spares=1)
    worker = bench.worker()
    bench.pass_ms(4_990)
    assert not bench.effects
    bench.pass_ms(20)
    assert bench.only(KillWorker).worker is worker
    assert worker.verdict == "it did not start within 5 s"
    bench.pass_ms(20)
    assert bench.only(StartWorker).worker is not worker


def test_a_late_report_of_readiness_helps_a_doomed_worker_no_more() -> None:
    bench = Bench(spares=1)
    worker = bench.worker()
    bench.pass_ms(5_010)
    bench.ready(worker)
    assert not bench.effects
    assert not bench.workforce.blank


def test_a_worker_that_is_ready_is_not_overdue() -> None:
    bench = Bench(spares=1)
    bench.ready()
    assert bench.dispatcher.next_deadline() is None
    bench.pass_ms(60_000)
    assert not bench.effects


# -- starts that fail -------------------------------------------------------------------------------------------
def test_failed_starts_back_off() -> None:
    bench = Bench(spares=1)
    for wait_ms in (10, 20, 40):
        bench.die(bench.worker(), NOT_STARTED)
        assert not bench.has(StartWorker)
        bench.pass_ms(wait_ms - 1)
        assert not bench.has(StartWorker)
        bench.pass_ms(10)
        bench.only(StartWorker)


def test_a_worker_that_is_doomed_while_it_starts_counts_as_a_failed_start() -> None:
    bench = Bench(spares=1)
    bench.lose(bench.worker())
    assert not bench.has(StartWorker)
    bench.die(bench.worker())
    assert not bench.has(StartWorker)
    bench.pass_ms(15)
    bench.only(StartWorker)


def test_starts_that_fail_together_count_once() -> None:
    bench = Bench(spares=8)
    for worker in list(bench.workforce.by_id.values()):
        bench.die(worker, NOT_STARTED)
    bench.pass_ms(15)
    assert len(of_kind(bench.effects, StartWorker)) == 8


def test_a_worker_that_becomes_ready_ends_the_backing_off() -> None:
    bench = Bench(spares=1)
    for wait_ms in (15, 25, 45):
        bench.die(bench.worker(), NOT_STARTED)
        bench.pass_ms(wait_ms)
    spare = bench.ready()
    bench.die(spare)
    bench.die(bench.worker(), NOT_STARTED)
    bench.pass_ms(15)
    bench.only(StartWorker)


def test_a_new_worker_host_ends_the_backing_off() -> None:
    bench = Bench(spares=1)
    bench.die(bench.worker(), NOT_STARTED)
    assert len(bench.join_worker_host()) == 1


# -- deaths -----------------------------------------------------------------------------------------------------
def test_a_spare_that_dies_is_replaced() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.die(spare, KILLED)
    assert not bench.workforce.blank
    bench.only(StartWorker)


def test_a_spare_that_closes_its_channel_is_killed_and_replaced_at_once() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.lose(spare)
    assert bench.only(KillWorker).worker is spare
    assert not bench.workforce.blank
    bench.only(StartWorker)


def test_a_death_is_ordered_once() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.lose(spare)
    bench.lose(spare)
    assert not bench.effects


def test_a_worker_that_reports_readiness_twice_is_killed() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.ready(spare)
    bench.only(KillWorker)
    assert spare.verdict == "it reported readiness twice"


def test_deaths_are_counted_by_cause_and_recorded() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.die(spare, KILLED)
    assert bench.workforce.deaths == {"SIGKILL": 1}
    record = bench.only(Record)
    assert (record.level, record.event) == ("warning", "worker died")
    assert record.fields["state"] == "blank"
    assert record.fields["contract"] is None


def test_an_ordered_death_is_no_warning() -> None:
    bench = Bench()
    worker = bench.serve()
    bench.lose(worker)
    bench.die(worker, KILLED)
    record = bench.only(Record)
    assert record.level == "info"
    assert record.fields["contract"] == "0x0000000000000001"
    assert record.fields["verdict"] == "it closed its descriptors"


# -- contracts that wait ----------------------------------------------------------------------------------------
def test_contracts_get_workers_in_the_order_in_which_they_asked() -> None:
    bench = Bench(spares=0)
    for contract_id in (3, 1, 2):
        bench.register(contract_id)
    got = []
    for _ in range(3):
        bench.ready()
        got.append(bench.only(LoadWorker).record.id)
    assert got == [3, 1, 2]


def test_a_contract_whose_calls_have_expired_gets_no_worker() -> None:
    bench = Bench(spares=0)
    bench.die(bench.serve(), KILLED)
    bench.call(budget_us=10_000)
    bench.pass_ms(20)
    worker = bench.ready()
    assert not bench.has(LoadWorker)
    assert list(bench.workforce.blank) == [worker]


def test_a_worker_that_does_not_load_in_time_is_killed() -> None:
    bench = Bench(spares=1)
    worker = bench.ready()
    bench.register()
    assert worker.state is LOADING
    bench.pass_ms(5_010)
    assert worker in [effect.worker for effect in of_kind(bench.effects, KillWorker)]
    assert worker.verdict == "it did not load within 5 s"


# -- the worker host --------------------------------------------------------------------------------------------
def test_without_its_worker_host_no_worker_is_of_use() -> None:
    bench = Bench(spares=1)
    idle = bench.serve()
    bench.pass_ms(SPARES_PAUSE_MS)
    blank = bench.ready()
    assert blank.state is BLANK
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    assert {worker.state for worker in bench.workforce.by_id.values()} == {DOOMED}
    assert not bench.has(KillWorker), "nobody could do it; the kernel does"
    assert not bench.workforce.blank
    assert not bench.catalogue.serving[CONTRACT].idle
    bench.call()
    assert not bench.has(StartWorker)
    bench.die(idle)
    bench.die(blank)
    assert len(bench.join_worker_host()) == 2, "a spare, and one for the call"
    assert {worker.state for worker in bench.workforce.by_id.values()} == {STARTING}


def test_calls_that_wait_when_the_worker_host_goes_get_a_worker_of_the_next_one() -> None:
    bench = Bench(spares=0)
    worker = bench.serve(deadline_us=60_000_000, run_limit_us=60_000_000)
    bench.call()
    waiting = bench.call()
    bench.lose(worker)
    bench.ready()
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    bench.join_worker_host()
    bench.load_next()
    assert bench.sent.call is waiting


def test_a_worker_host_that_leaves_has_its_free_workers_killed_and_starts_none() -> None:
    bench = Bench(spares=2)
    idle = bench.serve()
    blank = bench.ready()
    starting = bench.worker()
    assert (blank.state, starting.state) == (BLANK, STARTING)
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    assert {effect.worker for effect in of_kind(bench.effects, KillWorker)} == {idle, blank, starting}
    assert idle.verdict == "its worker host is to end"
    assert not bench.has(StartWorker)
    bench.pass_ms(10_000)
    assert not bench.has(StartWorker)


def test_a_contract_that_loads_as_its_worker_host_leaves_loads_at_the_next_one() -> None:
    bench = Bench(spares=0)
    request = bench.register()
    worker = bench.ready()
    assert worker.state is LOADING
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    assert bench.only(KillWorker).worker is worker
    bench.die(worker, KILLED)
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    bench.join_worker_host()
    bench.load_next()
    assert bench.only(SendReply).request == request
    assert bench.only(SendReply).kind == ""


def test_a_busy_worker_ends_its_call_when_its_worker_host_leaves() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    running, waiting = bench.call(), bench.call()
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    assert not bench.effects
    assert worker.state is LEAVING
    assert bench.dispatcher.worker_host_leaves(bench.now_ns) == [], "twice is once"
    bench.done(running)
    assert bench.result.call is running
    assert bench.only(KillWorker).worker is worker
    assert not bench.has(SendCall)
    bench.die(worker, KILLED)
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    bench.join_worker_host()
    bench.load_next()
    assert bench.sent.call is waiting


def test_a_leaving_worker_ends_its_call_when_its_contract_is_unregistered_as_well() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    running = bench.call()
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    bench.unregister()
    assert not bench.has(KillWorker)
    bench.done(running)
    assert bench.only(KillWorker).worker is worker


def test_a_worker_that_dies_leaving_is_answered_for_as_any_other() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    running = bench.call()
    bench.begin(running)
    bench.effects = bench.dispatcher.worker_host_leaves(bench.now_ns)
    bench.die(worker, SEGFAULT)
    assert bench.failure.signal == 11
    assert bench.only(Record).level == "warning", "nobody had ordered it"


def test_a_death_record_has_the_last_words() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.die(worker, Cause(signal=6, last_words="PANIC"))
    assert bench.only(Record).fields["stderr"] == "PANIC"


# -- levels of the sandbox ----------------------------------------------------------------------------------------
HARDENED, GRANTED = Confinement("hardened"), Confinement(read="/srv")


def kinds(bench: Bench) -> list[Confinement]:
    """Return how the workers are confined that are there, oldest first."""
    return [worker.confinement for worker in bench.workforce.by_id.values()]


def test_contract_gets_a_worker_of_its_level_and_that_level_a_spare() -> None:
    bench = Bench()
    spare = bench.ready()
    bench.register(sandbox="hardened")
    assert not bench.has(LoadWorker), "the blank one is of another level"
    assert kinds(bench) == [UNGRANTED, HARDENED, HARDENED]
    worker = bench.load_next()
    assert worker.confinement == HARDENED
    assert list(bench.workforce.blank) == [spare]
    bench.ready()
    bench.register(2, sandbox="hardened")
    assert bench.only(LoadWorker).worker.confinement == HARDENED, "there was a spare"
    bench.pass_ms(SPARES_PAUSE_MS)
    assert kinds(bench) == [UNGRANTED, *[HARDENED] * 3]


def test_worker_with_grants_is_started_for_its_contract_and_kept_for_nobody_else() -> None:
    bench = Bench()
    bench.ready()
    bench.register(read="/srv")
    assert kinds(bench) == [UNGRANTED, GRANTED]
    worker = bench.load_next()
    assert (worker.confinement, worker.contract is not None) == (GRANTED, True)
    assert kinds(bench) == [UNGRANTED, GRANTED], "no spare has grants"


def test_spares_of_a_level_go_with_its_last_contract() -> None:
    bench = Bench(spares=1)
    spare = bench.ready()
    bench.serve(1, sandbox="hardened")
    bench.serve(2, sandbox="hardened")
    bench.pass_ms(SPARES_PAUSE_MS)
    bench.ready()
    bench.effects = []
    bench.catalogue.remove(1, bench.now_ns, bench.effects)
    assert {worker.confinement for worker in bench.workforce.blank} == {UNGRANTED, HARDENED}
    bench.catalogue.remove(2, bench.now_ns, bench.effects)
    assert list(bench.workforce.blank) == [spare]


def test_spare_that_comes_up_when_its_level_is_no_longer_used_goes() -> None:
    bench = Bench()
    bench.ready()
    bench.serve(sandbox="hardened")
    spare = next(each for each in bench.workforce.by_id.values() if each.state is STARTING)
    bench.catalogue.remove(CONTRACT, bench.now_ns, [])
    bench.ready(spare)
    assert bench.only(KillWorker).worker is spare


def test_worker_with_grants_that_nobody_waits_for_goes() -> None:
    bench = Bench(spares=0)
    bench.register(read="/srv", private=True)
    worker = bench.worker()
    bench.dispatcher.host_left(HOST, bench.now_ns)
    bench.ready(worker)
    assert bench.only(KillWorker).worker is worker
    assert not bench.workforce.blank


def test_floor_of_the_worker_host_is_learnt_from_its_first_worker() -> None:
    bench = Bench(spares=2)
    layers = (Layer("seccomp", True, "no fork"),)
    first = bench.worker(0)
    bench.workforce.confined(first, "hardened", layers, "/lib/cjson.so")
    assert first.c_modules == "/lib/cjson.so"
    bench.ready(first)
    assert bench.workforce.floor == "hardened"
    assert bench.workforce.posture == {"hardened": layers}
    assert kinds(bench) == [HARDENED, HARDENED], "and none is started besides"
    bench.register()
    assert bench.only(LoadWorker).worker is first


def test_what_a_worker_tells_when_it_may_have_run_a_contract_is_not_believed() -> None:
    bench = Bench()
    worker = bench.serve()
    bench.workforce.confined(worker, "untrusted", (), "/lib/forged.so")
    assert (bench.workforce.floor, worker.c_modules) == ("default", "")
    assert worker.confinement == UNGRANTED


def test_posture_is_that_of_workers_without_grants() -> None:
    bench = Bench(spares=0)
    bench.register(read="/srv")
    bench.workforce.confined(bench.worker(), "default", (Layer("landlock", True, "/srv to read"),))
    assert bench.workforce.posture == {}


def test_spare_makes_room_for_a_worker_that_is_confined_otherwise() -> None:
    bench = Bench(spares=2)
    spare = bench.ready()
    bench.ready()
    bench.workforce.workers_max = 2
    bench.register(sandbox="hardened")
    assert bench.only(KillWorker).worker is spare
    effects: list[Effect] = []
    bench.workforce.replenish(bench.now_ns, effects)
    assert effects == [], "one place becomes free already"
    bench.die(spare, SEGFAULT)
    assert bench.only(StartWorker).worker.confinement == HARDENED
