from typing import Any

import pytest

from luacell.broker import catalogue as catalogue_module
from luacell.broker.causes import UNKNOWN, Cause
from luacell.broker.model import (
    DOOMED,
    KillWorker,
    LoadWorker,
    Record,
    SendFailure,
    SendReply,
    StartWorker,
    StoreContract,
    StoreContracts,
)
from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.limits import NS_PER_MS, QUEUE_MAX
from tests.broker.bench import CONTRACT, HOST, KILLED, OTHER_HOST, SEGFAULT, Bench, record_of

LONG_US = 60_000_000


# -- registration -----------------------------------------------------------------------------------------------
def test_a_contract_is_served_once_it_has_loaded() -> None:
    bench = Bench()
    request = bench.register()
    assert not bench.has(SendReply)
    assert CONTRACT not in bench.catalogue.serving
    worker = bench.ready()
    bench.loaded(worker)
    assert bench.only(SendReply) == SendReply(request)
    assert bench.catalogue.serving[CONTRACT].idle == [worker]
    assert len(bench.registry) == 1


def test_a_chunk_that_does_not_load_is_not_registered() -> None:
    bench = Bench()
    request = bench.register()
    worker = bench.ready()
    bench.loaded(worker, "load", "f.lua:1: syntax error")
    reply = bench.only(SendReply)
    assert (reply.request, reply.kind) == (request, "VmRegistrationFailed")
    assert reply.reason == "f.lua:1: syntax error"
    assert bench.only(KillWorker).worker is worker
    assert not bench.catalogue.serving
    assert len(bench.registry) == 0


def test_a_chunk_that_gives_no_function_is_a_type_mismatch() -> None:
    bench = Bench()
    bench.register()
    bench.loaded(bench.ready(), "type", "table")
    assert bench.only(SendReply).kind == "TypeMismatch"
    assert bench.only(SendReply).reason == "table"


def test_an_id_is_taken_while_it_is_served_or_being_registered() -> None:
    bench = Bench()
    bench.register()
    bench.register()
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.register(replace=True)
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.loaded(bench.ready())
    bench.register()
    assert bench.only(SendReply).code is AbiErrorCode.DUPLICATE_PROVIDER


def test_an_id_is_free_again_after_a_failed_registration() -> None:
    bench = Bench()
    bench.register()
    bench.loaded(bench.ready(), "load", "no")
    bench.serve()


def test_the_registry_counts_registrations_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "CONTRACTS_MAX", 2)
    bench = Bench()
    bench.serve(1)
    bench.register(2)
    bench.register(3)
    assert bench.only(SendReply).code is AbiErrorCode.BUSY
    assert "2 contracts" in bench.only(SendReply).reason
    bench.register(1, replace=True)
    assert not bench.has(SendReply), "that is none more"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sandbox": "none"}, "'none' is none of"),
        ({"sandbox": "untrusted"}, "typed contracts only"),
        ({"sandbox": "hardened", "read": "/srv"}, "level 'hardened' has none"),
        ({"sandbox": "hardened", "network": True}, "level 'hardened' has none"),
        ({"write": "/srv\nelsewhere"}, "'elsewhere' is granted, and is no absolute path"),
    ],
)
def test_a_sandbox_that_cannot_be_had_is_refused(settings: dict[str, Any], words: str) -> None:
    bench = Bench()
    bench.register(**settings)
    assert bench.only(SendReply).code is AbiErrorCode.BAD_REQUEST
    assert words in bench.only(SendReply).reason


def test_a_raw_contract_is_refused_where_the_floor_is_untrusted() -> None:
    bench = Bench()
    bench.workforce.confined(bench.worker(), "untrusted", ())
    bench.register()
    assert "typed contracts only" in bench.only(SendReply).reason


def test_state_lives_in_one_worker() -> None:
    bench = Bench()
    bench.register(workers=2)
    assert bench.only(SendReply).code is AbiErrorCode.BAD_REQUEST
    bench.register(workers=2, stateless=True)
    assert not bench.has(SendReply)


def test_a_registration_that_gets_no_worker_fails_after_its_limit() -> None:
    bench = Bench(has_worker_host=False)
    bench.register()
    bench.pass_ms(10_990)
    assert not bench.effects
    bench.pass_ms(20)
    assert bench.only(SendReply).kind == "VmRegistrationFailed"
    assert "11 s" in bench.only(SendReply).reason
    assert not bench.workforce.waiting
    assert bench.dispatcher.next_deadline() is None


def test_a_load_without_an_end_fails_the_registration() -> None:
    bench = Bench()
    bench.ready()
    bench.register()
    bench.pass_ms(5_010)
    assert bench.only(SendReply).reason == "it did not load within 5 s"


# -- the registry's file ------------------------------------------------------------------------------------------
def loaded_but_not_stored(bench: Bench, contract_id: int = CONTRACT, **options: Any) -> StoreContract:
    bench.stores_at_once = False
    bench.register(contract_id, **options)
    bench.load_next()
    assert not bench.has(SendReply)
    return bench.only(StoreContract)


def test_a_contract_is_served_and_acknowledged_once_it_is_stored() -> None:
    bench = Bench()
    effect = loaded_but_not_stored(bench)
    assert CONTRACT not in bench.catalogue.serving
    assert len(bench.registry) == 0
    bench.stored(effect)
    assert bench.only(SendReply) == SendReply(effect.request)
    assert bench.catalogue.serving[CONTRACT] is effect.contract
    assert len(bench.registry) == 1


def test_an_id_is_taken_while_its_contract_is_being_stored() -> None:
    bench = Bench()
    effect = loaded_but_not_stored(bench)
    bench.register(replace=True)
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.stored(effect)
    assert bench.only(SendReply).kind == ""


def test_a_contract_that_cannot_be_stored_is_not_registered() -> None:
    bench = Bench()
    effect = loaded_but_not_stored(bench)
    bench.stored(effect, "cannot write /state/registry.db: database or disk is full")
    reply = bench.only(SendReply)
    assert (reply.kind, reply.code) == ("Unavailable", AbiErrorCode.UNAVAILABLE)
    assert reply.reason == "cannot write /state/registry.db: database or disk is full"
    assert bench.has(KillWorker)
    assert not bench.catalogue.serving
    assert not bench.catalogue.pending
    assert len(bench.registry) == 0
    bench.stores_at_once = True
    bench.serve()


def test_a_replacement_that_cannot_be_stored_changes_nothing() -> None:
    bench = Bench()
    worker = bench.serve()
    before = bench.catalogue.serving[CONTRACT]
    effect = loaded_but_not_stored(bench, replace=True)
    assert bench.call().worker is worker, "the first one serves meanwhile"
    queued = bench.call()
    bench.stored(effect, "no space")
    assert bench.catalogue.serving[CONTRACT] is before
    assert not bench.has(SendFailure)
    assert queued.contract is before
    assert worker.state is not DOOMED


def test_calls_that_waited_for_the_replaced_contract_go_to_its_successor_at_once() -> None:
    bench = Bench()
    bench.serve()
    effect = loaded_but_not_stored(bench, replace=True)
    bench.call()
    queued = bench.call()
    bench.stored(effect)
    assert bench.sent.call is queued
    assert queued.contract is effect.contract


def test_a_disk_that_takes_its_time_is_no_reason_to_refuse() -> None:
    bench = Bench()
    effect = loaded_but_not_stored(bench)
    bench.pass_ms(60_000)
    assert not bench.has(SendReply)
    bench.stored(effect)
    assert bench.only(SendReply).kind == ""


def test_a_worker_that_dies_while_its_contract_is_being_stored_changes_nothing() -> None:
    bench = Bench()
    effect = loaded_but_not_stored(bench)
    (worker,) = effect.contract.workers
    bench.die(worker, SEGFAULT)
    assert not bench.has(LoadWorker)
    bench.stored(effect)
    assert bench.only(SendReply).kind == ""
    assert bench.call().state.value == "queued"


def test_a_private_contract_is_never_stored() -> None:
    bench = Bench()
    bench.stores_at_once = False
    bench.register(private=True)
    bench.load_next()
    assert not bench.has(StoreContract)
    assert bench.only(SendReply).kind == ""


def test_a_stored_contract_is_served_again_and_loaded_when_it_is_called() -> None:
    bench = Bench()
    assert bench.catalogue.restore(record_of()) == ""
    assert len(bench.registry) == 1
    bench.ready()
    assert not bench.has(LoadWorker)
    call = bench.call()
    assert bench.only(LoadWorker).record.id == CONTRACT
    bench.loaded(bench.only(LoadWorker).worker)
    assert bench.sent.call is call


def test_a_stored_contract_that_no_longer_loads_fails_its_calls() -> None:
    bench = Bench()
    bench.catalogue.restore(record_of())
    bench.ready()
    bench.call()
    bench.loaded(bench.only(LoadWorker).worker, "load", "module 'lpeg' not found")
    assert bench.failure.kind == "ContractLoadFailed"
    assert CONTRACT in bench.catalogue.serving


def test_a_stored_contract_whose_sandbox_is_not_there_is_not_served_without_it() -> None:
    bench = Bench()
    assert "watertight" in bench.catalogue.restore(record_of(sandbox="watertight"))
    assert not bench.catalogue.serving


# -- workers that die or misbehave while loading ------------------------------------------------------------------
def test_a_death_while_loading_is_tried_again_once() -> None:
    bench = Bench()
    bench.register()
    bench.die(bench.ready(), KILLED)
    assert not bench.has(SendReply)
    bench.die(bench.load_start(), SEGFAULT)
    assert bench.only(SendReply).kind == "VmRegistrationFailed"
    assert bench.only(SendReply).reason == "the worker died with signal 11 (SIGSEGV) while loading"


def test_a_death_while_loading_that_is_tried_again_can_end_well() -> None:
    bench = Bench()
    bench.register()
    bench.die(bench.ready(), KILLED)
    bench.loaded(bench.load_start())
    assert bench.only(SendReply).kind == ""
    assert not bench.catalogue.serving[CONTRACT].died_loading


def test_a_worker_host_that_goes_does_not_fail_a_registration() -> None:
    bench = Bench(spares=0)
    bench.register()
    worker = bench.ready()
    bench.effects = bench.dispatcher.worker_host_left(bench.now_ns)
    bench.die(worker)
    assert not bench.has(SendReply)
    bench.join_worker_host()
    bench.load_next()
    assert bench.only(SendReply).kind == ""


def test_a_worker_that_closes_its_channel_while_loading_fails_the_load() -> None:
    bench = Bench()
    bench.register()
    worker = bench.ready()
    bench.lose(worker)
    assert bench.only(SendReply).reason == "it closed its descriptors"
    bench.die(worker, KILLED)
    assert not bench.has(SendReply)
    assert not bench.has(LoadWorker)


def test_a_load_that_nobody_asked_for_costs_the_worker() -> None:
    bench = Bench()
    blank = bench.ready()
    bench.loaded(blank)
    assert bench.only(KillWorker).worker is blank
    worker = bench.serve()
    bench.loaded(worker)
    assert bench.only(KillWorker).worker is worker


# -- contracts that no longer load --------------------------------------------------------------------------------
def test_calls_of_a_contract_that_no_longer_loads_fail_and_so_do_others_until_its_back_off_is_over() -> None:
    bench = Bench()
    bench.die(bench.serve(), KILLED)
    call = bench.call()
    bench.loaded(bench.load_start(), "type", "table")
    assert bench.failure.call_id == call.header.call_id
    assert (bench.failure.kind, bench.failure.slot) == ("ContractLoadFailed", "free")
    assert "the chunk gave a Lua table, no function" in bench.failure.message
    bench.send(bench.header())
    assert (bench.failure.kind, bench.failure.slot) == ("ContractLoadFailed", "unused")
    bench.pass_ms(11)
    bench.call()
    bench.loaded(bench.load_start())
    assert bench.catalogue.serving[CONTRACT].failures == 0


def test_the_back_off_of_a_contract_doubles() -> None:
    bench = Bench()
    bench.die(bench.serve(), KILLED)
    contract = bench.catalogue.serving[CONTRACT]
    for wait_ms in (10, 20, 40):
        bench.call()
        bench.loaded(bench.load_start(), "load", "oops")
        assert contract.retry_ns == bench.now_ns + wait_ms * NS_PER_MS
        bench.pass_ms(wait_ms)


def test_a_failed_load_leaves_calls_to_workers_that_are_there() -> None:
    bench = Bench()
    bench.serve(workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    running, waiting = bench.call(), bench.call()
    bench.loaded(bench.load_start(), "load", "oops")
    assert not bench.catalogue.serving[CONTRACT].queue.is_full
    bench.done(running)
    assert bench.sent.call is waiting


def test_calls_that_wait_are_a_reason_to_load_again_after_the_back_off() -> None:
    bench = Bench(spares=2)
    bench.serve(workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    bench.ready()
    bench.call()
    waiting = bench.call()
    bench.loaded(bench.load_start(), "load", "oops")
    bench.call()
    assert not bench.has(LoadWorker), "not before its time"
    bench.pass_ms(20)
    bench.loaded(bench.load_start())
    assert bench.sent.call is waiting


def test_a_back_off_does_not_need_another_timer_of_the_contract() -> None:
    bench = Bench(spares=0)
    bench.serve(workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    bench.call()
    bench.pass_ms(5_010)
    waiting = bench.call()
    bench.loaded(bench.load_start(), "load", "oops")
    bench.pass_ms(20)
    bench.load_next()
    assert bench.sent.call is waiting


def test_a_contract_that_kills_its_loaders_backs_off_too() -> None:
    bench = Bench()
    bench.die(bench.serve(), KILLED)
    bench.call()
    bench.die(bench.load_start(), Cause(exit_code=0))
    bench.die(bench.load_start(), Cause(exit_code=0))
    assert bench.failure.kind == "ContractLoadFailed"
    assert bench.catalogue.serving[CONTRACT].retry_ns > bench.now_ns


def test_a_contract_whose_loaders_close_their_channel_backs_off_too() -> None:
    bench = Bench()
    bench.die(bench.serve(), KILLED)
    bench.call()
    bench.lose(bench.load_start())
    assert bench.failure.kind == "ContractLoadFailed"
    assert bench.catalogue.serving[CONTRACT].retry_ns > bench.now_ns


# -- workers for calls ------------------------------------------------------------------------------------------
def test_a_contract_that_nobody_calls_keeps_no_worker() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.pass_ms(5_010)
    assert bench.only(KillWorker).worker is worker
    assert bench.dispatcher.next_deadline() is None
    bench.call()
    bench.load_next()
    assert bench.sent.call is bench.call_of(bench.sent.call.header.call_id)


def test_a_contract_that_was_called_keeps_its_worker() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.done(bench.call())
    bench.pass_ms(60_000)
    assert not bench.has(KillWorker)
    assert bench.catalogue.serving[CONTRACT].idle == [worker]


def test_calls_that_wait_get_as_many_workers_as_the_contract_may_have() -> None:
    bench = Bench(spares=0)
    bench.serve(workers=3, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    for _ in range(5):
        bench.call()
    for _ in range(2):
        bench.load_next()
    contract = bench.catalogue.serving[CONTRACT]
    assert (len(contract.workers), len(contract.queue)) == (3, 2)
    assert not bench.workforce.waiting


def test_workers_are_ordered_one_after_the_other_without_waiting_for_loads() -> None:
    bench = Bench(spares=0)
    bench.serve(workers=3, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    for _ in range(3):
        bench.call()
    bench.ready()
    bench.only(LoadWorker)
    bench.only(StartWorker)


# -- replacement ------------------------------------------------------------------------------------------------
def test_a_contract_is_replaced_when_its_successor_has_loaded() -> None:
    bench = Bench()
    old = bench.serve()
    bench.register(replace=True)
    assert bench.catalogue.serving[CONTRACT].idle == [old], "it serves meanwhile"
    new = bench.load_next()
    assert bench.only(KillWorker).worker is old
    assert bench.catalogue.serving[CONTRACT].idle == [new]
    assert len(bench.registry) == 1


def test_a_successor_that_does_not_load_changes_nothing() -> None:
    bench = Bench()
    old = bench.serve()
    bench.register(replace=True)
    bench.loaded(bench.load_start(), "load", "oops")
    assert bench.catalogue.serving[CONTRACT].idle == [old]


def test_a_successor_takes_over_the_queue_and_the_running_call_ends_where_it_is() -> None:
    bench = Bench()
    old = bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    running, first, second = bench.call(), bench.call(), bench.call()
    new = bench.serve(replace=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    assert bench.sent == (new, first)
    assert not bench.has(KillWorker)
    bench.done(running)
    assert bench.result.call is running
    assert bench.only(KillWorker).worker is old
    bench.done(first)
    assert bench.sent == (new, second)


def test_a_queue_that_is_over_full_is_taken_over_whole() -> None:
    bench = Bench()
    old = bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    running = bench.call()
    for _ in range(QUEUE_MAX):
        bench.call(host=OTHER_HOST)
    bench.register(replace=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    new = bench.load_start()
    bench.die(old, KILLED)
    assert len(bench.catalogue.serving[CONTRACT].queue) == QUEUE_MAX + 1, "the one that was not begun is back"
    bench.loaded(new)
    assert bench.sent == (new, running)
    assert len(bench.catalogue.serving[CONTRACT].queue) == QUEUE_MAX


def test_a_successor_gets_the_workers_that_its_inherited_calls_need() -> None:
    bench = Bench(spares=0)
    bench.serve(deadline_us=LONG_US, run_limit_us=LONG_US)
    for _ in range(4):
        bench.call()
    bench.serve(replace=True, workers=2, stateless=True, deadline_us=LONG_US, run_limit_us=LONG_US)
    bench.only(StartWorker)


def test_a_contract_that_is_unregistered_while_its_successor_loads_is_succeeded_nevertheless() -> None:
    bench = Bench()
    bench.serve()
    bench.register(replace=True)
    bench.unregister()
    assert CONTRACT not in bench.catalogue.serving
    new = bench.load_next()
    assert bench.catalogue.serving[CONTRACT].idle == [new]


def test_what_is_private_to_one_host_is_not_replaced_by_another_nor_hides_what_is_public() -> None:
    bench = Bench()
    bench.serve(1, HOST, private=True)
    bench.serve(2)
    bench.register(1, OTHER_HOST, replace=True, private=True)
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.register(1, OTHER_HOST, replace=True)
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.register(2, HOST, replace=True, private=True)
    assert bench.only(SendReply).kind == "DuplicateContract"
    bench.register(1, HOST, replace=True, private=True)
    assert not bench.has(SendReply)


# -- removal ----------------------------------------------------------------------------------------------------
def test_an_unregistered_contract_lets_its_idle_worker_go() -> None:
    bench = Bench(spares=0)
    worker = bench.serve()
    bench.unregister()
    assert bench.only(KillWorker).worker is worker
    assert worker.state is DOOMED
    assert len(bench.registry) == 0
    assert bench.only(Record).event == "contract unregistered"
    assert bench.dispatcher.next_deadline() is None


def test_a_contract_that_is_not_there_is_not_unregistered() -> None:
    assert Bench().unregister() == []


def test_a_worker_that_loads_an_unregistered_contract_goes_too() -> None:
    bench = Bench()
    bench.die(bench.serve(), KILLED)
    bench.call()
    worker = bench.load_start()
    bench.unregister()
    assert bench.only(KillWorker).worker is worker
    assert bench.failure.code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    bench.loaded(worker)
    bench.die(worker, KILLED)
    assert not bench.has(LoadWorker)


def test_an_unregistered_contract_waits_for_no_worker() -> None:
    bench = Bench(spares=0)
    bench.die(bench.serve(), KILLED)
    bench.call()
    assert bench.workforce.waiting
    bench.unregister()
    assert not bench.workforce.waiting


def test_private_contracts_go_with_their_host() -> None:
    bench = Bench()
    worker = bench.serve(1, HOST, private=True)
    bench.serve(2, HOST)
    bench.register(3, HOST, private=True)
    bench.register(4, HOST)
    bench.leave(HOST)
    assert worker.state is DOOMED
    assert set(bench.catalogue.serving) == {2}
    assert set(bench.catalogue.pending) == {4}


def test_a_private_contract_is_unknown_to_other_hosts() -> None:
    bench = Bench()
    bench.serve(1, HOST, private=True)
    header = bench.header(1, OTHER_HOST)
    bench.send(header, OTHER_HOST)
    assert bench.failure.code is AbiErrorCode.HOST_CONTRACT_NOT_FOUND
    assert bench.call(1, HOST)


def test_nobody_asks_for_a_cause_that_is_not_known() -> None:
    bench = Bench()
    bench.register()
    bench.die(bench.ready(), UNKNOWN)
    bench.die(bench.load_start(), UNKNOWN)
    assert bench.only(SendReply).reason == "the worker died with an unknown cause while loading"


# -- contracts that are held --------------------------------------------------------------------------------------
SECOND = CONTRACT + 1


def test_contracts_that_are_held_are_served_together() -> None:
    bench = Bench()
    old = bench.serve()
    before = bench.catalogue.serving[CONTRACT]
    bench.hold(replace=True)
    bench.hold(SECOND)
    assert bench.catalogue.serving == {CONTRACT: before}
    assert bench.call().worker is old, "it serves meanwhile"
    queued = bench.call()
    request = bench.commit(CONTRACT, SECOND)
    effect = bench.only(StoreContracts)
    assert [contract.record.id for contract in effect.contracts] == [CONTRACT, SECOND]
    assert set(bench.catalogue.serving) == {CONTRACT}
    bench.all_stored(effect)
    assert bench.only(SendReply) == SendReply(request)
    assert bench.catalogue.serving == {contract.record.id: contract for contract in effect.contracts}
    assert bench.sent.call is queued, "what waited goes to the new one"
    assert not bench.catalogue.pending
    assert len(bench.registry) == 2


def test_contracts_that_cannot_be_stored_together_change_nothing() -> None:
    bench = Bench()
    bench.serve()
    before = bench.catalogue.serving[CONTRACT]
    bench.hold(replace=True)
    bench.hold(SECOND)
    bench.commit(CONTRACT, SECOND)
    bench.all_stored(bench.only(StoreContracts), "no space")
    assert (bench.only(SendReply).kind, bench.only(SendReply).reason) == ("Unavailable", "no space")
    assert bench.catalogue.serving == {CONTRACT: before}
    assert not bench.catalogue.pending
    assert len(bench.registry) == 1


def test_a_commit_of_what_is_not_held_serves_none() -> None:
    bench = Bench()
    bench.hold()
    for ids, host in (((CONTRACT, SECOND), HOST), ((CONTRACT,), OTHER_HOST)):
        bench.commit(*ids, host=host)
        assert bench.only(SendReply).kind == "BadRequest"
        assert not bench.has(StoreContracts)
    bench.commit(CONTRACT)
    assert bench.has(StoreContracts)


def test_what_is_held_or_loads_to_be_is_dropped_when_its_host_no_longer_wants_it() -> None:
    bench = Bench()
    worker = bench.hold()
    bench.register(SECOND, hold=True)
    bench.release(CONTRACT, SECOND, host=OTHER_HOST)
    assert set(bench.catalogue.pending) == {CONTRACT, SECOND}
    bench.release(CONTRACT, SECOND, SECOND + 1)
    assert [reply.kind for reply in bench.effects if isinstance(reply, SendReply)] == ["VmRegistrationFailed", ""]
    assert worker.state is DOOMED
    assert not bench.catalogue.pending
    bench.serve()


def test_what_is_held_goes_with_its_host() -> None:
    bench = Bench()
    worker = bench.hold()
    bench.register(SECOND, hold=True)
    bench.register(SECOND + 1)
    bench.effects = bench.dispatcher.host_left(HOST, bench.now_ns)
    assert worker.state is DOOMED
    assert set(bench.catalogue.pending) == {SECOND + 1}, "what is for all is registered all the same"


def test_what_is_held_is_dropped_after_its_limit() -> None:
    bench = Bench()
    worker = bench.hold()
    bench.pass_ms(59_900)
    assert worker.state is not DOOMED
    bench.pass_ms(200)
    assert worker.state is DOOMED
    assert not bench.catalogue.pending
    bench.commit(CONTRACT)
    assert bench.only(SendReply).kind == "BadRequest"


def test_a_private_contract_is_not_held() -> None:
    bench = Bench()
    bench.register(private=True, hold=True)
    assert bench.only(SendReply).code is AbiErrorCode.BAD_REQUEST
    assert not bench.catalogue.pending
