"""Crashes made again: what a crash record says, as a deployment directory and a call.

It decides what is to be deployed and called, from the record alone; it starts no service and writes no file. A call of
an instance is made on the contract's default instance: what the other had been through is not on record.

    recorded   function id with IN_INSTANCE, 16 bytes that name the instance, arguments
    made       function id,                                                   arguments
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luacell.cli.console import UsageError
from luacell.protocol.confinement import DEFAULT, stricter
from luacell.protocol.limits import KIB, MIB
from luacell.protocol.messages import API_MODULE, CREATE, DESTROY, FETCH, FUNCTION_MASK, IN_INSTANCE, Settings

if TYPE_CHECKING:
    from luacell.client import Crash, CrashInfo

MANIFEST: Final = "luacell.toml"
TIMEOUT_MIN_S: Final = 0.1  # a fresh service is slower than one that is warm; and no worker is killed sooner
INSTANCE_HEAD_SIZE: Final = 16  # bytes that name an instance, before the arguments

_API: Final = "api.toml"
_RESERVED: Final = ":"  # begins the names of what is among modules without being one
_NAME_MAX: Final = 255  # bytes of a file's name


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A crash as it can be made again.

    Attributes:
        contract: as a bridge takes it: "host.kv@1.2.0", or the id where that is all that is known.
        fn_id: of the call.
        args: its arguments.
        out_size: bytes that it may write.
        source_file: where the contract's source stands in the directory.
        source: it.
        chunk_name: of it, as recorded.
        files: all others of the directory, `luacell.toml` included; none where the contract is known by id alone, for
            such a contract is registered, not deployed.
        sandbox: the level that its worker had.
        c_modules: paths of the C modules that its worker host had loaded.
        timeout: seconds for the call; None for as long as the contract says.
    """

    contract: str | int
    fn_id: int
    args: bytes
    out_size: int
    source_file: str
    source: bytes
    chunk_name: str
    files: dict[str, bytes]
    sandbox: str
    c_modules: tuple[str, ...]
    timeout: float | None

    @property
    def service_options(self) -> list[str]:
        """Options of `luacell serve` by which a service has the floor and the C modules of the one that recorded it.

        At `default` the linker opens C modules as they are asked for.
        """
        if self.sandbox == DEFAULT:
            return []
        return ["--sandbox", self.sandbox, *(word for path in self.c_modules for word in ("--c-module", path))]

    @classmethod
    def of(cls, crash: Crash) -> Reproduction:
        """Read a record.

        Raises:
            UsageError: the call cannot be made again; the text says why.
        """
        info = crash.info
        api = crash.modules.get(API_MODULE)
        fn_id, args = info.fn_id, crash.args or b""
        if info.args_kept < info.args_size:
            raise UsageError(
                f"crash {info.id}: of {info.args_size} bytes of arguments {info.args_kept} are on record: the call "
                "cannot be made again",
                f"`luacell crash show {info.id}` shows what there is",
            )
        if api is not None:
            fn_id, args = _without_instance(info, args)
        sandbox = stricter(crash.settings.sandbox, crash.sandbox or DEFAULT)
        timeout = None if crash.budget is None else max(crash.budget, TIMEOUT_MIN_S)
        name = info.contract.partition("@")[0]
        contract = f"{name}@{info.version}" if info.version else info.contract_id
        modules = {name: text for name, text in crash.modules.items() if not name.startswith(_RESERVED)}
        files = {_path_of(name): text for name, text in modules.items()}
        source_file = _source_file(crash.source, files)
        files.pop(source_file, None)
        if isinstance(contract, str):
            if api is not None:
                files[_API] = api
            settings = replace(crash.settings, sandbox=sandbox)
            manifest = manifest_of(contract, source_file, settings, is_typed=api is not None)
            files = {MANIFEST: manifest.encode(), **files}
        return cls(
            contract,
            fn_id,
            args,
            info.out_size,
            source_file,
            crash.source,
            crash.chunk_name,
            files,
            sandbox,
            crash.c_modules,
            timeout,
        )

    def write(self, directory: Path, source: bytes) -> None:
        """Write the directory.

        Args:
            directory: an empty one.
            source: of the contract, the recorded one or another.
        """
        for name, text in {**self.files, self.source_file: source}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)


def _without_instance(info: CrashInfo, args: bytes) -> tuple[int, bytes]:
    """Return function id and arguments of a typed call, without what names an instance.

    Raises:
        UsageError: the call was about instances alone, and means nothing without them.
    """
    if info.fn_id < IN_INSTANCE:
        return info.fn_id, args
    function = info.fn_id & FUNCTION_MASK
    if function == CREATE:
        return IN_INSTANCE | CREATE, args
    if function in (DESTROY, FETCH):
        deed = "destroyed instances" if function == DESTROY else "fetched the result of an earlier one"
        raise UsageError(f"crash {info.id}: the call {deed}: it cannot be made again alone")
    return function, args[INSTANCE_HEAD_SIZE:]


def _path_of(module: str) -> str:
    """Return the file of a module within a directory; its name came from whoever registered it."""
    parts = module.split(".")
    if not all(part and "/" not in part and "\0" not in part for part in parts):
        raise UsageError(f"module {module!r} has a name that no file in a directory can have")
    if any(len(part.encode()) > _NAME_MAX - len(".lua") for part in parts):
        raise UsageError(f"module {module[:40]!r}… has a name that is too long for a file")
    return "/".join(parts) + ".lua"


def _source_file(source: bytes, files: dict[str, bytes]) -> str:
    """Return the file that the contract's source is: a module of its directory, else a file of its own."""
    found = next((name for name, text in files.items() if text == source), None)
    name = "contract"
    while found is None and f"{name}.lua" in files:
        name += "_"
    return found or f"{name}.lua"


def manifest_of(contract: str, source_file: str, settings: Settings, *, is_typed: bool) -> str:
    """Write a `luacell.toml`: what is as usual is left out."""
    usual = Settings(run_limit_us=settings.deadline_us)
    lines = ['api = "api.toml"', ""] if is_typed else []
    lines += [f"[contract.{_quoted(contract)}]", f"source = {_quoted(source_file)}"]
    for name, value in settings.as_fields().items():
        if value != getattr(usual, name):
            lines.append(f"{name.removesuffix('_us')} = {_WRITERS.get(name, json.dumps)(value)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _duration(microseconds: int) -> str:
    for unit, size in (("s", 1_000_000), ("ms", 1_000)):
        if microseconds % size == 0:
            return f'"{microseconds // size}{unit}"'
    return f'"{microseconds}us"'


def _size(count: int) -> str:
    for unit, size in (("MiB", MIB), ("KiB", KIB)):
        if count and count % size == 0:
            return f'"{count // size}{unit}"'
    return f'"{count}B"'


def _paths(lines: str) -> str:
    return json.dumps(lines.split("\n"), ensure_ascii=False)


_WRITERS: Final[dict[str, Callable[[Any], str]]] = {
    "deadline_us": _duration,
    "run_limit_us": _duration,
    "memory": _size,
    "max_output": _size,
    "max_rss": _size,
    "read": _paths,
    "write": _paths,
}
