"""Whatever the rows hold, the running proxies do what the model says: drawn routes, real requests, real handshakes."""

import re
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import cycle
from typing import TypeVar
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from certworker.core.gateway import Built, Defaults, GatewayRows, ListenerRow, PoolRow, RouteRow, TargetRow, build
from certworker.core.patterns import replace_end
from certworker.core.snapshot import Listener, Match, PathMatch, Snapshot
from certworker.node.runtime import RuntimeSocket

from .conftest import Authority, Gateway, Node, Ports, ask, uuid

pytestmark = pytest.mark.proxy

T = TypeVar("T")

WISHES = 400
LISTENERS = 40
"""Each has every 40th route, so that one that takes all leaves something to see."""
PAIRS = 40

HOSTILE = "'\"\\$%#?{}[]()|;!&<>*+,=:@^~`/._-aA1 \t\n\r\x00\x7fé☃"
PRINTABLE = "".join(chr(code) for code in range(0x21, 0x7F))
NAMES = ["a.test", "b.test", "aa.test", "x.a.test", "a.b.test", "default", "include", "xn--bcher-kva.test", "1.2x"]
LONG = ".".join(["a" * 63, "b-" * 31 + "b", "c" * 63, "d" * 61])

text = st.text(HOSTILE, min_size=1, max_size=12)
dns_names = st.sampled_from([*NAMES, LONG]) | st.from_regex(r"[a-z0-9]{1,3}(-[a-z0-9])?\.[a-z]{2,4}", fullmatch=True)
hosts = dns_names | dns_names.map("*.{}".format) | dns_names.map(str.upper) | text
plain_paths = st.text(PRINTABLE, max_size=12) | st.text("'\"\\${};.|a/", max_size=8)
extreme_paths = st.sampled_from(["'", '"', "\\", "$", ".", "é", " "]).map(lambda one: one * 1023) | st.just("\\" * 511)
paths = st.one_of(plain_paths, plain_paths, text, extreme_paths).map("/{}".format)


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and a text that it matches."""

    regex: str
    example: str


def join(parts: list[Pattern]) -> Pattern:
    return Pattern("".join(part.regex for part in parts), "".join(part.example for part in parts))


PIECES = [
    Pattern(".", "x"), Pattern(r"\d{1,3}", "42"), Pattern(r"\w+", "a_1"), Pattern(r"\S*", ""), Pattern("[^a'\"]", "$"),
    Pattern("[]}{;]?", "]"), Pattern("(?:a|'b')", "'b'"), Pattern(r'(a\")?', ""), Pattern("[$^]", "$"),
    Pattern("(?:/c)*", "/c/c"), Pattern("$", ""), Pattern("|", ""), Pattern("(?i)", ""),
]  # fmt: skip
atoms = st.one_of(
    st.sampled_from([Pattern("\\" + one, one) for one in "!\"$&'()*+,-.:;<=>@[\\]^_`{|}~"]),
    st.sampled_from([Pattern(one, one) for one in "ab/'\";#%&<>=:@~`!,_- "]),
    st.sampled_from(PIECES),
)
patterns = st.lists(atoms, max_size=6).map(lambda parts: join([Pattern("/", "/"), *parts])) | st.just(
    Pattern("$" * 256, "/")
)


@st.composite
def path_matches(draw: st.DrawFn) -> tuple[dict[str, str], str]:
    """Return how a path is to match, and a path that probably does."""
    kind = draw(st.sampled_from(["exact", "prefix", "regex"]))
    if kind == "regex":
        pattern = draw(patterns)
        return {kind: pattern.regex}, pattern.example
    path = draw(paths)
    return {kind: path}, path + (draw(st.sampled_from(["", "/", "/x"])) if kind == "prefix" else "")


ADDRESSES = [
    "unix@/run/admin.sock:1", "/run/admin.sock", "abns@x:1", "127.0.0.1:+10", "127.0.0.1:80 disabled", "unix:/x:1",
    "2130706433:80", "127.1:80", "192.0.2.1:80", "[2001:db8::1]:80", "[::ffff:192.0.2.1]:65535", "192.0.2.1:0",
]  # fmt: skip
addresses = st.sampled_from(ADDRESSES) | st.text(HOSTILE + "0123456789", max_size=20)


@dataclass(frozen=True)
class Wish:
    """A route as somebody might write it, and a request that it is probably meant for."""

    match: dict[str, object]
    priority: int
    pool_name: str
    address: str
    """Of a second target, which gets no traffic."""
    asked: list[tuple[str, bytes]]
    """Hosts and decoded paths of requests that it is meant for, or nearly."""


@st.composite
def edited(draw: st.DrawFn, host: str, path: str) -> tuple[str, bytes]:
    """Return host and path of a request with one character changed, or all letters."""
    match draw(st.sampled_from(["host", "path", "path", "case"])):
        case "host":
            host = edit(draw, host, "a.-1")
        case "path":
            path = "/" + edit(draw, path[1:], HOSTILE)
        case _:
            host, path = host.swapcase(), path.swapcase()
    return host, path.encode()


def edit(draw: st.DrawFn, value: str, alphabet: str) -> str:
    at = draw(st.integers(0, len(value)))
    return value[:at] + draw(st.sampled_from(["", *alphabet])) + value[at + draw(st.integers(0, 1)) :]


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    host, (path, example) = draw(hosts), draw(path_matches())
    match = draw(st.sampled_from([{"host": host, "path": path}, {"host": host}, {"path": path}]))
    asked_host = (host if "host" in match else draw(dns_names)).replace("*", "x")
    asked_path = example if "path" in match else draw(paths)
    asked = [(asked_host, asked_path.encode())] + [draw(edited(asked_host, asked_path)) for _ in range(3)]
    return Wish(match, draw(st.integers(0, 3)), draw(text), draw(addresses), asked)


def can_be_asked(host: str, path: bytes) -> bool:
    """Leave out hosts that HTTP has no place for, and paths that each proxy reads in its own way (decision 16)."""
    segments = path.split(b"/")[1:]
    special = {b".", b".."} & set(segments) or b"" in segments[:-1] or b"\0" in path
    return bool(re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", host)) and not special


def takes(match: Match, host: str, path: bytes) -> bool:
    """Say whether the model has a route take a request: the plain reading of docs/core-library.md."""
    if match.host is not None and host.lower() != match.host:
        label, _, rest = host.lower().partition(".")
        if not label or match.host != f"*.{rest}":
            return False
    return match.path is None or path_takes(match.path, path)


def path_takes(wanted: PathMatch, path: bytes) -> bool:
    if wanted.exact is not None:
        return path == wanted.exact.encode()
    if wanted.prefix is not None:
        prefix = wanted.prefix.encode()
        return path == prefix or path.startswith(prefix.removesuffix(b"/") + b"/")
    whole = replace_end(wanted.regex or "", r"\Z")
    return re.fullmatch(whole.encode(), path) is not None


def address_of(number: int) -> str:
    """Return the loopback address that stands for a route's pool."""
    return f"127.9.{number // 250}.{number % 250 + 1}"


class WhereHandler(socketserver.StreamRequestHandler):
    """Answers with the address that it was reached at, and with what it was asked."""

    def handle(self) -> None:
        line = self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        body = b"%s %s" % (self.request.getsockname()[0].encode(), line.split()[1] if line else b"")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Everywhere(socketserver.ThreadingTCPServer):
    """Listens at every address."""

    allow_reuse_address = True
    daemon_threads = True


@pytest.fixture
def everywhere(ports: Ports) -> Iterator[int]:
    """Give a port at which every loopback address answers, each with its own name."""
    with Everywhere(("0.0.0.0", ports.take()), WhereHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def addresses_of(snapshot: Snapshot) -> set[tuple[str, str, int]]:
    used = {route.pool_id for listener in snapshot.listeners for route in listener.routes}
    return {
        (f"t_{target.id}", target.host, target.port)
        for pool in snapshot.pools if pool.id in used
        for target in pool.targets
    }  # fmt: skip


def addresses_read_by_haproxy(node: Node) -> set[tuple[str, str, int]]:
    """Return the servers of pools as the running process has them (management guide, `show servers state`)."""
    said = RuntimeSocket(node.folder.run / "admin.sock").ask("show servers state")
    rows = (line.split() for line in said.splitlines() if " P_" in line)
    return {(row[3], row[4], int(row[18])) for row in rows}


def draw_all(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """Return different values, the same ones each time."""
    drawn: list[T] = []

    @settings(derandomize=True, deadline=None, max_examples=count, phases=[Phase.generate])
    @given(strategy)
    def take(value: T) -> None:
        drawn.append(value)

    take()
    return drawn


def build_rows(wished: list[Wish], listening: list[int], upstream: int) -> Built:
    """Put each wish on a listener, with a pool of its own."""
    listeners = [ListenerRow(uuid(1 + n), "'\n}", port, "http", None, True) for n, port in enumerate(listening)]
    routes, pools, targets = [], [], []
    for n, wish in enumerate(wished):
        pools.append(PoolRow(uuid(10_000 + n), wish.pool_name, "weighted", None))
        targets.append(TargetRow(uuid(20_000 + n), pools[-1].id, f"{address_of(n)}:{upstream}", 1, True))
        targets.append(TargetRow(uuid(30_000 + n), pools[-1].id, wish.address, 0, True))
        listener = listeners[n % len(listeners)]
        routes.append(RouteRow(uuid(40_000 + n), listener.id, "path", wish.match, wish.priority, pools[-1].id, True))
    rows = GatewayRows(tuple(listeners), tuple(routes), tuple(pools), tuple(targets))
    return build(rows, Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",)))


def expect(listener: Listener, host: str, path: bytes, uri: str) -> tuple[int, str]:
    """Return what the first route that takes a request answers."""
    for route in listener.routes:
        if takes(route.match, host, path):
            number = int(route.pool_id.rpartition("-")[2]) - 10_000
            return 200, f"{address_of(number)} {uri}"
    return 404, "no route"


def test_each_request_reaches_the_pool_that_the_model_names(node: Node, ports: Ports, everywhere: int) -> None:
    """Drawn rows are refused one by one, or take what they say and nothing that differs by one character."""
    wished = draw_all(wishes(), WISHES)
    built = build_rows(wished, [ports.take() for _ in range(LISTENERS)], everywhere)
    by_id = {listener.id: listener for listener in built.snapshot.listeners}
    node.source.publish(built.snapshot)
    heartbeat = node.step()
    assert (heartbeat.error, heartbeat.warnings) == (None, ())

    statuses: Counter[int] = Counter()
    for n, wish in enumerate(wished):
        listener = by_id[uuid(1 + n % LISTENERS)]
        for suffix, (host, path) in zip(cycle(["", ".", ":80"]), wish.asked, strict=False):
            if can_be_asked(host, path):
                uri = quote_from_bytes(path, safe="/'()*,;=:@!$&+._-~" if n % 2 else "/")
                answer = ask(listener.port, uri, host + suffix)
                assert answer == expect(listener, host, path, uri), (host, path, listener.routes)
                statuses[answer[0]] += 1
    # Neither side may run dry.
    assert min(statuses[200], statuses[404], len(built.faults)) > WISHES // 2
    if node.kind == "haproxy":
        assert addresses_read_by_haproxy(node) == addresses_of(built.snapshot)


@dataclass(frozen=True)
class Wrapping:
    """What stands around the PEM of a certificate and of its key, and how its lines end."""

    before: str
    after: str
    line_end: str
    gap: str
    """Stands after the first line."""

    def apply(self, pem: str) -> str:
        first, rest = pem.split("\n", 1)
        return f"{self.before}\n{first}\n{self.gap}{rest}{self.after}".replace("\n", self.line_end)


OTHER_LINES = [
    "", " ", "disable frontend L_x", "; quit", "shutdown sessions", "-----BEGIN CERTIFICATE-----", "$host", '";}', "<<",
    "-----END CERTIFICATE-----", "-----BEGIN PRIVATE KEY-----", "AAAA", "é", "\x00",
]  # fmt: skip
other_lines = st.lists(st.sampled_from(OTHER_LINES), max_size=3).map(
    lambda lines: "".join(f"{line}\n" for line in lines)
)
wrappings = st.builds(
    Wrapping, other_lines, other_lines, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "", "\n"])
)


def test_what_stands_around_a_pem_reaches_no_proxy(
    node: Node, gateway: Gateway, ports: Ports, authority: Authority
) -> None:
    """A certificate is shown, or refused by its id; the others are shown, and nothing that was written is run."""
    gateway.listener(ports.take(), "https")
    node.source.publish(gateway.snapshot())
    assert node.step().error is None
    workers = node.workers()
    pairs = [authority.issue(number, f"{number}.a.test") for number in range(PAIRS)]
    for pair, wrapping in zip(pairs, draw_all(wrappings, PAIRS), strict=True):
        dressed = replace(pair, chain_pem=wrapping.apply(pair.chain_pem), key_pem=wrapping.apply(pair.key_pem))
        node.source.put(dressed)

    heartbeat = node.step()

    shown = {pair.id: pair.fingerprint for pair in pairs if pair.id not in heartbeat.refused}
    assert (heartbeat.error, heartbeat.unserved.keys()) == (None, heartbeat.refused.keys())
    assert heartbeat.fingerprints == shown
    assert 0 < len(heartbeat.refused) < PAIRS // 2
    node.assert_kept(workers)
