"""A visitor of the site: a TLS client that trusts one root and checks the name, like a browser."""

import hashlib
import http.client
import socket
import ssl
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from certworker.errors import CertworkerError

_LIMIT = 5.0
"""Seconds for one request."""
_PAUSE = 0.01
"""Seconds between two requests."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request showed."""

    status: int
    body: str
    fingerprint: str
    """SHA-256 of the leaf's DER, 64 lower-case hex digits."""
    version: str
    """For example `TLSv1.3`."""


class Site:
    """`https://<name>` on a loopback port, as seen by somebody who trusts nothing but `root_pem`."""

    def __init__(self, name: str, port: int, root_pem: str) -> None:
        self.name = name
        self.port = port
        self._trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._trust.load_verify_locations(cadata=root_pem)

    def ask(self, path: str = "/") -> Answer:
        """Make one connection and one request; raises OSError (TLS faults included) when there is no answer."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=_LIMIT) as plain,
            self._trust.wrap_socket(plain, server_hostname=self.name) as secure,
        ):
            leaf = secure.getpeercert(binary_form=True) or b""
            version = secure.version() or ""
            connection = http.client.HTTPConnection(self.name, self.port)
            connection.sock = secure
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read().decode(errors="replace")
            return Answer(answer.status, body, hashlib.sha256(leaf).hexdigest(), version)

    def refusal(self) -> str:
        """Return how the handshake is refused, in OpenSSL's words; CertworkerError if it is not."""
        try:
            self.ask()
        except ssl.SSLError as refused:
            return (refused.reason or str(refused)).lower().replace("_", " ")
        except OSError as failed:
            raise CertworkerError(f"https://{self.name}:{self.port}: no handshake at all: {failed}") from None
        raise CertworkerError(f"https://{self.name}:{self.port} answered before there was a certificate")


class Visitor:
    """Asks a site again and again, each time on a new connection, and counts, between enter and exit."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="visitor", daemon=True)
        self.shown = Counter[str]()
        """Good answers by the leaf that came with them."""
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(2 * _LIMIT)

    @property
    def requests(self) -> int:
        return self.shown.total() + len(self.failures)

    def wait_until_shown(self, count: int, besides: str = "", limit: float = 10) -> bool:
        """Wait for `count` good answers with another leaf than `besides`; say whether they came."""
        with self._changed:
            return self._changed.wait_for(lambda: self.shown.total() - self.shown[besides] >= count, limit)

    def _run(self) -> None:
        while not self._stopping.wait(_PAUSE):
            fault, fingerprint = "", ""
            try:
                answer = self._site.ask()
                fingerprint = answer.fingerprint
                fault = "" if answer.status == http.HTTPStatus.OK else f"status {answer.status}"
            except (OSError, http.client.HTTPException) as failed:
                fault = repr(failed)
            with self._changed:
                if fault:
                    self.failures.append(fault)
                else:
                    self.shown[fingerprint] += 1
                self._changed.notify_all()
