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
