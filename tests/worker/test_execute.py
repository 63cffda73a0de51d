"""The worker's half of a call, in LuaJIT on real memory: marks, refusals, guarded calls and what they leave behind."""

from __future__ import annotations

import ctypes
import resource
import signal
import struct
import time
from collections.abc import Iterator

import pytest

from luacell.protocol.errors import AbiErrorCode
from luacell.protocol.headers import DONE, EXECUTE, HAS_ARGS, HAS_OUT, NOT_BEGUN, RETIRE, Done, Execute
from luacell.protocol.limits import ERROR_TEXT_MAX, MIB
from luacell.protocol.slots import (
    PAYLOAD_OFFSET,
    SLOT_SHIFT,
    Answer,
    SlotShape,
    read_answer,
    write_generation,
    write_withdrawn,
)
from luacell.worker.sandbox.levels import STACK_SIZE
from luacell.worker.vm import OutOfLuaMemory, Vm

BOTH = HAS_ARGS | HAS_OUT
ARENA, INDEX, GENERATION = 7, 3, 5
LIMIT_US = 60_000_000
FILL = 0xAA


class Memory:
    """A pair of segments as a worker maps it, filled with bytes that nobody wrote."""

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        self._args = (ctypes.c_ubyte * shape.args_bytes)()
        self._out = (ctypes.c_ubyte * shape.out_bytes)()
        self.args = memoryview(self._args).cast("B")
        self.out = memoryview(self._out).cast("B")
        self.out[:] = bytes([FILL]) * shape.out_bytes
        self.addresses = ctypes.addressof(self._args), ctypes.addressof(self._out)

    def put(self, position: int, args: bytes, generation: int = GENERATION) -> None:
        start = position * self.shape.args_stride
        write_generation(self.args, start, generation)
        write_withdrawn(self.args, start, 0)
        self.args[start + PAYLOAD_OFFSET : start + PAYLOAD_OFFSET + len(args)] = args

    def withdraw(self, position: int, sequence: int) -> None:
        write_withdrawn(self.args, position * self.shape.args_stride, sequence)

    def words(self, position: int) -> Answer:
        return read_answer(self.out, position * self.shape.out_stride)

    def payload(self, position: int, size: int) -> bytes:
        start = position * self.shape.out_stride + PAYLOAD_OFFSET
        return bytes(self.out[start : start + size])


class Bench:
    """A VM with memory and buffers of its own; calls are numbered as a broker numbers them."""

    def __init__(self) -> None:
        self.shape = SlotShape.for_payloads(64, 64, 4)
        self.memory = Memory(self.shape)
        self._records = ctypes.create_string_buffer(4 * EXECUTE.size)
        self._answers = ctypes.create_string_buffer(4 * DONE.size)
        self.vm = Vm(ctypes.addressof(self._records), ctypes.addressof(self._answers))
        self.sequence = 0
        self.map()

    def map(self, index: int = INDEX) -> None:
        shape = self.shape
        self.vm.add_pair(ARENA, index, *self.memory.addresses, shape.count, shape.args_stride, shape.out_stride)

    def load(self, source: str | bytes, memory: int = 16 * MIB, **modules: bytes) -> tuple[str, str]:
        chunk = source.encode() if isinstance(source, str) else source
        return self.vm.load(chunk, "=probe", modules, memory)

    def function(self, body: str, memory: int = 16 * MIB) -> None:
        loaded = self.load(f'local ffi = require("ffi") return function(fn_id, args, out) {body}\nend', memory)
        assert loaded == ("", "")

    def record(self, **fields: int) -> Execute:
        self.sequence += 1
        record = Execute(
            sequence=self.sequence,
            deadline_ns=time.monotonic_ns() + LIMIT_US * 1000,
            fn_id=0,
            limit_us=LIMIT_US,
            arena=ARENA,
            slot=INDEX << SLOT_SHIFT,
            generation=GENERATION,
            flags=BOTH,
            args_size=8,
            out_size=8,
        )
        return record._replace(**fields)

    def run(self, record: Execute, index: int = 0) -> bool:
        EXECUTE.pack_into(self._records, index * EXECUTE.size, *record)
        return self.vm.execute(index, index) is not None

    def done(self, index: int = 0) -> Done:
        return Done._make(DONE.unpack_from(self._answers, index * DONE.size))

    def call(self, args: bytes = b"12345678", **fields: int) -> Done:
        """Put arguments into slot 0, run one call there and return its answer."""
        self.memory.put(0, args)
        assert self.run(self.record(**fields))
        return self.done()

    def error(self) -> tuple[int, str]:
        """Run a call that fails; return code and text."""
        done = self.call()
        assert done.error_size <= ERROR_TEXT_MAX
        return done.code, self.memory.payload(0, done.error_size).decode("utf-8", "surrogateescape")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench whose timer is taken back, so that the test's own time limit holds again."""
    before = signal.getitimer(signal.ITIMER_REAL)
    bench = Bench()
    yield bench
    signal.setitimer(signal.ITIMER_REAL, *before)


@pytest.fixture
def worker_stack() -> Iterator[None]:
    """The stack that a worker has; the usual 8 MiB do not last for recursion through C."""
    before = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_SIZE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, before)


# -- marks ----
def test_call_is_answered_in_the_slot_and_in_the_record(bench: Bench) -> None:
    bench.function("ffi.copy(out, args, 8)")
    done = bench.call(b"abcdefgh")
    assert done == Done(bench.sequence, AbiErrorCode.OK, 8, 0, 0)
    assert bench.memory.words(0)._replace(cpu_us=0) == Answer(bench.sequence, bench.sequence, AbiErrorCode.OK, 8, 0, 0)
    assert bench.memory.payload(0, 8) == b"abcdefgh"


def test_while_it_runs_a_call_has_begun_and_is_not_done(bench: Bench) -> None:
    bench.function("ffi.copy(out, out - 128, 16)")
    bench.call(out_size=16)
    bench.call(out_size=16)
    assert struct.unpack("<QQ", bench.memory.payload(0, 16)) == (2, 1)


def test_marks_of_other_slots_are_left_alone(bench: Bench) -> None:
    bench.function("")
    bench.memory.put(2, b"")
    assert bench.run(bench.record(slot=INDEX << SLOT_SHIFT | 2))
    assert bench.memory.words(2).done == bench.sequence
    for other in (0, 1, 3):
        assert bench.memory.words(other).done == int.from_bytes(bytes([FILL]) * 8, "little")


def test_records_of_one_message_are_answered_each_in_its_place(bench: Bench) -> None:
    bench.function("out[0] = fn_id")
    for index in range(4):
        bench.memory.put(index, b"")
        assert bench.run(bench.record(slot=INDEX << SLOT_SHIFT | index, fn_id=10 + index), index)
    assert [bench.done(index).sequence for index in range(4)] == [1, 2, 3, 4]
    assert [bench.memory.payload(index, 1) for index in range(4)] == [b"\n", b"\x0b", b"\x0c", b"\r"]


# -- calls that are not run ----
COUNT = "count = (count or 0) + 1 out[0] = count"


def test_call_past_its_deadline_is_not_begun(bench: Bench) -> None:
    bench.function(COUNT)
    for late_ns in (0, 1, 10**9):
        done = bench.call(deadline_ns=time.monotonic_ns() - late_ns)
        assert done == Done(bench.sequence, AbiErrorCode.OK, 0, 0, NOT_BEGUN)
        assert bench.memory.words(0)._replace(cpu_us=0) == Answer(0, bench.sequence, AbiErrorCode.OK, 0, 0, NOT_BEGUN)
    bench.call()
    assert bench.memory.payload(0, 1) == b"\1", "the function ran for the first time"


def test_withdrawn_call_is_not_begun_and_its_slot_is_left_alone(bench: Bench) -> None:
    bench.function(COUNT)
    bench.memory.put(0, b"")
    record = bench.record()
    bench.memory.withdraw(0, record.sequence)
    before = bytes(bench.memory.out)
    assert bench.run(record)
    assert bench.done() == Done(record.sequence, AbiErrorCode.OK, 0, 0, NOT_BEGUN)
    assert bytes(bench.memory.out) == before
    assert bench.run(bench.record()), "another call in the slot is not meant"
    assert bench.done().flags == 0
    assert bench.memory.payload(0, 1) == b"\1"


def test_call_whose_slot_has_gone_on_without_it_is_not_begun(bench: Bench) -> None:
    bench.function(COUNT)
    bench.memory.put(0, b"")
    earlier, later = bench.record(), bench.record()
    bench.memory.withdraw(0, later.sequence)
    assert bench.run(earlier)
    assert bench.done() == Done(earlier.sequence, AbiErrorCode.OK, 0, 0, NOT_BEGUN)
    bench.call()
    assert bench.memory.payload(0, 1) == b"\1"


@pytest.mark.parametrize("generation", [GENERATION - 1, GENERATION + 1, 0, 2**32 - 1])
def test_call_of_another_generation_is_stale(bench: Bench, generation: int) -> None:
    bench.function(COUNT)
    done = bench.call(generation=generation)
    assert done.code == AbiErrorCode.STALE_HANDLE
    assert b"generation" in bench.memory.payload(0, done.error_size)
    words = bench.memory.words(0)
    assert words.done == bench.sequence
    assert words.begun != bench.sequence
    bench.call()
    assert bench.memory.payload(0, 1) == b"\1"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"slot": INDEX << SLOT_SHIFT | 4}, id="a position behind the last"),
        pytest.param({"slot": INDEX << SLOT_SHIFT | 0xFFFF}, id="the largest position"),
        pytest.param({"args_size": 4096 - 128 + 1}, id="args beyond the slot"),
        pytest.param({"out_size": 8192 - 128 + 1}, id="out beyond the slot"),
        pytest.param({"args_size": 2**32 - 1, "out_size": 2**32 - 1}, id="sizes that overflow"),
    ],
)
def test_call_that_does_not_fit_is_refused_and_nothing_is_written(bench: Bench, fields: dict[str, int]) -> None:
    bench.function(COUNT)
    before = bytes(bench.memory.out)
    assert bench.call(b"", **fields) == Done(bench.sequence, AbiErrorCode.BAD_REQUEST, 0, 0, 0)
    assert bytes(bench.memory.out) == before


def test_pair_that_is_not_mapped_is_asked_for(bench: Bench) -> None:
    bench.function(COUNT)
    bench.memory.put(0, b"")
    record = bench.record(slot=(INDEX + 1) << SLOT_SHIFT)
    assert not bench.run(record)
    bench.map(INDEX + 1)
    assert bench.run(record)
    assert bench.done().sequence == record.sequence
    bench.vm.remove_pair(ARENA, INDEX + 1)
    assert not bench.run(record)
    assert not bench.run(bench.record(arena=ARENA + 1))


# -- buffers ----
def test_out_is_zero_where_nothing_was_written_and_untouched_behind(bench: Bench) -> None:
    bench.function("out[1] = 1")
    bench.call(out_size=4)
    assert bench.memory.payload(0, 6) == b"\0\1\0\0" + bytes([FILL]) * 2


@pytest.mark.parametrize(
    ("flags", "seen"), [(0, "nil nil"), (HAS_ARGS, "args nil"), (HAS_OUT, "nil out"), (BOTH, "args out")]
)
def test_absent_buffers_are_nil(bench: Bench, flags: int, seen: str) -> None:
    bench.function("error((args and 'args' or 'nil') .. ' ' .. (out and 'out' or 'nil'), 0)")
    bench.memory.put(0, b"")
    assert bench.run(bench.record(flags=flags, args_size=0, out_size=0))
    text = bench.memory.payload(0, bench.done().error_size).decode()
    assert text.startswith(f"Lua exception: {seen}\n")


def test_largest_payloads_fit_the_slot(bench: Bench) -> None:
    bench.function("ffi.copy(out, args, 3968)")
    sent = bytes(range(256)) * 16
    bench.call(sent[:3968], args_size=3968, out_size=8064)
    assert bench.memory.payload(0, 8064) == sent[:3968] + bytes(4096)


def test_what_is_returned_is_told_once_on_stderr(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.function("return 42")
    assert [bench.call().code for _ in range(3)] == [0, 0, 0]
    assert capfd.readouterr().err.count("the contract returned a number") == 1


# -- errors ----
@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param("error('text')", "probe:1: text", id="a text"),
        pytest.param("error('text', 0)", "text", id="a text without place"),
        pytest.param("error(42)", "42", id="a number"),
        pytest.param("error(true)", "true", id="a boolean"),
        pytest.param("error(nil)", "nil", id="nil"),
        pytest.param("error()", "nil", id="nothing"),
        pytest.param("error({})", "table: 0x", id="a table"),
        pytest.param(
            "error(setmetatable({}, { __tostring = function() return 'mine' end }))", "mine", id="with a text"
        ),
        pytest.param(
            "error(setmetatable({}, { __tostring = function() error('again') end }))",
            "(error object of type table)",
            id="whose text raises",
        ),
        pytest.param(
            "error(setmetatable({}, { __tostring = function() return 42 end }))",
            "(error object of type table)",
            id="whose text is none",
        ),
        pytest.param("error(newproxy())", "userdata: ", id="userdata"),
        pytest.param("error(ffi.new('int[2]'))", "cdata<int [2]>: 0x", id="cdata"),
        pytest.param("error(coroutine.create(function() end))", "thread: 0x", id="a coroutine"),
        pytest.param("error(1ULL)", "1ULL", id="a 64-bit integer"),
        pytest.param("local x = nil; x.y = 1", "attempt to index local 'x'", id="an index of nil"),
        pytest.param("coroutine.wrap(function() error('inside') end)()", "probe:1: inside", id="from a coroutine"),
        pytest.param("local function f() return f() + 1 end f()", "stack overflow", id="recursion"),
        pytest.param(
            "local t = setmetatable({}, {}) getmetatable(t).__index = function(t, k) return t[k] end return t.x",
            "stack overflow",
            id="recursion in a metamethod",
        ),
        pytest.param(
            "local function f(s) return (s:gsub('.', f)) end f('x')", "stack overflow", id="recursion through gsub"
        ),
        pytest.param("error('\\255\\254')", "\udcff\udcfe", id="no UTF-8"),
        pytest.param("error('with\\0zero')", "with\0zero", id="a zero byte"),
        pytest.param("unpack({}, 1, 1e7)", "too many results to unpack", id="unpack"),
        pytest.param("string.find('x', ('()'):rep(33))", "too many captures", id="captures"),
        pytest.param("assert(load(('('):rep(1e5)))", "chunk has too many syntax levels", id="parentheses"),
        pytest.param("ffi.cdef('x')", "declaration", id="a bad declaration"),
        pytest.param("return ffi.C.no_such_function()", "no_such_function", id="a missing symbol"),
        pytest.param("return python.eval('1')", "global 'python'", id="Python"),
    ],
)
@pytest.mark.usefixtures("worker_stack")
def test_error_is_told_with_the_best_text_there_is(bench: Bench, body: str, text: str) -> None:
    bench.function(body)
    code, told = bench.error()
    assert code == AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert told.startswith("Lua exception: ")
    assert text in told
    assert bench.done().flags == 0
    assert bench.memory.words(0)[:3] == (bench.sequence, bench.sequence, code)
    bench.function("out[0] = 1")
    assert bench.call().code == 0, "the VM goes on"


def test_traceback_names_the_function(bench: Bench) -> None:
    bench.function("local function inner() error('text') end inner()")
    _, told = bench.error()
    assert "\nstack traceback:\n" in told
    assert "in function 'inner'" in told


@pytest.mark.parametrize("size", [1000, 3072, 3073, 4096, 100_000, 8 * MIB])
def test_long_error_is_cut_and_says_so(bench: Bench, size: int) -> None:
    bench.function(f"error(('x'):rep({size}), 0)", memory=64 * MIB)
    code, told = bench.error()
    assert code == AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert ("truncated" in told) == (size > 3072)
    assert "stack traceback" in told, "a long text leaves room for it"


def test_long_traceback_is_cut(bench: Bench) -> None:
    names = ("f" * 400, "g" * 400)
    body = f"local {names[1]} local function {names[0]}(n) {names[1]}(n) return 1 end "
    body += f"function {names[1]}(n) if n == 0 then error('deep') end {names[0]}(n - 1) return 1 end {names[0]}(50)"
    bench.function(body)
    _, told = bench.error()
    assert len(told.encode()) <= ERROR_TEXT_MAX
    assert told.endswith("… (truncated)")
    assert "deep" in told


@pytest.mark.parametrize("code", [1, 9, 1024, 2**32 - 1])
def test_fail_chooses_code_and_text(bench: Bench, code: int) -> None:
    bench.function(f"luacell.fail({code}, 'because')")
    assert bench.error() == (code, "because")
    bench.function(f"luacell.fail({code})")
    assert bench.error() == (code, "")
    bench.function(f"luacell.fail({code}, setmetatable({{}}, {{ __tostring = function() return 'object' end }}))")
    assert bench.error() == (code, "object")


def test_fail_with_a_long_text_is_cut(bench: Bench) -> None:
    bench.function("luacell.fail(1024, ('x'):rep(1e6))")
    code, told = bench.error()
    assert (code, len(told.encode())) == (1024, ERROR_TEXT_MAX)
    assert told.endswith("… (truncated)")


@pytest.mark.parametrize("code", ["0", "10", "1023", "2^32", "-1", "1.5", "0/0", "1/0", "'1'", "nil", "{}", "1024ULL"])
def test_fail_with_another_code_is_an_error_at_its_place(bench: Bench, code: str) -> None:
    bench.function(f"luacell.fail({code}, 'because')")
    number, told = bench.error()
    assert number == AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert told.startswith("Lua exception: probe:1: luacell.fail: code ")


def test_fail_passes_through_coroutines_and_can_be_caught(bench: Bench) -> None:
    bench.function("coroutine.wrap(function() luacell.fail(1024, 'inside') end)()")
    assert bench.error() == (1024, "inside")
    bench.function("pcall(luacell.fail, 1024, 'caught')")
    assert bench.call().code == 0
    bench.function("pcall(luacell.fail, 1024, 'caught') error('later', 0)")
    code, told = bench.error()
    assert code == AbiErrorCode.HOST_CONTRACT_CALL_FAILED
    assert told.startswith("Lua exception: later\n")
    bench.function("local _, caught = pcall(luacell.fail, 1024, 'again') error(caught, 0)")
    assert bench.error() == (1024, "again")


def test_each_failure_keeps_its_own_code_and_text(bench: Bench) -> None:
    bench.function("local _, first = pcall(luacell.fail, 6, 'six') pcall(luacell.fail, 7, 'seven') error(first, 0)")
    assert bench.error() == (6, "six")
    hidden = "{ __tostring = function() pcall(luacell.fail, 6, 'six') return 'seen' end }"
    bench.function(f"error(setmetatable({{}}, {hidden}))")
    code, told = bench.error()
    assert (code, told.splitlines()[0]) == (AbiErrorCode.HOST_CONTRACT_CALL_FAILED, "Lua exception: seen")
    bench.function("local _, failure = pcall(luacell.fail, 6, 'six') failure.code = 8 error(failure, 0)")
    assert bench.error() == (6, "six")


@pytest.mark.parametrize("before", ["", "\ufeff", "#!/usr/bin/luajit\n", "-- a comment\n", "\ufeff#!x\r\n"])
@pytest.mark.parametrize("form", ["function() end", "return function() end", "local f = function() end return f"])
def test_chunk_may_begin_as_files_do(bench: Bench, before: str, form: str) -> None:
    assert bench.load(before + form) == ("", "")
    assert bench.load(before + form + " -- and end with a comment") == ("", "")


@pytest.mark.parametrize("chunk", ["nil) or (function() end", "function() end) --", "(function() end"])
def test_chunk_must_parse_by_itself(bench: Bench, chunk: str) -> None:
    assert bench.load(chunk)[0] == "load"


def test_code_of_one_call_is_not_that_of_the_next(bench: Bench) -> None:
    bench.function("if fn_id == 1 then luacell.fail(1024, 'chosen') end error('plain', 0)")
    assert bench.call(fn_id=1).code == 1024
    assert bench.call(fn_id=0).code == AbiErrorCode.HOST_CONTRACT_CALL_FAILED


# -- memory ----
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("local s = 'x' while true do s = s .. s end", id="strings"),
        pytest.param("local t = {} for i = 1, 1e9 do t[i] = { i } end", id="tables"),
        pytest.param(
            "local f = function() end while true do local g = f f = function() return g end end", id="closures"
        ),
        pytest.param("local t = {} while true do t[#t + 1] = coroutine.create(function() end) end", id="coroutines"),
        pytest.param(
            "kept = kept or {} while true do kept[#kept + 1] = ('x'):rep(1e5) .. #kept end", id="what is kept"
        ),
    ],
)
def test_memory_that_runs_out_ends_the_vm(bench: Bench, body: str) -> None:
    bench.function(body, memory=8 * MIB)
    try:
        done = bench.call()
    except OutOfLuaMemory:  # there was none left for the answer either; the process answers in its place
        return
    assert done.code == AbiErrorCode.OUT_OF_MEMORY
    assert done.flags == RETIRE
    assert b"not enough memory" in bench.memory.payload(0, done.error_size)


# -- a contract that alters its surroundings ----
@pytest.mark.parametrize(
    "poison",
    [
        "math = nil io = nil os = nil string = nil table = nil debug = nil coroutine = nil bit = nil",
        "local all = _G for name in pairs(all) do all[name] = nil end",
        "math.floor = function() error('poison') end",
        "io.stderr = nil",
        "xpcall, pcall, type, tostring, tonumber, rawequal, error = nil",
        "string.sub = nil debug.traceback = nil",
        "getmetatable('').__index = nil",
        "package.loaded.ffi = nil package.loaders = nil require = nil",
        "setmetatable(_G, { __index = function() error('poison') end, __newindex = function() error('poison') end })",
        "luacell.fail = nil luacell = nil",
        "collectgarbage('stop') jit.off()",
        "debug.sethook(function() end, '', 1)",
    ],
)
def test_contract_that_poisons_its_globals_is_still_served(bench: Bench, poison: str) -> None:
    bench.function(f"if fn_id == 1 then {poison} elseif fn_id == 2 then local x = nil; x() end out[0] = 7 return 1")
    assert bench.call(fn_id=1).code == 0
    assert bench.call(limit_us=LIMIT_US // 2).code == 0
    assert bench.memory.payload(0, 1) == b"\7"
    assert bench.call(fn_id=2).code == AbiErrorCode.HOST_CONTRACT_CALL_FAILED


# -- loading ----
@pytest.mark.parametrize("source", ["function() end", "return function() end", "return print"])
def test_chunk_with_a_function_is_loaded(bench: Bench, source: str) -> None:
    assert bench.load(source) == ("", "")


@pytest.mark.parametrize("source", ["42", "", "return {}", "return nil"])
def test_chunk_without_a_function_is_of_another_type(bench: Bench, source: str) -> None:
    problem, kind = bench.load(source)
    assert problem == "type"
    assert kind in ("number", "nil", "table")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("return +", "probe:1: unexpected symbol near"),
        ("error('no', 0)", "no\nstack traceback:"),
        ("error('no')", "probe:1: no"),
        ("luacell.fail(1024, 'not here')", "not here"),
        (b"\x1bLJ\x02\x00", "wrong mode"),
        (b"\x1bLua", "wrong mode"),
        (b"return '\xff\xfe", "unfinished string"),
        ("require('absent')", "no module 'absent' in the contract's directory"),
        ("require('broken')", "broken.lua:1:"),
        ("require('fails')", "fails.lua:2: at load"),
        ("require('ring')", "loop or previous error"),
    ],
)
def test_chunk_that_does_not_load_gives_its_reason(bench: Bench, source: str | bytes, reason: str) -> None:
    modules = {"broken": b"return (", "fails": b"\nerror('at load')", "ring": b"return require('ring')"}
    problem, told = bench.load(source, 8 * MIB, **modules)
    assert problem == "load"
    assert reason in told


def test_chunk_that_needs_more_memory_than_there_is_does_not_load(bench: Bench) -> None:
    with pytest.raises(OutOfLuaMemory):
        bench.load("local t = {} while true do t[#t + 1] = {} end", 8 * MIB)


def test_reason_of_any_length_is_cut(bench: Bench) -> None:
    problem, told = bench.load("error(('x'):rep(1e6))")
    assert problem == "load"
    assert "truncated" in told
    assert len(told) <= 3072


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_bytecode_cut_anywhere_is_refused(bench: Bench, cut: int) -> None:
    bench.load("return function(_, _, out) ffi = require('ffi') end")
    bytecode = b"\x1bLJ\x02\x00\x08=probe2\x00\x03\x02\x00\x03\x00\x055\x00\x00\x00%\x01\x01\x00L\x00\x02\x00" + bytes(
        40
    )
    problem, _ = bench.load(bytecode[: cut + 1])
    assert problem == "load"


def test_own_modules_come_before_the_system_s_and_are_loaded_once(bench: Bench) -> None:
    source = "local a, b = require('cjson'), require('cjson') local sum = a.n + (a == b and 1 or 0) "
    source += "return function(_, _, out) out[0] = sum end"
    assert bench.load(source, 16 * MIB, cjson=b"times = (times or 0) + 1 return { n = times }") == ("", "")
    bench.call()
    assert bench.memory.payload(0, 1) == b"\2"
