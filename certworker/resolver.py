"""DNS as an outsider sees it: what a name resolves to, for hints. Never decides anything."""

import socket
from dataclasses import dataclass

import dns.exception
import dns.rdatatype
import dns.resolver

_TIME_LIMIT = 5.0


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
    except dns.resolver.NXDOMAIN:
        return Addresses(trouble="the name does not exist in DNS (NXDOMAIN)")
    except dns.exception.Timeout:
        return Addresses(trouble="DNS did not answer in time")
    except (dns.exception.DNSException, OSError, ValueError) as error:
        return Addresses(trouble=f"DNS could not be asked, or answered with an error ({type(error).__name__})")


def _resolver(server: str | None) -> dns.resolver.Resolver:
    if server is None:
        return dns.resolver.Resolver()
    host, _, port = server.rpartition(":")
    resolver = dns.resolver.Resolver(configure=False)
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    resolver.nameservers = [str(address[4][0]) for address in found[:1]]
    resolver.port = int(port)
    return resolver


def _records(resolver: dns.resolver.Resolver, dns_name: str, kind: str) -> tuple[str, ...]:
    try:
        answer = resolver.resolve(dns_name, kind, lifetime=_TIME_LIMIT, search=False)
    except dns.resolver.NoAnswer:
        return ()
    return tuple(sorted(record.to_text() for record in answer))
