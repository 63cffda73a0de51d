"""Deployment directories: `luacell.toml`, the Lua sources beside it, and what they say of each contract.

It reads and checks files; it registers nothing. Unknown keys are errors, with the key that was probably meant.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from luacell.client.function import LuaFunction
from luacell.protocol.api import Api, ApiError, contracts_named, find_contract, parse
from luacell.protocol.api.positions import Positions
from luacell.protocol.confinement import DEFAULT, GRANTS_TEXT_MAX, SANDBOX_LEVELS
from luacell.protocol.errors import LuacellError
from luacell.protocol.identity import ContractRef
from luacell.protocol.limits import (
    CALLS_IN_FLIGHT_MAX,
    DEADLINE_DEFAULT_US,
    DEADLINE_MAX_US,
    HELD_CONTRACTS_MAX,
    KIB,
    LOG_LINES_DEFAULT,
    LOG_LINES_MAX,
    MAX_CALLS_LIMIT,
    MEMORY_DEFAULT,
    MEMORY_MAX,
    MEMORY_MIN,
    MIB,
    OUTPUT_PER_CALL_MAX,
    QUEUE_LIMIT,
    QUEUE_MAX,
    RSS_MAX,
    RSS_MIN,
    SOURCE_MAX,
    WORKERS_PER_CONTRACT_MAX,
)
from luacell.protocol.messages import API_MODULE, REQUIRES_MODULE, UNIT_MODULE, UNIT_NAME_MAX, Settings

T = TypeVar("T")

MANIFEST: Final = "luacell.toml"
MODULES_MAX: Final = 1000

REQUIRES_MAX: Final = 256

_TOP_KEYS: Final = ("name", "api", "requires", "contract")
_CONTRACT_KEYS: Final = (
    "source",
    "workers",
    "deadline",
    "run_limit",
    "memory",
    "max_queue",
    "max_in_flight",
    "max_output",
    "max_log_lines",
    "max_calls",
    "max_rss",
    "sandbox",
    "read",
    "write",
    "network",
    "stateless",
    "idempotent",
)
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)")
_DURATION_US: Final = {"us": 1, "ms": 1_000, "s": 1_000_000}
_SIZE: Final = re.compile(r"([0-9]+)\s*(B|KiB|MiB|GiB)")
_PLACE: Final = re.compile(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", re.DOTALL)
_SIZE_BYTES: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}


class DeploymentError(LuacellError):
    """A deployment directory is not right; the text names file, table, key, value and what is allowed.

    Where more than one thing is wrong, each has a line.
    """


@dataclass(frozen=True, slots=True)
class Unit:
    """One contract of a directory."""

    ref: ContractRef
    function: LuaFunction
    settings: Settings


@dataclass(frozen=True, slots=True)
class Deployment:
    """A directory that was read whole.

    Attributes:
        units: its contracts, in the order of the file.
        modules: its Lua files by `require` name, and under reserved names what a registration carries besides.
        directory: where it was read.
        name: of the unit: `name` in the file, else the directory's.
        requires: contracts of others, with the least version that will do.
        api: what its api.toml declares; None where its contracts are raw.
    """

    units: tuple[Unit, ...]
    modules: dict[str, bytes]
    directory: Path
    name: str
    requires: tuple[ContractRef, ...]
    api: Api | None

    @classmethod
    def read(cls, directory: Path) -> Deployment:
        """Read and check a directory.

        Raises:
            DeploymentError: something is missing, malformed, unknown or too large.
        """
        manifest, tables = _read_manifest(directory / MANIFEST)
        _refuse_unknown(manifest, (), tables, _TOP_KEYS)
        contracts = tables.get("contract")
        if not isinstance(contracts, dict) or not contracts:
            manifest.note(f'{manifest.at("contract")}: names no contract; add a table [contract."host.name@1"]')
            contracts = {}
        if len(contracts) > HELD_CONTRACTS_MAX:
            manifest.note(
                f"{manifest.at('contract')}: has {len(contracts)} contracts; the limit is {HELD_CONTRACTS_MAX}"
            )
        no_requires: tuple[ContractRef, ...] = ()
        no_api: tuple[bytes, Api | None] = b"", None
        no_modules: dict[str, bytes] = {}
        name = manifest.noting(lambda: _read_name(directory, manifest, tables), "")
        requires = manifest.noting(lambda: _read_requires(manifest, tables), no_requires)
        api_text, api = manifest.noting(lambda: _read_api(directory, manifest, tables), no_api)
        is_undescribed = api is None and "api" in tables  # it is wrong: what it says of the contracts is not known
        units = tuple(_read_units(directory, manifest, contracts, api, is_undescribed=is_undescribed))
        modules = manifest.noting(lambda: _read_modules(directory), no_modules)
        manifest.check()
        if api_text:
            modules[API_MODULE] = api_text
        modules[UNIT_MODULE] = name.encode()
        modules[REQUIRES_MODULE] = "\n".join(f"{each.name}@{each.version}" for each in requires).encode()
        for unit in units:
            _check_total(directory, unit, modules)
        return cls(units, modules, directory, name, requires, api)

    @staticmethod
    def name_of(directory: Path) -> str:
        """Return the name of a directory's unit, whatever else is wrong with it.

        Raises:
            DeploymentError: its `luacell.toml` cannot be read, or the name is none.
        """
        manifest, tables = _read_manifest(directory / MANIFEST)
        return _read_name(directory, manifest, tables)


class _Manifest:
    """A luacell.toml as errors name it: with line and column."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._positions = Positions(text)
        self._problems: list[str] = []

    def note(self, problem: str) -> None:
        """Remember what is wrong, to go on and find what else is."""
        self._problems.append(problem)

    def noting(self, read: Callable[[], T], default: T) -> T:
        """Return what is read; where it is wrong, note that and return the default."""
        try:
            return read()
        except DeploymentError as error:
            self.note(str(error))
            return default

    def check(self) -> None:
        """Return where nothing is wrong.

        Raises:
            DeploymentError: with all that was noted.
        """
        if self._problems:
            raise DeploymentError("\n".join(self._problems))

    def at(self, *keys: str) -> str:
        """Return the place of a value, or of the table that lacks it."""
        line, column = self._positions.value(keys)
        return f"{self._path}:{line}:{column}"

    def at_key(self, *keys: str) -> str:
        """Return the place of a key itself."""
        line, column = self._positions.key(keys)
        return f"{self._path}:{line}:{column}"


def _read_manifest(path: Path) -> tuple[_Manifest, dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
        return _Manifest(path, text), tables
    except OSError as error:
        raise DeploymentError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        place = _PLACE.fullmatch(str(error))
        where = f"{path}:{place[2]}:{place[3]}: {place[1]}" if place else f"{path}: {error}"
        raise DeploymentError(where) from None
    except RecursionError:
        raise DeploymentError(f"{path}: arrays or tables are nested too deeply") from None


class _Table:
    """One contract's table, with errors that say where."""

    def __init__(self, manifest: _Manifest, name: str, values: dict[str, Any]) -> None:
        self._manifest = manifest
        self._name = name
        self.values = values

    def _where(self, key: str) -> str:
        return f'{self._manifest.at("contract", self._name, key)}: [contract."{self._name}"]'

    def error(self, key: str, wanted: str) -> DeploymentError:
        return DeploymentError(f"{self._where(key)}: {key} = {self.values.get(key)!r} is not {wanted}")

    def lacks(self, key: str) -> DeploymentError:
        return DeploymentError(f"{self._where(key)}: lacks {key}")

    def wrong(self, key: str, wanted: str, default: T) -> T:
        """Note a value that is wrong, and go on with another."""
        self._manifest.note(str(self.error(key, wanted)))
        return default

    def boolean(self, key: str) -> bool:
        value = self.values.get(key, False)
        return value if isinstance(value, bool) else self.wrong(key, "true or false", False)

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            return self.wrong(key, f"an integer in {low}..{high}", default)
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        return value if isinstance(value, str) else self.wrong(key, "a text", default)

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        value = self.text(key, default)
        return value if value in known else self.wrong(key, f"one of {', '.join(known)}", default)

    def paths(self, key: str) -> str:
        """Return the absolute paths of a list, one a line."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) and _is_path(each) for each in value):
            return self.wrong(key, 'a list of absolute paths such as ["/srv/data"]', "")
        text = "\n".join(value)
        if len(text) > GRANTS_TEXT_MAX:
            return self.wrong(key, f"a list of paths with at most {GRANTS_TEXT_MAX} characters together", "")
        return text

    def duration_us(self, key: str, default: int) -> int:
        if key not in self.values:
            return default
        match = _DURATION.fullmatch(str(self.values[key]))
        value = round(float(match[1]) * _DURATION_US[match[2]]) if match else 0
        if not 1 <= value <= DEADLINE_MAX_US:
            wanted = f'a duration such as "250ms", over 0 and at most {DEADLINE_MAX_US // 1_000_000} s'
            return self.wrong(key, wanted, default)
        return value

    def size(self, key: str, default: int, low: int, high: int) -> int:
        if key not in self.values:
            return default
        match = _SIZE.fullmatch(str(self.values[key]))
        value = int(match[1]) * _SIZE_BYTES[match[2]] if match else -1
        if not low <= value <= high:
            example = _in_words(default or low).replace(" ", "")
            wanted = f'a size such as "{example}", from {_in_words(low)} to {_in_words(high)}'
            return self.wrong(key, wanted, default)
        return value


def _in_words(size: int) -> str:
    """Write a number of bytes as `luacell.toml` has it, in the largest unit that has no fraction."""
    unit = "MiB" if size % MIB == 0 and size else "KiB" if size % KIB == 0 and size else "B"
    return f"{size // _SIZE_BYTES[unit]} {unit}"


def _read_name(directory: Path, manifest: _Manifest, tables: dict[str, Any]) -> str:
    """Read the name of the unit; without one it is the last part of the directory's path."""
    name = tables.get("name", directory.resolve().name)
    if not isinstance(name, str) or not 0 < len(name) <= UNIT_NAME_MAX or not _is_text(name) or not name.isprintable():
        raise DeploymentError(
            f"{manifest.at('name')}: name = {name!r} is not a text of 1..{UNIT_NAME_MAX} printable characters"
        )
    return name


def _read_requires(manifest: _Manifest, tables: dict[str, Any]) -> tuple[ContractRef, ...]:
    wanted = f'a list of at most {REQUIRES_MAX} texts such as "host.logger@1.2"'
    given = tables.get("requires", [])
    if not isinstance(given, list) or len(given) > REQUIRES_MAX or not all(isinstance(each, str) for each in given):
        raise DeploymentError(f"{manifest.at('requires')}: requires = {given!r} is not {wanted}")
    try:
        return tuple(ContractRef.of(each) for each in given)
    except ValueError as error:
        raise DeploymentError(f"{manifest.at('requires')}: requires: {error}") from None


def _read_api(directory: Path, manifest: _Manifest, tables: dict[str, Any]) -> tuple[bytes, Api | None]:
    """Read the description that a manifest names, where it names one."""
    if "api" not in tables:
        return b"", None
    relative = tables["api"]
    if not isinstance(relative, str) or not (directory / relative).resolve().is_relative_to(directory.resolve()):
        raise DeploymentError(f"{manifest.at('api')}: api = {relative!r} is not a file in {directory}")
    path = directory / relative
    if path.exists() and not path.is_file():
        raise DeploymentError(f"{manifest.at('api')}: api = {relative!r} is not a regular file")
    try:
        raw = path.read_bytes()
        return raw, parse(raw.decode("utf-8"), str(path))
    except OSError as error:
        text = f"{manifest.at('api')}: api = {relative!r} is not a readable file ({error.strerror})"
        raise DeploymentError(text) from None
    except (ApiError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path}: {error}" if isinstance(error, UnicodeDecodeError) else str(error)) from None


def _read_ref(manifest: _Manifest, name: str, api: Api | None) -> ContractRef:
    """Read the name of a contract's table; the description says its version, and the major where there is but one."""
    where = f'{manifest.at_key("contract", name)}: [contract."{name}"]'
    if api is None:
        try:
            return ContractRef.of(name)
        except ValueError as error:
            raise DeploymentError(f"{where}: {error}") from None
    plain, at, given = name.partition("@")
    found = [
        each for each in contracts_named(api, plain) if not at or str(each.version.major) == given.partition(".")[0]
    ]
    if len(found) == 1:
        return ContractRef(int(found[0].id), plain, found[0].version)
    declared = ", ".join(map(str, api.host_contracts)) or "none"
    problem = "names several versions; write its major" if found else "is not declared in the api"
    raise DeploymentError(f"{where}: {problem}; declared: {declared}")


def _read_units(
    directory: Path, manifest: _Manifest, contracts: dict[str, Any], api: Api | None, *, is_undescribed: bool
) -> Iterator[Unit]:
    """Yield the contracts that can be read; note what is wrong with the others.

    Where their api cannot be read (`is_undescribed`), none can, and what it does not concern is looked at.
    """
    no_source: LuaFunction | None = None
    for title, values in contracts.items():
        try:
            table = _read_table(manifest, title, values)
            settings = _read_settings(table)
            source = manifest.noting(partial(_read_source, directory, table), no_source)
            if is_undescribed:
                continue
            ref = _read_ref(manifest, title, api)
            if settings.workers > 1:
                _check_workers(table, ref, settings.stateless, api)
            if source is not None:
                yield Unit(ref, source, settings)
        except DeploymentError as error:
            manifest.note(str(error))


def _read_table(manifest: _Manifest, name: str, values: object) -> _Table:
    if not isinstance(values, dict):
        raise DeploymentError(f"{manifest.at('contract', name)}: contract.{name} is not a table")
    _refuse_unknown(manifest, ("contract", name), values, _CONTRACT_KEYS)
    return _Table(manifest, name, values)


def _read_settings(table: _Table) -> Settings:
    deadline_us = table.duration_us("deadline", DEADLINE_DEFAULT_US)
    sandbox = table.choice("sandbox", DEFAULT, SANDBOX_LEVELS)
    read, write, network = table.paths("read"), table.paths("write"), table.boolean("network")
    granted = next((key for key, value in (("read", read), ("write", write), ("network", network)) if value), None)
    if granted is not None and sandbox != DEFAULT:
        wanted = f"to be had at sandbox = {sandbox!r}; only {DEFAULT!r} has grants"
        read, write, network = table.wrong(granted, wanted, ("", "", False))
    return Settings(
        deadline_us=deadline_us,
        run_limit_us=table.duration_us("run_limit", deadline_us),
        memory=table.size("memory", MEMORY_DEFAULT, MEMORY_MIN, MEMORY_MAX),
        workers=table.integer("workers", 1, 1, WORKERS_PER_CONTRACT_MAX),
        stateless=table.boolean("stateless"),
        idempotent=table.boolean("idempotent"),
        sandbox=sandbox,
        read=read,
        write=write,
        network=network,
        max_queue=table.integer("max_queue", QUEUE_MAX, 1, QUEUE_LIMIT),
        max_in_flight=table.integer("max_in_flight", CALLS_IN_FLIGHT_MAX, 1, CALLS_IN_FLIGHT_MAX),
        max_output=table.size("max_output", OUTPUT_PER_CALL_MAX, 0, OUTPUT_PER_CALL_MAX),
        max_log_lines=table.integer("max_log_lines", LOG_LINES_DEFAULT, 1, LOG_LINES_MAX),
        max_calls=table.integer("max_calls", 0, 0, MAX_CALLS_LIMIT),
        max_rss=table.size("max_rss", 0, RSS_MIN, RSS_MAX),
    )


def _check_workers(table: _Table, ref: ContractRef, stateless: bool, api: Api | None) -> None:
    """Refuse several workers where state lives in one: raw contracts say otherwise, instances have each their own."""
    if api is not None and find_contract(api, ref.id).singleton:
        raise table.error("workers", "1: a singleton is one instance, which lives in one worker")
    if api is None and not stateless:
        raise table.error("workers", "1, and more need stateless = true: state lives in one worker")


def _read_source(directory: Path, table: _Table) -> LuaFunction:
    given = table.values.get("source")
    if not isinstance(given, str):
        raise table.error("source", "a text") if "source" in table.values else table.lacks("source")
    relative = Path(given)
    path = directory / relative
    if path.exists() and not path.is_file():
        raise table.error("source", "a regular file")
    if relative.is_absolute() or not path.resolve().is_relative_to(directory.resolve()):
        raise table.error("source", f"a file in {directory}")
    try:
        return LuaFunction(path.read_bytes(), chunk_name=f"@{relative}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise table.error("source", f"a readable Lua file ({reason})") from None


def _read_modules(directory: Path) -> dict[str, bytes]:
    """Read every Lua file of the directory, named as `require` names it."""
    modules: dict[str, bytes] = {}
    for path in sorted(directory.rglob("*.lua")):
        relative = path.relative_to(directory)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        name = ".".join(relative.with_suffix("").parts)
        if not _is_text(name):
            raise DeploymentError(f"{directory}: the name of {os.fsencode(relative)!r} is not UTF-8")
        modules[name] = path.read_bytes()
        if len(modules) > MODULES_MAX:
            raise DeploymentError(f"{directory} holds more than {MODULES_MAX} modules; {path} is one too many")
    return modules


def _is_path(path: str) -> bool:
    return path.startswith("/") and _is_text(path) and not {"\n", "\0"} & set(path)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_total(directory: Path, unit: Unit, modules: dict[str, bytes]) -> None:
    """Refuse what a registration could not carry: each contract travels with its source and all modules."""
    total = len(unit.function.source) + sum(len(name.encode()) + len(source) for name, source in modules.items())
    if total > SOURCE_MAX:
        raise DeploymentError(
            f"{directory}: {unit.ref} and the directory's modules have {total} bytes; the limit is {SOURCE_MAX}"
        )


def _refuse_unknown(
    manifest: _Manifest, table: tuple[str, ...], values: dict[str, Any], known: tuple[str, ...]
) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            where = f' [{table[0]}."{table[1]}"]' if table else ""
            manifest.note(f"{manifest.at_key(*table, key)}:{where} unknown key {key!r}{hint}")
