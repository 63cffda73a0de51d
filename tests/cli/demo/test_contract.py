"""The demo's contract, run in this process: its counts beside Python's; its deaths in others."""

import ctypes
import random
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from lupa.luajit21 import LuaRuntime

from luacell.cli.demo.counting import (
    CONTRACT,
    CONTRACT_DIRECTORY,
    COUNT,
    DEREFERENCE_NULL,
    EXIT,
    KEYWORDS,
    LOOP,
    RESULT,
    Statistics,
    count_in_python,
    encode_args,
    source_files,
)

ROOT = Path(sysconfig.get_path("stdlib"))

# What a worker does for a raw contract, in short: `require` from its directory, cdata pointers, luacell.fail.
HARNESS = r"""
local directory = ...
local ffi = require("ffi")
luacell = { fail = function(code, message) error(code .. ": " .. message, 0) end }

local function chunk(name)
  local file = io.open(directory .. "/" .. name, "rb")
  if not file then return "\n\tno " .. name end
  local source = file:read("*a")
  file:close()
  return assert(load(source, "@" .. name, "t"))
end

package.loaders = { package.loaders[1], function(module) return chunk(module .. ".lua") end }
local contract = chunk("textstats.lua")()
return function(fn_id, args, out)
  contract(fn_id, ffi.cast("uint8_t *", args), ffi.cast("uint8_t *", out))
end
"""


def load_contract() -> Callable[[int, bytes | None, int], bytes]:
    """Return `call(fn_id, args, out_size)` of the contract in a VM of its own."""
    vm = LuaRuntime(encoding="latin-1", register_eval=False, register_builtins=False)
    contract = vm.execute(HARNESS, str(CONTRACT_DIRECTORY))

    def call(fn_id: int, args: bytes | None, out_size: int) -> bytes:
        args_memory = ctypes.create_string_buffer(args, len(args)) if args is not None else None
        out = ctypes.create_string_buffer(out_size) if out_size else None
        contract(
            fn_id,
            ctypes.addressof(args_memory) if args_memory is not None else 0,
            ctypes.addressof(out) if out is not None else 0,
        )
        return out.raw if out is not None else b""

    return call


@pytest.fixture(scope="module")
def count() -> Callable[[bytes], Statistics]:
    call = load_contract()
    return lambda source: Statistics.from_bytes(call(COUNT, encode_args(source), RESULT.size))


def test_the_description_names_the_contract_and_its_source() -> None:
    described = tomllib.loads((CONTRACT_DIRECTORY / "luacell.toml").read_text())["contract"][CONTRACT]
    assert described == {"source": "textstats.lua", "deadline": "2s", "stateless": True, "workers": 4}
    assert (CONTRACT_DIRECTORY / described["source"]).is_file()


def test_a_small_program_counted_by_hand(count: Callable[[bytes], Statistics]) -> None:
    head = b'import os\n\n# os and os\ndef f(x):\n    """os \\""" os"""\n'
    source = head + b'  \t\n    return rb"os" + x * 0x1f - x'
    assert count(source) == Statistics(
        lines=7,
        blank_lines=2,
        words=19,
        identifiers=5,  # os, f, x, x, x
        distinct_identifiers=3,
        longest_line=32,
        top_count=3,
        top_name=b"x",
    )


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"\n",
        b" ",
        b"a",
        b"\xef\xbb\xbfa = 'b'",
        b"a\r\n\x0b\x0c\r\nb\0c",
        b"\\",
        b"a = 'b\\",
        b'"""a\\',
        b"'a\nb'",
        b"'a\\\nb' c",
        b'""a"""b"""" c',
        b'f"{x["a"]}"',
        b"'''a''b'''c",
        b"1e5 1_000 0xff .5j a.b1",
        b"b a c b a",
        b"class defclass",
        b"n" * 63 + b" " + b"o" * 64 + b" " + b"o" * 64,
        b"\xc3\xa4\xff = 1",
    ],
)
def test_edges_are_counted_as_in_python(source: bytes, count: Callable[[bytes], Statistics]) -> None:
    assert count(source) == count_in_python(source)


def test_every_keyword_of_lua_s_list_is_one_of_python_s(count: Callable[[bytes], Statistics]) -> None:
    assert count(b" ".join(KEYWORDS)).identifiers == 0
    assert count(b" ".join(KEYWORDS) + b" self").identifiers == 1


def test_random_text_is_counted_as_in_python(count: Callable[[bytes], Statistics]) -> None:
    seeded = random.Random(1)
    single = b"\"'\\\n#a_1 \t\r\0\xc3"
    pieces = [*(bytes([byte]) for byte in single), b'"""', b"'''", b"if"]
    for _ in range(5_000):
        source = b"".join(seeded.choices(pieces, k=seeded.randrange(40)))
        assert count(source) == count_in_python(source), source


def test_the_standard_library_is_counted_as_in_python(count: Callable[[bytes], Statistics]) -> None:
    files = source_files(ROOT)[::4]
    assert len(files) > 100
    for path in files:
        source = path.read_bytes()
        assert count(source) == count_in_python(source), path


def test_an_answer_is_the_same_byte_for_byte_each_time() -> None:
    call = load_contract()
    args = encode_args(Path(__file__).read_bytes())
    first = call(COUNT, args, RESULT.size)
    assert all(call(COUNT, args, RESULT.size) == first for _ in range(100))


def test_what_the_contract_cannot_do_it_refuses_with_a_code() -> None:
    call = load_contract()
    with pytest.raises(Exception, match=r"^8: count needs"):
        call(COUNT, None, RESULT.size)
    with pytest.raises(Exception, match=r"^8: count needs"):
        call(COUNT, encode_args(b"a"), 0)
    with pytest.raises(Exception, match=r"^6: host\.textstats has functions 0 to 3, not 4"):
        call(4, None, 0)


def start_in_a_process(fn_id: int) -> "subprocess.Popen[bytes]":
    """Call the function in a Python of its own, which prints a line before and one after."""
    command = [sys.executable, __file__, str(fn_id)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("fn_id", "status"), [(DEREFERENCE_NULL, -signal.SIGSEGV), (EXIT, 0)])
def test_a_deadly_function_ends_its_process(fn_id: int, status: int) -> None:
    with start_in_a_process(fn_id) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"before\n"
    assert process.returncode == status


@pytest.mark.timeout(60)
def test_the_endless_loop_does_not_end() -> None:
    with start_in_a_process(LOOP) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"before\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()
        assert process.stdout.read() == b""


if __name__ == "__main__":
    call_once = load_contract()
    print("before", flush=True)
    call_once(int(sys.argv[1]), None, 0)
    print("after", flush=True)
