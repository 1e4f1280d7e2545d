"""What "host:port" texts mean."""

from __future__ import annotations

import ipaddress


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts, an IPv6 host without its brackets. The port is 0 where it is no number."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isascii() and port.isdigit() else 0


def is_loopback(address: str) -> bool:
    """Whether it can only be reached from this machine. Names other than localhost may be anything."""
    host, _ = host_and_port(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_every_address(address: str) -> bool:
    """Whether it means all addresses of a machine: good to listen on, none that others can reach."""
    host, _ = host_and_port(address)
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def clash(one: str, other: str) -> bool:
    """Whether a machine can't listen on both. Port 0 is any free one."""
    (host, port), (other_host, other_port) = (host_and_port(address) for address in (one, other))
    if port != other_port or port == 0 or (":" in host) != (":" in other_host):
        return False
    same = _numeric(host) == _numeric(other_host)
    return same or is_every_address(one) or is_every_address(other)


def _numeric(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host
