"""TCP endpoints as people write them: `tcp://HOST:PORT`, on this machine only.

It reads text; it resolves and connects nothing. TCP beyond loopback would carry everything unprotected, so it is
refused until there are keys.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

TCP: Final = "tcp://"
PORT_MAX: Final = 65535

_SHAPE: Final = re.compile(r"tcp://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:/]+)):(?P<port>[0-9]{1,5}|\*)")
_LOCALHOST: Final = "127.0.0.1"


class TcpEndpoint(NamedTuple):
    """An address on loopback.

    Attributes:
        address: "127.0.0.1", or another of 127.0.0.0/8, or "::1".
        port: 0 where the system is to choose one.
    """

    address: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        """Whether the address is one of IPv6."""
        return ":" in self.address

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.is_ipv6 else self.address
        return f"{TCP}{host}:{self.port}"


def parse_tcp(text: str, *, may_choose: bool = False) -> TcpEndpoint:
    """Read `tcp://HOST:PORT`.

    Args:
        text: HOST is an address of 127.0.0.0/8, [::1] or localhost.
        may_choose: whether the port may be 0 or *.

    Raises:
        ValueError: it is of another form, or not on loopback; says what is wrong.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"endpoint {text!r} is not of the form tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    port = 0 if match["port"] == "*" else int(match["port"])
    low = 0 if may_choose else 1
    if not low <= port <= PORT_MAX:
        raise ValueError(f"endpoint {text!r}: port {match['port']} is outside {low}..{PORT_MAX}")
    return TcpEndpoint(_loopback(text, match["six"] or match["host"]), port)


def _loopback(text: str, host: str) -> str:
    if host == "localhost":
        return _LOCALHOST
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"endpoint {text!r}: {host!r} is neither an IP address nor localhost") from None
    if not address.is_loopback:
        raise ValueError(
            f"endpoint {text!r}: {address} is not on loopback (127.0.0.0/8, ::1); "
            "TCP beyond loopback needs keys, which are not available yet"
        )
    return str(address)
