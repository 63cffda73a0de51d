"""TCP endpoints: read strictly, on loopback only, with errors that say what is wrong."""

import pytest

from luacell.protocol.endpoints import TcpEndpoint, parse_tcp


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("tcp://127.0.0.1:5555", "127.0.0.1", 5555),
        ("tcp://127.255.0.9:1", "127.255.0.9", 1),
        ("tcp://localhost:65535", "127.0.0.1", 65535),
        ("tcp://[::1]:5555", "::1", 5555),
        ("tcp://[0:0:0:0:0:0:0:1]:5555", "::1", 5555),
    ],
)
def test_address_on_loopback_is_read(text: str, address: str, port: int) -> None:
    endpoint = parse_tcp(text)
    assert endpoint == TcpEndpoint(address, port)
    assert parse_tcp(str(endpoint)) == endpoint
    assert endpoint.is_ipv6 == (address == "::1")


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*"])
def test_system_may_choose_the_port_of_a_broker_but_not_of_a_host(text: str) -> None:
    assert parse_tcp(text, may_choose=True) == TcpEndpoint("127.0.0.1", 0)
    with pytest.raises(ValueError, match=r"port [0*] is outside 1\.\.65535"):
        parse_tcp(text)


@pytest.mark.parametrize(
    "text",
    ["tcp://0.0.0.0:5555", "tcp://192.168.1.7:5555", "tcp://[::]:5555", "tcp://[2001:db8::1]:5555", "tcp://8.8.8.8:1"],
)
def test_address_beyond_loopback_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="needs keys, which are not available yet") as caught:
        parse_tcp(text)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://:5555",
        "tcp://127.0.0.1:http",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:123456",
        "tcp://127.0.0.1:5555/",
        "tcp://127.0.0.1:5555 ",
        "tcp://::1:5555",
        "tcp://user@127.0.0.1:5555/x",
        "TCP://127.0.0.1:5555",
        "udp://127.0.0.1:5555",
        "127.0.0.1:5555",
    ],
)
def test_other_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form tcp://HOST:PORT, such as tcp://127\.0\.0\.1:5555"):
        parse_tcp(text)


@pytest.mark.parametrize("text", ["tcp://example.org:5555", "tcp://127.0.0:5555", "tcp://127.0.0.01:5555", "tcp://*:1"])
def test_name_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither an IP address nor localhost"):
        parse_tcp(text)


@pytest.mark.parametrize("port", [65536, 99999])
def test_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port {port} is outside"):
        parse_tcp(f"tcp://127.0.0.1:{port}", may_choose=True)
