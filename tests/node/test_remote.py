"""What an agent makes of its control plane, and of whoever stands in its place."""

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from certworker.api.node import make_tls
from certworker.cli.pebble import free_ports
from certworker.core.rollout import Cursor
from certworker.core.transit import NodeToken
from certworker.errors import ControlPlaneError, NodeRefused, VersionRefused, WrongControlPlane
from certworker.node.remote import Endpoint, Line, RemoteSource
from certworker.steps.identity import Identity, _make

TOKEN = NodeToken("00000000-0000-4000-8000-000000000001", "s" * 43)
LIMIT = timedelta(seconds=5)
EMPTY = json.dumps({"schema_version": 1, "changes": {"cursor": {"epoch": 1, "revision": 0, "scope": ""}}})
UUID = "00000000-0000-4000-8000-000000000002"


class Impostor:
    """Answers HTTPS with whatever a test says, one answer per request, and keeps what it was sent."""

    def __init__(self, identity: Identity) -> None:
        self.heard: list[bytes] = []
        self.connections = 0
        self.answers: list[bytes] = []
        self._tls = make_tls(identity.certificate_pem, identity.key_pem)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(6)

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with plain:
                plain.settimeout(5)
                try:
                    with self._tls.wrap_socket(plain, server_side=True) as secure:
                        self._converse(secure)
                except OSError:
                    continue

    def _converse(self, secure: ssl.SSLSocket) -> None:
        while self.answers:
            request = b""
            while b"\r\n\r\n" not in request:
                data = secure.recv(65536)
                if not data:
                    return
                request += data
            self.heard.append(request)
            secure.sendall(self.answers.pop(0))


def answer(body: str | bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    return f"HTTP/1.1 {status}\r\nContent-Length: {length or len(content)}\r\n\r\n".encode() + content


@pytest.fixture(scope="module")
def identity() -> Identity:
    return _make()


@pytest.fixture
def impostor(identity: Identity) -> Iterator[Impostor]:
    server = Impostor(identity)
    yield server
    server.close()


@pytest.fixture
def connect(impostor: Impostor, identity: Identity) -> Iterator[Callable[..., RemoteSource]]:
    lines = []

    def make(pin: str = identity.pin, port: int = impostor.port) -> RemoteSource:
        lines.append(Line(Endpoint(f"https://127.0.0.1:{port}", pin), LIMIT))
        return RemoteSource(lines[-1], TOKEN, "certworker test")

    yield make
    for line in lines:
        line.close()


Connect = Callable[..., RemoteSource]


def test_nothing_is_sent_to_another_key(impostor: Impostor, connect: Connect) -> None:
    """Whoever has no proof of the pinned key hears neither token nor question, and the reason has both keys."""
    impostor.answers = [answer(EMPTY)]
    with pytest.raises(WrongControlPlane, match="nothing was sent"):
        connect(pin="0" * 64).changes_after(Cursor())
    impostor.close()

    assert impostor.connections == 1
    assert impostor.heard == []


def test_every_connection_is_asked_for_the_key(impostor: Impostor, connect: Connect) -> None:
    """Also the second one, after the first was kept and lost."""
    source = connect()
    impostor.answers = [answer(EMPTY)]
    source.changes_after(Cursor())
    impostor._tls = make_tls((other := _make()).certificate_pem, other.key_pem)
    impostor.answers = [answer(EMPTY)]
    with pytest.raises(WrongControlPlane):
        source.changes_after(Cursor())

    assert len(impostor.heard) == 1


def test_connections_are_kept(impostor: Impostor, connect: Connect) -> None:
    source = connect()
    impostor.answers = [answer(EMPTY)] * 3
    for _ in range(3):
        source.changes_after(Cursor())

    assert impostor.connections == 1
    assert impostor.heard[0].startswith(b"GET /v1/node/certificates?epoch=0&revision=0&scope=&continued=false ")
    assert f"Authorization: Bearer {TOKEN.text()}\r\n".encode() in impostor.heard[0]


def test_a_connection_that_was_ended_meanwhile_is_replaced(impostor: Impostor, connect: Connect) -> None:
    """By one more try, which nobody hears of."""
    source = connect()
    for _ in range(3):
        impostor.answers = [answer(EMPTY)]
        source.changes_after(Cursor())

    assert impostor.connections == 3


def test_nobody_there(connect: Connect) -> None:
    with pytest.raises(ControlPlaneError, match=r"cannot reach the control plane at https://127.0.0.1:\d+: .*refused"):
        connect(port=free_ports(1)[0]).published()


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (answer('{"detail": "no node has this token"}', "401 Unauthorized"), NodeRefused, "401: no node has this"),
        (answer('{"detail": "removed\\u001b[2J"}', "403 Forbidden"), NodeRefused, r"removed\?\[2J"),
        (answer("<html>", "502 Bad Gateway"), ControlPlaneError, "502: nothing that can be read"),
        (answer("[]", "503 Busy"), ControlPlaneError, "503"),
        (answer("not JSON"), ControlPlaneError, "not understood"),
        (answer('{"schema_version": 2, "changes": {}}'), ControlPlaneError, "schema_version"),
        (answer('{"schema_version": 1}'), ControlPlaneError, "changes: Field required"),
        (answer("x", length=99), ControlPlaneError, "cannot reach"),
        (b"SSH-2.0-OpenSSH\r\n", ControlPlaneError, "cannot reach"),
        (answer("", "204 No Content"), ControlPlaneError, "not understood"),
        (answer("{}", "301 Moved\r\nLocation: http://127.0.0.1/"), ControlPlaneError, "301"),
    ],
    ids=["401", "403", "502", "503", "text", "newer schema", "no changes", "cut", "ssh", "204", "301"],
)
def test_answers_that_are_none(
    impostor: Impostor, connect: Connect, said: bytes, error: type[Exception], words: str
) -> None:
    """One line that says who answered what; the token is in none of them."""
    impostor.answers = [said]
    with pytest.raises(error, match=words) as caught:
        connect().changes_after(Cursor())

    assert TOKEN.secret not in str(caught.value)
    assert str(caught.value).isprintable()


def test_no_key_in_a_complaint(impostor: Impostor, connect: Connect) -> None:
    """A certificate that is not understood is not quoted."""
    document: dict[str, Any] = json.loads(EMPTY)
    document["changes"]["changed"] = [{"id": 1, "key_pem": "SECRET KEY"}]
    impostor.answers = [answer(json.dumps(document))]
    with pytest.raises(ControlPlaneError) as caught:
        connect().changes_after(Cursor())

    assert "SECRET" not in str(caught.value)


def test_an_answer_without_end_is_cut(impostor: Impostor, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certworker.node.remote.MAX_ANSWER", 1000)
    impostor.answers = [answer("x" * 5000)]
    with pytest.raises(ControlPlaneError, match="longer than 1000 bytes"):
        connect().published()


def version(snapshot: object, number: int = 7) -> bytes:
    return answer(json.dumps({"schema_version": 1, "version": {"id": UUID, "number": number, "snapshot": snapshot}}))


def test_a_version_that_cannot_be_read_is_refused_and_not_fetched_again(impostor: Impostor, connect: Connect) -> None:
    """A key that this release does not know might matter: the node says so, and serves on what it has."""
    source = connect()
    impostor.answers = [version({"schema_version": 1, "quantum": True}), answer("", "204 No Content")]
    for _ in range(2):
        with pytest.raises(VersionRefused, match="version 7 cannot be read here: snapshot: quantum"):
            source.published()

    assert f"after={UUID}".encode() in impostor.heard[1]


def test_what_travels_is_checked_again(impostor: Impostor, connect: Connect) -> None:
    """The rules of the snapshot hold for what comes over the network too."""
    impostor.answers = [
        version({"schema_version": 1, "listeners": [{"id": "x", "port": 80, "protocol": "http"}]}),
    ]
    with pytest.raises(VersionRefused, match=r"listeners\.0\.id"):
        connect().published()


def test_unknown_fields_of_a_newer_control_plane_are_passed_over(impostor: Impostor, connect: Connect) -> None:
    """Only in what is around: the control plane is upgraded first."""
    document: dict[str, Any] = json.loads(EMPTY)
    document["changes"]["more_of_it"] = 1
    document["news"] = 2
    impostor.answers = [answer(json.dumps(document))]

    assert connect().changes_after(Cursor()).cursor == Cursor(1, 0)


def test_pages_are_asked_for_until_there_are_no_more(impostor: Impostor, connect: Connect) -> None:
    """The second question says that it goes on with a whole."""
    first = {"cursor": {"epoch": 1, "revision": 5, "scope": "s"}, "complete": True, "more": True}
    last = {"cursor": {"epoch": 1, "revision": 9, "scope": "s"}, "removed": [UUID]}
    impostor.answers = [answer(json.dumps({"schema_version": 1, "changes": page})) for page in (first, last)]
    changes = connect().changes_after(Cursor())

    assert (changes.cursor, changes.complete, changes.removed) == (Cursor(1, 9, "s"), True, frozenset([UUID]))
    assert b"epoch=1&revision=5&scope=s&continued=true" in impostor.heard[1]


def test_a_close_ends_what_is_under_way(impostor: Impostor, identity: Identity) -> None:
    """From another thread, at once; and nothing is asked after it."""
    impostor.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"]
    line = Line(Endpoint(f"https://127.0.0.1:{impostor.port}", identity.pin), timedelta(seconds=60))
    failed = []

    def ask() -> None:
        try:
            line.ask("GET", "/")
        except ControlPlaneError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not impostor.heard:
        thread.join(0.02)
    line.close()
    thread.join(3)

    assert not thread.is_alive()
    assert len(failed) == 1
    with pytest.raises(ControlPlaneError, match="being stopped"):
        line.ask("GET", "/")


def test_the_key_of_the_node_api_is_on_no_disk(identity: Identity, tmp_path: Path) -> None:
    """It is read from memory; no file is left that had it."""
    before = set(tmp_path.iterdir())
    make_tls(identity.certificate_pem, identity.key_pem)

    assert set(tmp_path.iterdir()) == before
    assert not [link for link in Path("/proc/self/fd").iterdir() if "node-api" in _target(link)]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
