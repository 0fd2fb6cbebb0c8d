"""A node with a real HAProxy or nginx, certificates of a CA of our own, and little upstreams to route to."""

import hashlib
import os
import random
import shutil
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import mkdtemp

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from certworker.core.gateway import Defaults, GatewayRows, ListenerRow, PolicyRow, PoolRow, RouteRow, TargetRow, build
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat, NodeCertificate
from certworker.core.snapshot import Snapshot
from certworker.node.agent import Agent
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.lookup import Lookup
from certworker.node.nginx import Nginx, NginxSetup
from certworker.node.patience import Patience
from certworker.node.probe import Probe, probe_tls
from certworker.node.state import Lists
from certworker.render.files import RenderedFiles
from tests.conftest import FIXED_PORTS

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT = timedelta(seconds=20)
PATIENCE = Patience()


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def await_true(look: Callable[[], object], what: str) -> None:
    """Look until it is so, or fail."""
    assert PATIENCE.until(look, LIMIT), f"not within {LIMIT}: {what}"


@pytest.fixture(scope="session")
def haproxy_binary() -> Path:
    """The HAProxy to test with: CERTWORKER_HAPROXY_BIN, or the one of this machine."""
    named = os.environ.get("CERTWORKER_HAPROXY_BIN")
    found = named or shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.fail("haproxy is missing: run `apt-get install haproxy`, or set CERTWORKER_HAPROXY_BIN")
    return Path(found)


@pytest.fixture(scope="session")
def nginx_binary(nginx_bin: str) -> Path:
    """The nginx to test with: CERTWORKER_NGINX_BIN, or the one of this machine."""
    return Path(os.environ.get("CERTWORKER_NGINX_BIN") or nginx_bin)


@dataclass
class Ports:
    """Ports below the ephemeral range, that nothing listens on and no other test was given."""

    first: int
    last: int
    _next: int = 0

    def take(self) -> int:
        for port in range(max(self._next, self.first), self.last):
            self._next = port + 1
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind(("0.0.0.0", port))
                except OSError:
                    continue
                return port
        pytest.fail(f"no port is free from {self.first} to {self.last}")


@pytest.fixture(scope="session")
def ports(request: pytest.FixtureRequest) -> Ports:
    """A range of its own for each test process."""
    worker = int(getattr(request.config, "workerinput", {}).get("workerid", "gw0").removeprefix("gw"))
    first = FIXED_PORTS + worker * 1000
    return Ports(first, first + 1000)


class Authority:
    """Issues leaves as a CA would; nobody trusts it and nobody has to."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self._serial = 0

    def issue(
        self,
        certificate_id: int,
        *names: str,
        policies: tuple[int, ...] = (900,),
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    ) -> NodeCertificate:
        """Return a fresh leaf with its key; a later one for the same id is its renewal."""
        self._serial += 1
        key = key or ec.generate_private_key(ec.SECP256R1())
        expires_at = NOW + timedelta(days=3650, seconds=self._serial)
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(self._serial)
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(expires_at)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return NodeCertificate(
            id=uuid(certificate_id),
            policy_ids=frozenset(map(uuid, policies)),
            dns_names=names,
            chain_pem=leaf.public_bytes(Encoding.PEM).decode(),
            key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            fingerprint=hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest(),
            expires_at=expires_at,
            revision=1,
        )


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@dataclass
class MemorySource:
    """A control plane that lives in this process."""

    version: PublishedVersion | None = None
    certificates: dict[str, NodeCertificate] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    thumbprints: dict[str, tuple[str, int]] = field(default_factory=dict)
    removed_hosts: dict[str, int] = field(default_factory=dict)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    revision: int = 0
    epoch: int = 1

    def publish(self, snapshot: Snapshot) -> PublishedVersion:
        number = self.version.number + 1 if self.version else 1
        self.version = PublishedVersion(uuid(10_000 + number), number, snapshot)
        return self.version

    def put(self, certificate: NodeCertificate) -> None:
        self.revision += 1
        self.certificates[certificate.id] = replace(certificate, revision=self.revision)

    def remove(self, certificate_id: str) -> None:
        self.revision += 1
        del self.certificates[certificate_id]
        self.removed[certificate_id] = self.revision

    def put_thumbprint(self, dns_name: str, thumbprint: str) -> None:
        self.revision += 1
        self.thumbprints[dns_name] = thumbprint, self.revision

    def remove_thumbprint(self, dns_name: str) -> None:
        self.revision += 1
        del self.thumbprints[dns_name]
        self.removed_hosts[dns_name] = self.revision

    def published(self) -> PublishedVersion | None:
        return self.version

    def changes_after(self, cursor: Cursor) -> CertificateChanges:
        complete = cursor.epoch != self.epoch
        after = 0 if complete else cursor.revision
        changed = sorted((one for one in self.certificates.values() if one.revision > after), key=lambda c: c.revision)
        removed = frozenset(name for name, revision in self.removed.items() if revision > after)
        rows = {name: value for name, (value, revision) in self.thumbprints.items() if revision > after}
        hosts = frozenset(name for name, revision in self.removed_hosts.items() if revision > after)
        return CertificateChanges(
            Cursor(self.epoch, self.revision), tuple(changed), removed, complete, rows, hosts - rows.keys()
        )

    def report(self, heartbeat: Heartbeat) -> None:
        self.heartbeats.append(heartbeat)


class WatchedHaproxy(Haproxy):
    """A HAProxy to whose reloads and configurations a test can do something first."""

    before_reload: Callable[[], object]
    spoil: Callable[[RenderedFiles], RenderedFiles]

    def reload(self) -> None:
        self.before_reload()
        super().reload()

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        return self.spoil(super().render(snapshot, number))

    def workers(self) -> frozenset[int]:
        processes = PATIENCE.until(self._processes, LIMIT)
        assert processes is not None
        return processes.new_workers

    def forget_certificates(self) -> None:
        """Take what it shows away behind the agent's back."""
        for line in self._admin.list_lines(str(self._list(None))):
            self._admin.drop_line(str(self._list(None)), line.file)


class WatchedNginx(Nginx):
    """The same for nginx."""

    before_reload: Callable[[], object]
    spoil: Callable[[RenderedFiles], RenderedFiles]

    def reload(self) -> None:
        self.before_reload()
        super().reload()

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        return self.spoil(super().render(snapshot, number))

    def workers(self) -> frozenset[int]:
        master = self._process.find()
        assert master is not None
        return self._accepting(master)

    def forget_certificates(self) -> None:
        self.write_lists(Lists({None: frozenset()}))
        super().reload()


class Node:
    """One node in a folder of its own; `agent` may be replaced by a new one on the same folder."""

    def __init__(self, path: Path, kind: str, binary: Path) -> None:
        self.path = path
        self.kind = kind
        self.binary = binary
        self.hosts: dict[str, tuple[str, ...]] = {}
        """What names resolve to, for an nginx."""
        self.source = MemorySource()
        self.probe: Probe = probe_tls
        self.before_reload: Callable[[], object] = lambda: None
        self.spoil: Callable[[RenderedFiles], RenderedFiles] = lambda rendered: rendered
        self.start_agent()

    def start_agent(self) -> None:
        self.folder = Folder(self.path)
        self.proxy = self._make_proxy()
        self.proxy.before_reload = lambda: self.before_reload()
        self.proxy.spoil = lambda rendered: self.spoil(rendered)
        self.agent = Agent(
            "node-1",
            self.source,
            self.folder,
            self.proxy,
            PATIENCE,
            random.Random(1),
            lambda port, name: self.probe(port, name),
        )

    def _make_proxy(self) -> WatchedHaproxy | WatchedNginx:
        if self.kind == "haproxy":
            return WatchedHaproxy(self.folder, HaproxySetup(self.binary), PATIENCE)
        lookup = Lookup(PATIENCE, self._resolve, timedelta(milliseconds=50))
        return WatchedNginx(self.folder, NginxSetup(self.binary), PATIENCE, lookup)

    @property
    def keeps_clients(self) -> bool:
        """Whether no client of a kept connection has to send anything again at a reload (docs/operations.md)."""
        name, _, number = self.proxy.describe().partition(" ")
        return name == "haproxy" or tuple(map(int, number.split("."))) >= (1, 27, 4)

    def _resolve(self, host: str) -> tuple[str, ...]:
        if host not in self.hosts:
            raise OSError("no such name")
        return self.hosts[host]

    def step(self) -> Heartbeat:
        return self.agent.step()

    def workers(self) -> frozenset[int]:
        """Return the process ids of the workers that no reload has replaced."""
        return self.proxy.workers()

    def assert_kept(self, workers: frozenset[int]) -> None:
        """See that a proxy that can change its certificates while it runs was not reloaded."""
        if self.kind == "haproxy":
            assert self.workers() == workers


@pytest.fixture(params=["haproxy", "nginx"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both proxies, one after the other."""
    return str(request.param)


@pytest.fixture
def node(kind: str, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node whose proxy ends with the test."""
    # Not pytest's own folder: its path is too long for a socket.
    path = Path(mkdtemp(prefix="certworker-node-"))
    node = Node(path, kind, request.getfixturevalue(f"{kind}_binary"))
    yield node
    node.agent.stop()
    node.agent.close()
    shutil.rmtree(path)


class Upstream(socketserver.ThreadingTCPServer):
    """Answers every HTTP request with its own name and what it was asked; counts them."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, name: str, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.name = name
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        """Answers are held back while it is cleared."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def stop(self) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class HttpHandler(socketserver.StreamRequestHandler):
    """One request, one answer; after an upgrade every byte comes back."""

    server: Upstream

    def handle(self) -> None:
        head = b""
        while line := self.rfile.readline(65536):
            head += line
            if line in (b"\r\n", b"\n"):
                break
        if not head:
            return  # a health check
        self.server.asked.append(head.decode("latin-1"))
        self.server.gate.wait(LIMIT.total_seconds())
        if b"websocket" in head.lower():
            self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
            # The answer to the key of RFC 6455 §1.3, which HAProxy checks the presence of.
            self.wfile.write(b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
            while data := self.rfile.read1(4096):
                self.wfile.write(data)
            return
        body = self.server.name.encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class EchoHandler(socketserver.StreamRequestHandler):
    """Sends its name, then everything back."""

    server: Upstream

    def handle(self) -> None:
        try:
            self.wfile.write(self.server.name.encode() + b"\n")
            while data := self.rfile.read1(4096):
                self.wfile.write(data)
        except OSError:
            return  # a health check went away


@pytest.fixture
def upstream(ports: Ports) -> Iterator[Callable[..., Upstream]]:
    """Start an upstream by name; it stops with the test."""
    started: list[Upstream] = []

    def start(
        name: str, handler: type[socketserver.BaseRequestHandler] = HttpHandler, port: int | None = None
    ) -> Upstream:
        started.append(Upstream(port or ports.take(), name, handler))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@dataclass
class Gateway:
    """Rows, written down shortly."""

    responders: tuple[str, ...] = ("127.0.0.1:8402",)
    listeners: list[ListenerRow] = field(default_factory=list)
    routes: list[RouteRow] = field(default_factory=list)
    pools: list[PoolRow] = field(default_factory=list)
    targets: list[TargetRow] = field(default_factory=list)
    policies: list[PolicyRow] = field(default_factory=list)

    def listener(
        self, port: int, protocol: str = "http", policy: int | None = None, challenge: str | None = None
    ) -> str:
        policy_id = None if policy is None else uuid(policy)
        if policy is not None:
            self.policies.append(PolicyRow(uuid(policy), "auto"))
        row = ListenerRow(uuid(100 + len(self.listeners)), None, port, protocol, policy_id, True, challenge)
        self.listeners.append(row)
        return self.listeners[-1].id

    def pool(self, *ports: int, policy: str = "round_robin", weights: tuple[int, ...] = (), check: bool = True) -> str:
        health_check = {"kind": "tcp", "interval_secs": 1, "timeout_ms": 500} if check else None
        pool = PoolRow(uuid(200 + len(self.pools)), "pool", policy, health_check)
        self.pools.append(pool)
        for port, weight in zip(ports, weights or (1,) * len(ports), strict=True):
            self.target(pool.id, f"127.0.0.1:{port}", weight)
        return pool.id

    def target(self, pool: str, address: str, weight: int = 1) -> None:
        self.targets.append(TargetRow(uuid(300 + len(self.targets)), pool, address, weight, True))

    def route(self, listener: str, pool: str, kind: str = "path", priority: int = 10, **match: object) -> None:
        self.routes.append(RouteRow(uuid(400 + len(self.routes)), listener, kind, match, priority, pool, True))

    def snapshot(self) -> Snapshot:
        rows = GatewayRows(
            tuple(self.listeners), tuple(self.routes), tuple(self.pools), tuple(self.targets), tuple(self.policies)
        )
        built = build(rows, Defaults(timedelta(seconds=10), timedelta(seconds=2), self.responders))
        assert not built.faults
        return built.snapshot


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def ask(port: int, path: str = "/", host: str = "a.test", method: str = "GET") -> tuple[int, str]:
    """Send one HTTP request and return status and body."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT.total_seconds()) as connection:
        return exchange(connection, path, host, method)


def ask_tls(port: int, sni: str, host: str, path: str = "/") -> tuple[int, str]:
    """Send one HTTPS request, trusting anybody, and return status and body."""
    with shake_hands(port, sni) as connection:
        return exchange(connection, path, host, "GET")


def shake_hands(port: int, sni: str) -> ssl.SSLSocket:
    """Open a TLS connection, trusting anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), timeout=LIMIT.total_seconds())
    try:
        return context.wrap_socket(plain, server_hostname=sni)
    except OSError:
        plain.close()
        raise


def exchange(connection: socket.socket, path: str, host: str, method: str) -> tuple[int, str]:
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    head = b""
    with connection.makefile("rb") as answer:
        while line := answer.readline():
            head += line
            if line == b"\r\n":
                break
        body = answer.read()
    return int(head.split()[1]), body.decode()


@dataclass
class Load:
    """A client that asks without a pause, each time on a new connection."""

    port: int
    tls: bool = False
    answers: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                answer = ask_tls(self.port, "a.test", "a.test") if self.tls else ask(self.port)
            except (OSError, IndexError) as failed:
                self.faults.append(repr(failed))
            else:
                self.answers += 1
                if answer[0] != 200:
                    self.faults.append(repr(answer))


@dataclass
class KeptLoad(Load):
    """A client that asks without a pause on one connection, and on another when that one is closed (RFC 9112 §9.3)."""

    connections: int = 0
    again: int = 0
    """Requests on a used connection that was closed before a byte of the answer came. What every client sends again by
    itself, if the method is idempotent (RFC 9112 §9.3.1); not a fault, if it is answered then."""

    def run(self, over: threading.Event) -> None:
        kept: HTTPConnection | None = None
        while not over.is_set():
            try:
                kept = self._ask(kept)
            except (OSError, HTTPException) as failed:
                self.faults.append(repr(failed))
                kept = None
        if kept is not None:
            kept.close()

    def _ask(self, kept: HTTPConnection | None) -> HTTPConnection | None:
        """Send one request, and return the connection if it is left open."""
        if kept is not None and is_closed(kept.sock):
            kept.close()
            kept = None
        connection = kept or self._connect()
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
        except ConnectionError:
            connection.close()
            if kept is None:
                raise
            self.again += 1
            return None
        body = answer.read()
        if answer.status != 200:
            self.faults.append(repr((answer.status, body)))
        self.answers += 1
        if answer.will_close:
            connection.close()
            return None
        return connection

    def _connect(self) -> HTTPConnection:
        self.connections += 1
        connection = HTTPConnection("a.test")
        connection.sock = (
            shake_hands(self.port, "a.test")
            if self.tls
            else socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT.total_seconds())
        )
        return connection


def is_closed(connection: socket.socket) -> bool:
    """Say whether the other side has closed an idle connection, as clients look before they use it again."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(LIMIT.total_seconds())
