"""Upstream addresses: which hosts a target may name, and which places are certworker's own.

A proxy connects to whatever it is told to, so an address is the shortest way from a row to the machine's
own surroundings. Names are not resolved here: one that does not resolve must not block a publish. What they
resolve to is judged where that is done: by the agent for nginx, and for HAProxy by nobody (decision 16).

Sources: RFC 6890 (special addresses), RFC 6761 §6.3 (localhost), RFC 4291 §2.5.5.2 (IPv4 as IPv6), and
what the clouds document about their metadata services.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

LABELS = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
"""A host name of A-labels, lower case, without a final dot."""

_WRITTEN = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^\[\]:]*)):(?P<port>[0-9]{1,5})")
_LOOKS_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_NO_UPSTREAM = frozenset(
    map(ip_address, ("255.255.255.255", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16"))
)
"""Broadcast, and the cloud metadata services that are not link-local."""
_NO_UPSTREAM_NAMES = frozenset(["metadata.google.internal"])


def split_address(written: object) -> tuple[str, int]:
    """Split `host:port` or `[IPv6]:port`, as it stands, or raise ValueError; the parts are not looked at."""
    found = _WRITTEN.fullmatch(written) if isinstance(written, str) else None
    if found is None or (found["v6"] is not None and ":" not in found["v6"]):
        raise ValueError("an address is host:port, an IPv6 literal in brackets")
    return found["v6"] or found["host"], int(found["port"])


def find_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address that `text` is, None for a name; an IPv4 address written as IPv6 is itself."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def canonical_host(value: str) -> str:
    """Return the one form of a host: an IP literal as Python writes it, or a name in lower case."""
    name = value.lower()
    if name == "localhost":
        return "127.0.0.1"
    address = find_address(name)
    return name if address is None else str(address)


def check_target_host(value: str) -> str:
    """Return the canonical form of an upstream's address: an IP literal, or a name to be resolved.

    Addresses that reach the proxy's own surroundings instead of an upstream are refused.
    """
    host = canonical_host(value)
    if (address := find_address(host)) is not None:
        _check_address(address)
        return host
    # `127.1` and `2130706433` are no names: proxies and libc read them as addresses.
    if not value.isascii() or len(host) > 253 or not LABELS.fullmatch(host) or _LOOKS_NUMERIC.fullmatch(host):
        raise ValueError("an address is an IP literal or a host name, then a port")
    if host in _NO_UPSTREAM_NAMES:
        raise ValueError("an address of a metadata service is no upstream")
    return host


def _check_address(address: IPv4Address | IPv6Address) -> None:
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError("an address has no zone")
    if address.is_unspecified or address.is_multicast or address.is_link_local or address in _NO_UPSTREAM:
        raise ValueError("an unspecified, multicast, link-local, broadcast or metadata address is no upstream")


class Reserved:
    """The places that are certworker's own: a route to one of them would hand it to every visitor."""

    def __init__(self, addresses: Iterable[str]) -> None:
        """Take them as `host:port`; an unspecified host stands for every loopback address."""
        self._places: set[tuple[str, int]] = set()
        self._ports: set[int] = set()
        """Ports that are listened on at every address of a machine of ours."""
        for written in addresses:
            host, port = split_address(written)
            address = find_address(host)
            if address is not None and address.is_unspecified:
                self._ports.add(port)
            else:
                self._places.add((canonical_host(host), port))

    def holds(self, host: str, port: int) -> bool:
        """Say whether `host`, in its canonical form, and `port` are one of them."""
        address = find_address(host)
        local = address is not None and address.is_loopback
        return (host, port) in self._places or (local and port in self._ports)
