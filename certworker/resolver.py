"""DNS as an outsider sees it: what a name resolves to, and who may issue for it, for hints. Never decides anything."""

import socket
import time
from dataclasses import dataclass

import dns.exception
import dns.name
import dns.resolver

_TIME_LIMIT = 5.0
_SHOWN = 400
"""Characters of CAA records: more than an honest set has."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What was found for one name."""

    a: tuple[str, ...] = ()
    aaaa: tuple[str, ...] = ()
    trouble: str | None = None
    """Why there is no answer, in a few words."""

    def __str__(self) -> str:
        if self.trouble is not None:
            return self.trouble
        found = [f"A {', '.join(self.a)}"] if self.a else ["no A record"]
        found.append(f"AAAA {', '.join(self.aaaa)} (a CA tries it first)" if self.aaaa else "no AAAA record")
        return ", ".join(found)


def look_up(dns_name: str, server: str | None = None) -> Addresses:
    """Return the A and AAAA records of a name, asked at `server` (`host:port`) or the system's resolver."""
    try:
        resolver = _resolver(server)
        return Addresses(_records(resolver, dns_name, "A"), _records(resolver, dns_name, "AAAA"))
    except (dns.exception.DNSException, OSError, ValueError) as error:
        return Addresses(trouble=_explain(error))


def look_up_caa(dns_name: str, server: str | None = None, seconds: float = _TIME_LIMIT) -> str:
    """Return the CAA records that count for a name, its own or those of the nearest name above (RFC 8659 §3)."""
    give_up_at = time.monotonic() + seconds
    try:
        resolver, name = _resolver(server), dns.name.from_text(dns_name)
        while name != dns.name.root:
            records = _find_records(resolver, name, "CAA", max(give_up_at - time.monotonic(), 0))
            if records:
                return f"CAA records of {name.to_text(omit_final_dot=True)}: {', '.join(records)[:_SHOWN]}"
            name = name.parent()
    except (dns.exception.DNSException, OSError, ValueError) as error:
        return _explain(error)
    return "no CAA record"


def _explain(error: Exception) -> str:
    match error:
        case dns.resolver.NXDOMAIN():
            return "the name does not exist in DNS (NXDOMAIN)"
        case dns.exception.Timeout():
            return "DNS did not answer in time"
        case _:
            return f"DNS could not be asked, or answered with an error ({type(error).__name__})"


def _resolver(server: str | None) -> dns.resolver.Resolver:
    if server is None:
        return dns.resolver.Resolver()
    host, _, port = server.rpartition(":")
    resolver = dns.resolver.Resolver(configure=False)
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    resolver.nameservers = [str(address[4][0]) for address in found[:1]]
    resolver.port = int(port)
    return resolver


def _find_records(resolver: dns.resolver.Resolver, name: dns.name.Name, kind: str, seconds: float) -> tuple[str, ...]:
    """Return the records of a name that may not exist."""
    try:
        return _records(resolver, name, kind, seconds)
    except dns.resolver.NXDOMAIN:
        return ()


def _records(
    resolver: dns.resolver.Resolver, name: dns.name.Name | str, kind: str, seconds: float = _TIME_LIMIT
) -> tuple[str, ...]:
    try:
        answer = resolver.resolve(name, kind, lifetime=seconds, search=False)
    except dns.resolver.NoAnswer:
        return ()
    return tuple(sorted(record.to_text() for record in answer))
