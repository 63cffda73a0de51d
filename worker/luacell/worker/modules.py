"""The operator's C modules: loaded once in the worker host, so that workers which can open no file have them.

A worker that is forked later finds each under the very path it was loaded by (`package.loadlib`), for the linker then
opens nothing. Which module a path is shows in how it ends: `require "a.b"` takes `…/a/b.so`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from luacell.protocol.confinement import C_MODULES_TEXT_MAX

C_MODULES_MAX: Final = 64


class ModuleUnavailable(Exception):
    """A C module cannot be loaded; the text names its path."""


def load_c_modules(paths: Iterable[str]) -> tuple[str, ...]:
    """Load C modules for good. They resolve LuaJIT's symbols, which importing `luacell.worker.vm` has made global.

    Args:
        paths: of shared objects.

    Returns:
        Their absolute paths, by which Lua finds them.

    Raises:
        ModuleUnavailable: one is missing or no shared object, lacks a symbol, has a path that cannot be printed, or
            there are too many.
    """
    loaded: list[str] = []
    for path in paths:
        if len(loaded) == C_MODULES_MAX:
            raise ModuleUnavailable(f"--c-module was given more than {C_MODULES_MAX} times")
        absolute = str(Path(path).absolute())
        if not absolute.endswith(".so"):
            raise ModuleUnavailable(f"C module {path!r} does not end with .so, so that it has no name")
        if not absolute.isprintable():  # an end of line, or bytes that are no UTF-8
            raise ModuleUnavailable(f"C module {path!r} has a path that cannot be printed")
        if len("\n".join([*loaded, absolute])) > C_MODULES_TEXT_MAX:
            raise ModuleUnavailable(f"the paths of C modules have more than {C_MODULES_TEXT_MAX} characters together")
        try:
            ctypes.CDLL(absolute, os.RTLD_NOW)
        except OSError as error:
            raise ModuleUnavailable(f"C module {path!r} cannot be loaded: {error}") from None
        loaded.append(absolute)
    return tuple(loaded)
