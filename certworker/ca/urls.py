"""URLs that we ask or are told to ask: absolute, http or https, nothing hidden in them (RFC 3986 §3)."""

import re
from functools import lru_cache
from typing import NamedTuple

_LONGEST = 2048
"""Characters."""
_REMEMBERED = 512
"""URLs; each of an order is read five times while it is in flight."""
_URL = re.compile(
    r"(?P<scheme>(?i:https?))://(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{0,5}))?"
    r"(?P<path>/[!-\"$->@-~]*)?(?P<query>\?[!-\"$-~]*)?(?:#[!-~]*)?"
)
_DEFAULT_PORTS = {"https": 443, "http": 80}


class Origin(NamedTuple):
    """Where a request goes (RFC 9110 §4.3.1)."""

    scheme: str
    host: str
    """Lower case; an IPv6 address has no brackets."""
    port: int

    @property
    def authority(self) -> str:
        """Host and port as a request names them; the scheme's own port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class Url(NamedTuple):
    """A URL taken apart."""

    origin: Origin
    target: str
    """Path and query, as a request line has them (RFC 9112 §3.2.1)."""


@lru_cache(_REMEMBERED)
def read_url(text: str) -> Url | None:
    """Take a URL apart; None for what is none, and for one with userinfo or a port that cannot be."""
    found = _URL.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    scheme, host, port, path, query = found.groups()
    scheme = scheme.lower()
    number = int(port) if port else _DEFAULT_PORTS[scheme]
    if not 0 < number < 65536:
        return None
    return Url(Origin(scheme, host.strip("[]").lower(), number), (path or "/") + (query or ""))


def is_url(text: str, *schemes: str) -> bool:
    """Say whether `text` is a URL of one of these schemes."""
    url = read_url(text)
    return url is not None and url.origin.scheme in schemes


@lru_cache(_REMEMBERED)
def host_of(text: str) -> tuple[str, int]:
    """Return host and port of a text that `is_url`."""
    url = read_url(text)
    return ("", 0) if url is None else (url.origin.host, url.origin.port)
