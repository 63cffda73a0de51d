"""Regression tests: a crash as a pytest file that needs nothing but `luacell.client`.

The test fails for as long as the contract crashes, hangs or runs out of memory, and passes once it returns, or refuses
the call by an error of its own.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from luacell.cli.reproduction import Reproduction

if TYPE_CHECKING:
    from luacell.client import CrashInfo

_LINE: Final = re.compile(rb"[^\n]*\n|[^\n]+")
_PLAIN_MAX: Final = 96  # bytes in a line of a literal, of which few are escaped
_ESCAPES_MAX: Final = 8  # columns more than bytes that such a line may have: 96 + 8 + 8 of indentation are below 120
_ESCAPED_MAX: Final = 24  # bytes in any other: 24 * 4 columns
_UNSAFE: Final = re.compile(r"[^ -!#-\[\]-~]")  # in a text between double quotes

_SHORT: Final = {0x09: r"\t", 0x0A: r"\n", 0x0D: r"\r", 0x22: r"\"", 0x5C: r"\\"}

_DEPLOY: Final = """\
        for name, text in {{**FILES, {source_file}: SOURCE}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        bridge.deploy(tmp_path)
"""
_REGISTER: Final = """\
        bridge.register_host_contract(CONTRACT, LuaFunction(SOURCE))
"""
_TEST: Final = """\
def test_{title}_does_not_crash({fixtures}) -> None:
    with LuaHostBridge() as bridge:
{prepare}\
        try:
            bridge.call(CONTRACT, FUNCTION, ARGS, OUT_SIZE, timeout=TIMEOUT)
        except CallError as error:
            # An error of the contract's own is an answer; codes from 256 to 1023 are luacell's: a crash, a hang.
            if 256 <= error.code < 1024:
                pytest.fail(error.message)
"""


def regression_test(info: CrashInfo, made: Reproduction, test_file: Path, source_file: Path | None) -> str:
    """Write a test.

    Args:
        info: the crash.
        made: its call and contract.
        test_file: where the test will stand.
        source_file: where it reads the contract's source each time; None has the recorded source stand in the test.
    """
    function = f"function {info.function or made.fn_id}"
    when = time.strftime("%Y-%m-%d at %H:%M:%S UTC", time.gmtime(info.time))
    imports = ["CallError", *([] if made.files else ["LuaFunction"]), "LuaHostBridge"]
    parts = [
        f'"""{_plain(info.contract)}, {_plain(function)}: {_plain(info.cause)}.\n\n'
        f"Crash {info.id} of {when}, written by `luacell crash export`. The test fails for as long as\n"
        "the contract crashes, hangs or runs out of memory on this call; an error of its own is an answer.\n"
        '"""\n\n'
        "from __future__ import annotations\n\n"
        f"from pathlib import Path\n\nimport pytest\n\nfrom luacell.client import {', '.join(imports)}\n",
        f"CONTRACT = {_text(made.contract) if isinstance(made.contract, str) else f'0x{made.contract:016X}'}",
        f"FUNCTION = {made.fn_id}",
        f"OUT_SIZE = {made.out_size}",
        f"TIMEOUT = {made.timeout}",
        f"ARGS = {literal(made.args)}",
        f"SOURCE = {_source(made, test_file, source_file)}",
    ]
    if made.files:
        parts.append("FILES = {")
        parts += [f"    {_text(name)}: {literal(text, 4)}," for name, text in made.files.items()]
        parts.append("}")
    title = re.sub(r"\W+", "_", f"{info.contract}_{function}", flags=re.ASCII).strip("_")
    prepare = _DEPLOY.format(source_file=_text(made.source_file)) if made.files else _REGISTER
    test = _TEST.format(title=title, fixtures="tmp_path: Path" if made.files else "", prepare=prepare)
    text = "\n".join(parts) + f"\n\n\n{test}"
    return text if "Path(" in text or "tmp_path" in text else text.replace("from pathlib import Path\n\n", "")


def _source(made: Reproduction, test_file: Path, source_file: Path | None) -> str:
    if source_file is None:
        return literal(made.source)
    relative = os.path.relpath(source_file.resolve(), test_file.resolve().parent)
    return f"(Path(__file__).parent / {_text(relative)}).read_bytes()"


def literal(value: bytes, indent: int = 0) -> str:
    """Write bytes as a literal of Python: a line for each line of a text, none too long.

    Args:
        value: to be written.
        indent: of the line that it stands in, in spaces.
    """
    parts: list[bytes] = []
    for line in _LINE.findall(value):
        step = _PLAIN_MAX if len(repr(line)) <= len(line) + _ESCAPES_MAX else _ESCAPED_MAX
        parts += (line[at : at + step] for at in range(0, len(line), step))
    if len(parts) <= 1:
        return _line(value)
    margin = " " * indent
    return "(\n" + "".join(f"{margin}    {_line(part)}\n" for part in parts) + f"{margin})"


def _line(part: bytes) -> str:
    """Write bytes in one line, between double quotes where they have none."""
    shown = repr(part)
    return f'b"{shown[2:-1]}"' if '"' not in shown else shown


def _text(text: str) -> str:
    return '"' + _UNSAFE.sub(lambda found: _escaped(found[0]), text) + '"'


def _plain(text: str) -> str:
    """Keep of a text what cannot end a docstring."""
    return _UNSAFE.sub("?", text)


def _escaped(character: str) -> str:
    code = ord(character)
    return _SHORT.get(code) or (f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}")
