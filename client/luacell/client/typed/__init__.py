"""Typed values on the host's side: Python types for an api.toml, and packers generated from it.

Api ── HostTypes ──> dataclasses, enums
── compile_contract ──> a Marshaller for each function: pack(args) -> payload, unpack(payload) -> value
"""

from luacell.client.typed.marshaller import Marshaller, compile_contract, compile_function
from luacell.client.typed.values import HostTypes

__all__ = ["HostTypes", "Marshaller", "compile_contract", "compile_function"]
