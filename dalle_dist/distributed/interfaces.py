"""The network interface between this machine and another, for gloo.

Left to itself gloo takes the one that the host's own name leads to, which on many systems is
loopback, or a slow network beside the fast one.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_REQUEST = struct.Struct("16sH2x4s8x")  # name; family and address of the answer


def address_of(host: str) -> str:
    """The host's IPv4 address as this machine sees it; empty where it has none."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def interface_towards(address: str) -> str:
    """Name of the interface by which this machine reaches an IPv4 address, which may be its own.

    Empty where there is none, or none that can be told.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # no packet is sent
            own = probe.getsockname()[0]
    except OSError:
        return ""
    if ipaddress.ip_address(own).is_loopback:
        return "lo" if "lo" in _names() else ""
    return next((name for name in _names() if _address(name) == own), "")


def own_addresses() -> list[str]:
    """IPv4 addresses by which other machines may reach this one, one of each interface."""
    found = [_address(name) for name in _names()]
    return [text for text in found if text and not ipaddress.ip_address(text).is_loopback]


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address(interface: str) -> str:
    request = _REQUEST.pack(interface.encode()[:15], socket.AF_INET, bytes(4))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
        except OSError:  # it has none
            return ""
    return socket.inet_ntoa(answer[20:24])
