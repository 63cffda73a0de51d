"""The contract `host.textstats@1` seen from the host: its args, its result, and the same counts made in Python."""

import collections
import re
import struct
from dataclasses import dataclass
from pathlib import Path

CONTRACT = "host.textstats@1"
CONTRACT_DIRECTORY = Path(__file__).parent / "contract"
COUNT, DEREFERENCE_NULL, EXIT, LOOP = range(4)  # the contract's functions
FILE_SIZE_MAX = 4 << 20  # bytes; the largest of CPython's own are below 1 MiB


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the contract's `count` finds in one text; `Result` in `textstats.lua` is the same in C."""

    lines: int
    blank_lines: int
    words: int
    identifiers: int
    distinct_identifiers: int
    longest_line: int
    top_count: int
    top_name: bytes

    @classmethod
    def from_bytes(cls, out: bytes) -> "Statistics":
        """Read the `out` of a call.

        Args:
            out: RESULT.size bytes.

        Raises:
            struct.error: `out` has another size.
        """
        *numbers, name = RESULT.unpack(out)
        return cls(*[*numbers, name.rstrip(b"\0")])


RESULT = struct.Struct("<7Q64s")
TOP_NAME_MAX = 63  # bytes

TOKEN = re.compile(
    rb'''
      """ (?: [^"\\] | \\[\s\S] | "(?!"") )* (?:""")?
    | \'\'\' (?: [^'\\] | \\[\s\S] | '(?!\'\') )* (?:\'\'\')?
    | " (?: [^"\\\n] | \\[\s\S] )* "?
    | ' (?: [^'\\\n] | \\[\s\S] )* '?
    | \# [^\n]*
    | (?P<word> [0-9A-Za-z_\x80-\xff]+ ) (?P<prefix> (?=["']) )?
    ''',
    re.VERBOSE,
)
KEYWORDS = frozenset(
    b"False None True and as assert async await break class continue def del elif else except finally for "
    b"from global if import in is lambda nonlocal not or pass raise return try while with yield".split()
)


def count_in_python(source: bytes) -> Statistics:
    """Count as the contract does, by other means: the yardstick for its answers.

    Args:
        source: The text, any bytes.
    """
    lines = source.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    names = collections.Counter(
        match["word"]
        for match in TOKEN.finditer(source)
        if match["word"] and match["prefix"] is None and not match["word"][:1].isdigit()
    )
    for keyword in KEYWORDS & names.keys():
        del names[keyword]
    top_name, top_count = min(names.items(), key=lambda item: (-item[1], item[0]), default=(b"", 0))
    return Statistics(
        lines=len(lines),
        blank_lines=sum(not line.strip() for line in lines),
        words=len(source.split()),
        identifiers=names.total(),
        distinct_identifiers=len(names),
        longest_line=max(map(len, lines), default=0),
        top_count=top_count,
        top_name=top_name[:TOP_NAME_MAX],
    )


def encode_args(source: bytes) -> bytes:
    """Return the args of `count`: a u32 length, then the text."""
    return struct.pack("<I", len(source)) + source


def source_files(root: Path, limit: int | None = None) -> list[Path]:
    """Return the `.py` files below `root` in order, but no installed packages, and none above FILE_SIZE_MAX.

    Args:
        root: The standard library's directory.
        limit: At most so many; None for all.
    """
    installed = {"site-packages", "dist-packages"}
    found = (path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts))
    return sorted(path for path in found if path.is_file() and path.stat().st_size <= FILE_SIZE_MAX)[:limit]
