"""The control plane over HTTPS: a `Source` for an agent on a gateway machine.

Trust is one pinned public key (`core.transit.EnrolmentToken.pin`): whoever answers has to prove it in the
TLS handshake, on every connection, before anything is sent. No CA, no name and no date is looked at.
"""

import hashlib
import hmac
import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlencode, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel

from certworker.core.delivery import collect_changes
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.snapshot import read_snapshot
from certworker.core.transit import (
    ChangesAnswer,
    EnrolAnswer,
    EnrolRequest,
    HeartbeatAnswer,
    HeartbeatBody,
    NodeToken,
    VersionAnswer,
    VersionDocument,
    read,
)
from certworker.errors import ControlPlaneError, InputError, NodeRefused, VersionRefused, WrongControlPlane
from certworker.node.control import PublishedVersion

REQUEST_LIMIT = timedelta(seconds=30)
"""For connecting, and for each further part of an answer to come."""
ANSWER_LIMIT = timedelta(minutes=2)
"""For all of an answer."""
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes: twenty times what a page of certificates usually has."""
FIRST_EVERY = timedelta(seconds=5)
"""How often heartbeats are sent until the control plane says."""
_CHUNK = 1 << 20
_CLOSE_LIMIT = 1.0
_SHOWN = 500

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the control plane is, and how it is known."""

    url: str
    """https, a host and maybe a port."""
    pin: str
    """SHA-256 of its public key (SubjectPublicKeyInfo, DER), 64 lower-case hex digits."""


class PinnedConnection(http.client.HTTPSConnection):
    """A connection that nothing is sent over before the other side has proved the pinned key."""

    def __init__(self, endpoint: Endpoint, limit: timedelta) -> None:
        parts = urlsplit(endpoint.url)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The handshake proves the key; whose it is, the pin says.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(parts.hostname or "", parts.port or 443, timeout=limit.total_seconds(), context=context)
        self._endpoint = endpoint

    def connect(self) -> None:
        super().connect()
        secure = self.sock
        assert isinstance(secure, ssl.SSLSocket)
        shown = pin_of(secure.getpeercert(binary_form=True) or b"")
        if not hmac.compare_digest(shown, self._endpoint.pin):
            self.close()
            raise WrongControlPlane(
                f"{self._endpoint.url} shows the key {shown or 'of no certificate'}, not {self._endpoint.pin} that was "
                "pinned at the enrolment: nothing was sent; check where the URL leads, or enrol this node anew"
            )


def pin_of(certificate_der: bytes) -> str:
    """Return the SHA-256 of a certificate's public key; "" if it has none that can be read."""
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except ValueError:
        return ""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


class Line:
    """One kept connection to the control plane, for one thread; `close` may come from another."""

    def __init__(self, endpoint: Endpoint, limit: timedelta = REQUEST_LIMIT) -> None:
        self._endpoint = endpoint
        self._limit = limit
        self._connection: PinnedConnection | None = None
        self._asking = threading.Lock()
        self._closed = threading.Event()

    def ask(
        self, method: str, path: str, token: NodeToken | None = None, body: BaseModel | None = None,
        wait: timedelta = timedelta(),
    ) -> bytes | None:  # fmt: skip
        """Return the answer's body, None for 204.

        `wait` is how long the answer may take beside the usual. Raises NodeRefused when a person has to
        enrol this machine, WrongControlPlane, and ControlPlaneError for everything else that went wrong.
        """
        with self._asking:
            for again in (True, False):
                again = again and self._connection is not None
                try:
                    return self._exchange(method, path, token, body, wait)
                except (http.client.HTTPException, OSError) as failed:
                    self._drop()
                    # The other side may have ended a connection that was idle. All we send can be sent twice.
                    if not again or self._closed.is_set() or isinstance(failed, TimeoutError):
                        raise ControlPlaneError(
                            f"cannot reach the control plane at {self._endpoint.url}: {_shown(failed)}"
                        ) from None
                except BaseException:
                    self._drop()
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End what is under way, and ask nothing more."""
        self._closed.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        if self._asking.acquire(timeout=_CLOSE_LIMIT):
            self._drop()
            self._asking.release()

    def _exchange(
        self, method: str, path: str, token: NodeToken | None, body: BaseModel | None, wait: timedelta
    ) -> bytes | None:
        if self._closed.is_set():
            raise ControlPlaneError("the agent is being stopped")
        if self._connection is None:
            self._connection = PinnedConnection(self._endpoint, self._limit)
            self._connection.connect()
        connection = self._connection
        connection.sock.settimeout((self._limit + wait).total_seconds())
        connection.request(method, path, None if body is None else body.model_dump_json(), _headers(token, body))
        with connection.getresponse() as answer:
            content = self._read(answer)
        if answer.will_close:
            self._drop()
        return self._judge(answer, content)

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        content = bytearray()
        give_up_at = time.monotonic() + ANSWER_LIMIT.total_seconds()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            if len(content) > MAX_ANSWER or time.monotonic() > give_up_at:
                raise http.client.HTTPException(f"its answer is longer than {MAX_ANSWER} bytes, or takes too long")
        if answer.length:  # `read1` says nothing of an end that came too early
            raise http.client.HTTPException("its answer was cut off")
        return bytes(content)

    def _judge(self, answer: http.client.HTTPResponse, content: bytes) -> bytes | None:
        if answer.status == http.HTTPStatus.OK:
            return content
        if answer.status == http.HTTPStatus.NO_CONTENT:
            return None
        said = f"the control plane at {self._endpoint.url} said {answer.status}: {_detail(content)}"
        refused = answer.status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
        raise NodeRefused(said) if refused else ControlPlaneError(said)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _headers(token: NodeToken | None, body: BaseModel | None) -> dict[str, str]:
    headers = {"Accept": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token.text()}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    return headers


def _detail(content: bytes) -> str:
    """Return what a problem document (RFC 9457) says."""
    try:
        detail = json.loads(content)["detail"]
    except (ValueError, KeyError, TypeError):
        return "nothing that can be read"
    return _shown(detail)


def _shown(said: object) -> str:
    """Return a stranger's words as one line."""
    text = str(said) or type(said).__name__
    return "".join(char if char.isprintable() else "?" for char in text[:_SHOWN])


def enrol(line: Line, request: EnrolRequest) -> str:
    """Become a node, and return its id; the same again for the same request."""
    answer = line.ask("POST", "/v1/enrol", body=request)
    return _understood(EnrolAnswer, answer, "its answer to the enrolment").node_id


class RemoteSource:
    """What an agent on a gateway machine asks. A `node.control.Source`."""

    def __init__(self, line: Line, token: NodeToken, agent: str) -> None:
        """Ask over `line` as the node that has `token`; `agent` names this program in heartbeats."""
        self._line = line
        self._token = token
        self._agent = agent
        self._seen: VersionDocument | None = None
        """The newest version that was delivered."""
        self.heartbeat_every = FIRST_EVERY

    def published(self) -> PublishedVersion | None:
        """Return the version that this node is to serve; VersionRefused if it is in a form that we cannot read."""
        self._fetch_version()
        if self._seen is None:
            return None
        return _read_version(self._seen)

    def changes_after(self, cursor: Cursor) -> CertificateChanges:
        """Return everything that changed after `cursor`, as one."""
        return collect_changes(self._fetch_page, cursor)

    def report(self, heartbeat: Heartbeat) -> None:
        """Send what was proved, and hear how soon to report again."""
        body = HeartbeatBody.of(heartbeat, self._agent)
        answer = self._line.ask("POST", "/v1/node/heartbeat", self._token, body)
        heard = _understood(HeartbeatAnswer, answer, "its answer to the heartbeat")
        self.heartbeat_every = timedelta(seconds=heard.heartbeat_secs)

    def wait(self, cursor: Cursor) -> None:
        """Return when there is something newer than what was delivered, or the next heartbeat is due."""
        where = {"epoch": cursor.epoch, "revision": cursor.revision}
        self._fetch_version(self.heartbeat_every, **where)

    def _fetch_version(self, wait: timedelta = timedelta(), **where: int) -> None:
        query = urlencode({"after": self._seen.id if self._seen else "", "wait": wait.total_seconds(), **where})
        answer = self._line.ask("GET", f"/v1/node/version?{query}", self._token, wait=wait)
        if answer is not None:
            self._seen = _understood(VersionAnswer, answer, "the version").version

    def _fetch_page(self, cursor: Cursor, continued: bool) -> CertificateChanges:
        where = {"epoch": cursor.epoch, "revision": cursor.revision, "scope": cursor.scope}
        query = urlencode({**where, "continued": str(continued).lower()})
        answer = self._line.ask("GET", f"/v1/node/certificates?{query}", self._token)
        return _understood(ChangesAnswer, answer, "the certificates").changes


def _read_version(document: VersionDocument) -> PublishedVersion:
    try:
        return PublishedVersion(document.id, document.number, read_snapshot(document.snapshot))
    except InputError as refused:
        raise VersionRefused(
            f"version {document.number} cannot be read here: {refused}; "
            "if the control plane runs a newer certworker, install that one here too"
        ) from None


def _understood(kind: type[T], answer: bytes | None, what: str) -> T:
    try:
        return read(kind, answer or b"", what)
    except InputError as refused:
        raise ControlPlaneError(f"the control plane's answer is not understood: {refused}") from None
