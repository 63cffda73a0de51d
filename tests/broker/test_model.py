from luacell.broker.model import IDLE, LOADING, Contract, Request, Worker
from luacell.protocol.limits import NS_PER_MS
from tests.broker.bench import HOST, Bench, record_of


def test_a_contract_reads_its_limits_from_its_settings() -> None:
    contract = Contract(record_of(deadline_us=5_000, run_limit_us=7_000))
    assert (contract.deadline_us, contract.run_limit_ns) == (5_000, 7 * NS_PER_MS)


def test_each_contract_has_a_queue_of_its_own() -> None:
    assert Contract(record_of()).queue is not Contract(record_of()).queue


def test_a_registration_wants_one_worker() -> None:
    contract = Contract(record_of(), request=Request(HOST, 1))
    assert contract.wants_worker
    contract.workers[Worker(1, b"w")] = None
    assert not contract.wants_worker


def test_a_contract_without_calls_wants_no_worker() -> None:
    assert not Contract(record_of()).wants_worker


def test_a_contract_wants_a_worker_for_each_waiting_call_up_to_its_limit() -> None:
    bench = Bench(spares=0)
    contract = Contract(record_of(workers=2, stateless=True))
    bench.serve(2)
    session = bench.dispatcher.sessions[HOST]
    contract.queue.push(session, bench.call(2))
    assert contract.wants_worker
    contract.workers[Worker(1, b"1", LOADING)] = None
    assert not contract.wants_worker, "the one that loads will take it"
    contract.queue.push(session, bench.call(2))
    assert contract.wants_worker
    contract.workers[Worker(2, b"2", IDLE)] = None
    assert not contract.wants_worker, "it has all that it may have"


def test_calls_are_named_by_contract_and_function() -> None:
    bench = Bench()
    bench.serve()
    assert bench.call().title == "0x0000000000000001 fn 7"
