"""Which proxy, if any, stands between us and a CA: HTTPS_PROXY, HTTP_PROXY and NO_PROXY.

There is no standard for these variables; names, suffixes, ports, addresses and networks in NO_PROXY
mean what they mean to curl and Go. Everything goes through CONNECT, so a proxy never sees a request.
"""

import ipaddress
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from certworker.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that is asked to CONNECT."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    """Value of the Proxy-Authorization header (RFC 7617)."""


class Proxies:
    """What the environment says about proxies, read once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._by_scheme = {scheme: _read_proxy(environ, f"{scheme}_proxy") for scheme in ("https", "http")}
        spared = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        self._spared = [entry.strip().lower() for entry in spared.split(",") if entry.strip()]

    def find(self, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy for this origin; None to connect directly."""
        if any(_is_spared(entry, host.lower(), port) for entry in self._spared):
            return None
        return self._by_scheme[scheme]


def _read_proxy(environ: Mapping[str, str], name: str) -> Proxy | None:
    value = environ.get(name) or environ.get(name.upper()) or ""
    if not value:
        return None
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        host, port = url.hostname, url.port or 80
    except ValueError:
        host = None
    if not host or url.scheme != "http":
        # The value is not repeated: it may hold a password.
        raise SettingsError(f"{name.upper()}: must be the http:// address of a proxy")
    return Proxy(host, port, _authorization(url.username, url.password))


def _authorization(user: str | None, password: str | None) -> str | None:
    if user is None:
        return None
    return "Basic " + b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()


def _is_spared(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    name, colon, digits = entry.rpartition(":")
    if colon and digits.isdecimal() and (":" not in name or name.startswith("[")):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return host == entry or host.endswith(f".{entry}") or _is_inside(host, entry)


def _is_inside(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
