"""HTTP requests to a CA: kept connections, one time limit per request, bounded answers.

Not here: what an answer means (`client`, `messages`, `problems`), and outbound requests to addresses
that users configure (`egress`).

Sources: RFC 8555 §6.1 (https, User-Agent), RFC 9110 §9.2.2 (what may be repeated), §15.4 (redirects).
"""

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urljoin

from certworker.ca.connection import Connection, Deadline, ProxyRefused, open_connection
from certworker.ca.http1 import Answer, NotHttp, TooLarge
from certworker.ca.proxies import Proxies
from certworker.ca.urls import Origin, Url, read_url
from certworker.errors import AnswerFault, CaError, SettingsError, TransportFault

ANSWER_LIMIT = 1024 * 1024
"""Bytes; the largest honest answer is a chain, far below this."""
TIME_LIMIT = timedelta(seconds=30)
"""For all of a request: look-up, connect, TLS, redirects, headers and body."""
MOST_REDIRECTS = 3


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP answer of the CA's, whatever its status."""

    url: str
    """Where it came from; not what was asked for if a GET was redirected."""
    status: int
    headers: Mapping[str, str]
    """Names in lower case; a field that came twice is joined with a comma."""
    body: bytes = field(repr=False)


class Http(Protocol):
    """What a client needs of HTTP; `Transport` is the real one, tests stand behind it with their own."""

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int = ANSWER_LIMIT,
        repeatable: bool = False,
    ) -> Response:
        """Return the answer whatever its status, or raise TransportFault or AnswerFault.

        A POST that is `repeatable` only reads: it may be sent again if a kept connection was closed
        under it. GET and HEAD always may.
        """
        ...


class Transport:
    """Asks CAs over HTTPS. Any number of threads may use it; each request has a connection to itself."""

    def __init__(
        self,
        ca_bundle: Path | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        time_limit: timedelta = TIME_LIMIT,
        allow_http: bool = False,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        """Trust `ca_bundle` (PEM) alone, or the system; `environ` may name proxies."""
        self._tls = _trust(ca_bundle)
        self._proxies = Proxies(environ or {})
        self._seconds = time_limit.total_seconds()
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._stopwatch = stopwatch
        self._headers = {"User-Agent": f"certworker/{version('certworker')}"}
        self._idle: dict[Origin, list[Connection]] = {}
        """The one used last is used next, so what a burst has opened ages and is closed by the CA."""
        self._lock = threading.Lock()
        self._closed = False
        self.connections_opened = 0

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int = ANSWER_LIMIT,
        repeatable: bool = False,
    ) -> Response:
        """See `Http.request`. A GET follows up to 3 redirects within its origin, nothing else does."""
        ask = _Request(method, url, body, {**self._headers, **(headers or {})}, max_bytes)
        deadline = Deadline(self._seconds, self._stopwatch)
        again = repeatable or method in ("GET", "HEAD")
        for _ in range(MOST_REDIRECTS + 1):
            answer = self._send(ask, deadline, again)
            target = _redirect(ask, answer)
            if target is None:
                break
            ask = _Request(method, target, body, ask.headers, max_bytes)
        return Response(ask.url, answer.status, answer.headers, answer.body)

    def close(self) -> None:
        """Close every kept connection, and those under way as soon as they are done."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _send(self, ask: "_Request", deadline: Deadline, again: bool) -> Answer:
        to = self._take_apart(ask.url)
        kept = self._take(to.origin)
        if kept is not None:
            try:
                return self._exchange(kept, to, ask, deadline)
            except TransportFault as fault:
                if not again or kept.answered or fault.kind != "reset":
                    raise
        try:
            fresh = open_connection(to.origin, self._proxies.find(*to.origin), self._tls, deadline)
        except (OSError, ProxyRefused) as error:
            raise _explain(error, ask.url, self._seconds) from error
        with self._lock:
            self.connections_opened += 1
        return self._exchange(fresh, to, ask, deadline)

    def _exchange(self, connection: Connection, to: Url, ask: "_Request", deadline: Deadline) -> Answer:
        """Send on `connection`; keep it if it can take another request, close it if anything went wrong."""
        try:
            answer = connection.exchange(ask.method, to.target, ask.body, ask.headers, ask.max_bytes, deadline)
        except (OSError, NotHttp, TooLarge) as error:
            connection.close()
            raise _explain(error, ask.url, self._seconds) from error
        except BaseException:
            connection.close()
            raise
        self._keep(to.origin, connection)
        return answer

    def _take(self, origin: Origin) -> Connection | None:
        while True:
            with self._lock:
                kept = self._idle.get(origin)
                connection = kept.pop() if kept else None
            if connection is None or connection.is_idle():
                return connection
            connection.close()

    def _keep(self, origin: Origin, connection: Connection) -> None:
        with self._lock:
            if not self._closed and connection.is_open:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()

    def _take_apart(self, url: str) -> Url:
        to = read_url(url)
        if to is None or to.origin.scheme not in self._schemes:
            detail = "only https addresses are asked; check ACME_DIRECTORY_URL"
            raise TransportFault("connect", ascii(url[:200]), detail)
        return to


class _Request(NamedTuple):
    method: str
    url: str
    body: bytes | None
    headers: Mapping[str, str]
    max_bytes: int


def _trust(ca_bundle: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_bundle)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"ACME_CA_BUNDLE: cannot read certificates from {ca_bundle}: {_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Debian's Python sets it: a connection that was cut would pass for one that was closed.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def _redirect(ask: _Request, answer: Answer) -> str | None:
    """Return where to follow to; None to take the answer as it is."""
    location = answer.headers.get("location")
    if ask.method != "GET" or answer.status not in (301, 302, 303, 307, 308) or not location:
        return None
    target = urljoin(ask.url, location)
    here, there = read_url(ask.url), read_url(target)
    if here is None or there is None or here.origin != there.origin or here.origin.scheme != "https":
        return None
    return target.partition("#")[0]


def _explain(error: Exception, url: str, seconds: float) -> CaError:
    """Say what an operator can check; the order of the cases matters, each is a kind of the one below."""
    match error:
        case ProxyRefused():
            return TransportFault("proxy", url, f"{error}; check HTTPS_PROXY and NO_PROXY")
        case TooLarge():
            return AnswerFault(url, "it is larger than allowed")
        case ssl.SSLCertVerificationError():
            return TransportFault("tls", url, _explain_certificate(error))
        case socket.gaierror():
            return TransportFault(
                "dns", url, f"the name does not resolve ({_reason(error)}); check the address and DNS"
            )
        case TimeoutError():
            return TransportFault(
                "timeout", url, f"no complete answer within {seconds:g} s; check network and firewall"
            )
        case ConnectionRefusedError():
            return TransportFault("connect", url, "the connection was refused; check address and port")
        case ConnectionError() | ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return TransportFault("reset", url, "the connection was closed before the answer was complete")
        case ssl.SSLError():
            return TransportFault("tls", url, f"no TLS connection ({_reason(error)}); check address, port and proxies")
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            detail = "this process may open no more files; raise its limit (LimitNOFILE of the unit, ulimit -n)"
            return TransportFault("connect", url, detail)
        case OSError():
            return TransportFault("connect", url, f"no connection ({_reason(error)}); check network and firewall")
        case _:
            return AnswerFault(url, f"it is not HTTP ({error})")


def _explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message.lower().rstrip(".")
    if "expired" in reason or "not yet valid" in reason:
        return f"its TLS certificate is not trusted ({reason}); check this machine's clock, and the CA"
    if "mismatch" in reason:
        return f"its TLS certificate is for another name ({reason}); check the address"
    return f"its TLS certificate is not trusted ({reason}); set ACME_CA_BUNDLE to a PEM file of the CA to trust"


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return str(reason).replace("_", " ").lower()
