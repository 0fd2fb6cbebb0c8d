"""The ACME fault proxy: stands between a client and Pebble, and breaks what it is told to.

It ends TLS with a certificate of its own and passes Host on as it came. Pebble builds every URL of that
Host, so a client that is given the proxy's directory stays on the proxy. An account belongs to the Host
it was made with.

A fault is a function of the request's `Turn`: it may let the CA do its part (`ask`), and answer, or not.
"""

import base64
import contextlib
import http.client
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from certworker.cli.pebble import HOST, Pebble, free_ports, make_listener_certificate

_UPSTREAM_LIMIT = 30
_IN_PEBBLE = {
    "/dir": "directory",
    "/my-account/": "account",
    "/my-order/": "order",
    "/authZ/": "authorization",
    "/chalZ/": "challenge",
    "/finalize-order/": "finalize",
    "/certZ/": "certificate",
}
"""What the directory does not name; a trailing slash stands for whatever follows."""
_CONNECTION_HEADERS = frozenset(["connection", "content-length", "transfer-encoding"])


@dataclass(frozen=True, slots=True)
class Answer:
    """What the CA says, or is made to say."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case, without those that are about the connection."""
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def without(self, *names: str) -> "Answer":
        """Return it without these headers."""
        return replace(self, headers={name: value for name, value in self.headers.items() if name not in names})

    def with_headers(self, **headers: str) -> "Answer":
        """Return it with these headers on top; `_` stands for `-`."""
        return replace(self, headers={**self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}})


@dataclass(slots=True, eq=False)
class Exchange:
    """A request that came, and what the CA said to it."""

    at: float
    """When it came, by the monotonic clock."""
    method: str
    path: str
    route: str
    """RFC 8555's name of the resource: newOrder, order, authorization ...; "" for any other."""
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    answer: Answer | None = None
    """None if the CA was not asked."""

    @property
    def protected(self) -> dict[str, Any]:
        """The protected header of its JWS."""
        return dict(json.loads(_unbase64(json.loads(self.body)["protected"])))

    @property
    def payload(self) -> Any:
        """What its JWS says; None for POST-as-GET, and for a request without one."""
        text = _unbase64(json.loads(self.body)["payload"]) if self.body else b""
        return json.loads(text) if text else None


class Turn:
    """One request on its way through the proxy."""

    def __init__(self, exchange: Exchange, handler: "_Handler") -> None:
        self.exchange = exchange
        self._handler = handler

    def ask(self) -> Answer:
        """Let the CA do its part, once however often this is called, and return what it said."""
        if self.exchange.answer is None:
            self.exchange.answer = self._handler.ask_upstream(self.exchange)
        return self.exchange.answer

    def send(self, answer: Answer) -> None:
        """Give the client this answer."""
        self.send_bytes(self.render(answer))

    def render(self, answer: Answer, length: int | None = None) -> bytes:
        """Return the answer as it goes over the wire, with another Content-Length if one is given."""
        body = b"" if self.exchange.method == "HEAD" else answer.body
        phrase = http.client.responses.get(answer.status, "Unheard Of")
        lines = [f"HTTP/1.1 {answer.status} {phrase}", f"content-length: {len(body) if length is None else length}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def send_bytes(self, data: bytes) -> None:
        """Give the client these bytes."""
        self._handler.connection.sendall(data)

    def close(self) -> None:
        """End the connection as a server does that has nothing more to say."""
        self._handler.hang_up()

    def reset(self) -> None:
        """End the connection with RST."""
        self._handler.hang_up(linger=b"\x01\0\0\0\0\0\0\0")

    def wait(self, go_on: threading.Event, *, outlive: bool = False) -> bool:
        """Wait for `go_on`; False if the proxy stops before, or the client has left (unless to `outlive` it)."""
        left = select.poll()
        left.register(self._handler.connection, select.POLLIN | select.POLLRDHUP)
        while not go_on.wait(0.01):
            if self._handler.server.stopping.is_set() or (left.poll(0) and not outlive):
                return False
        return True


Fault = Callable[[Turn], None]


@dataclass(slots=True, eq=False)
class Rule:
    """Which requests meet a fault."""

    fault: Fault
    route: str | None
    """None: any."""
    method: str | None
    where: Callable[[Exchange], bool]
    skip: int
    """How many that match are let through first."""
    times: int | None
    """How many meet the fault then; None is all."""
    matched: int = 0

    def takes(self, exchange: Exchange) -> bool:
        """Say whether this request meets the fault; counts those that match."""
        wanted = self.route in (None, exchange.route) and self.method in (None, exchange.method)
        if not wanted or not self.where(exchange):
            return False
        self.matched += 1
        return self.skip < self.matched <= (self.skip + self.times if self.times is not None else self.matched)

    @property
    def met(self) -> int:
        """How many requests met the fault."""
        return max(0, min(self.matched - self.skip, self.times if self.times is not None else self.matched))


class FaultProxy:
    """A fault proxy before `ca`, between `__enter__` and `__exit__`."""

    def __init__(self, ca: Pebble, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (port,) = free_ports(1)
        self.directory_url = f"https://{HOST}:{port}/dir"
        self.ca_bundle, key = make_listener_certificate(folder)
        self.exchanges: list[Exchange] = []
        """Every request so far, as they came."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.ca_bundle, key)
        self._server = _Server(port, tls, ca, _routes(ca), self._take)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fault-proxy")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def on(
        self,
        route: str | None,
        fault: Fault,
        *,
        method: str | None = None,
        where: Callable[[Exchange], bool] = lambda _: True,
        skip: int = 0,
        times: int | None = 1,
    ) -> Rule:
        """Let `times` requests meet `fault`; of several rules that fit, the oldest is applied."""
        rule = Rule(fault, route, method, where, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    def seen(self, route: str, status: int | None = None) -> list[Exchange]:
        """Return the requests for a route so far, or those that the CA answered with `status`."""
        of_route = [exchange for exchange in self.exchanges if exchange.route == route]
        return [e for e in of_route if status is None or (e.answer is not None and e.answer.status == status)]

    def posts(self) -> int:
        """Count the POSTs so far."""
        return sum(exchange.method == "POST" for exchange in self.exchanges)

    def _take(self, exchange: Exchange) -> Fault:
        with self._lock:
            self.exchanges.append(exchange)
            return next((rule.fault for rule in self._rules if rule.takes(exchange)), pass_on)


# -- faults -------------------------------------------------------------------------------------------


def pass_on(turn: Turn) -> None:
    """No fault."""
    turn.send(turn.ask())


class Hold:
    """Keeps a request back, before the CA sees it or (`answered`) when the CA has done its part.

    A client that leaves meanwhile takes its request with it, and the CA never sees what was held before it;
    but one that is to `outlive` its client was on the way already, and arrives late.
    """

    def __init__(self, *, answered: bool = False, outlive: bool = False) -> None:
        self._answered = answered
        self._outlive = outlive
        self._reached = threading.Event()
        self._released = threading.Event()

    def __call__(self, turn: Turn) -> None:
        if self._answered:
            turn.ask()
        self._reached.set()
        if turn.wait(self._released, outlive=self._outlive):
            turn.send(turn.ask())

    @property
    def reached(self) -> bool:
        """Whether a request is, or was, held."""
        return self._reached.is_set()

    def release(self) -> None:
        """Let it go on."""
        self._released.set()


def stall(turn: Turn) -> None:
    """Never answer, and never close."""
    turn.wait(threading.Event())


def withhold(turn: Turn) -> None:
    """Let the CA do its part, and never pass its answer on."""
    turn.ask()
    turn.wait(threading.Event())


def say(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Answer in the CA's place; `_` in a header's name stands for `-`."""
    return lambda turn: turn.send(Answer(status, {}, body).with_headers(**headers))


def say_problem(status: int, code: str, detail: str, **headers: str) -> Fault:
    """Answer with a problem document of RFC 8555 §6.7 in the CA's place."""
    document = {"type": f"urn:ietf:params:acme:error:{code}", "detail": detail, "status": status}
    return say(status, json.dumps(document).encode(), **{"content_type": "application/problem+json", **headers})


def redirect(location: str, status: int = 307) -> Fault:
    """Send the client elsewhere."""
    return say(status, location=location)


def reset_before(turn: Turn) -> None:
    """RST; the CA never sees the request."""
    turn.reset()


def reset_after(turn: Turn) -> None:
    """RST in the place of the answer; the CA did its part."""
    turn.ask()
    turn.reset()


def close_after(turn: Turn) -> None:
    """An end in the place of the answer; the CA did its part."""
    turn.ask()
    turn.close()


def truncate(turn: Turn) -> None:
    """Half of what Content-Length promises, then the end."""
    answer = turn.ask()
    turn.send_bytes(turn.render(replace(answer, body=answer.body[: len(answer.body) // 2]), length=len(answer.body)))
    turn.close()


def misstate_length(by: int) -> Fault:
    """Content-Length is `by` too much (then the connection ends) or, if negative, too little (then it stays open)."""

    def fault(turn: Turn) -> None:
        answer = turn.ask()
        turn.send_bytes(turn.render(answer, length=max(len(answer.body) + by, 0)))
        if by > 0:
            turn.close()

    return fault


def trickle(pause: float) -> Fault:
    """Send the answer byte by byte, every `pause` seconds, until the client has enough."""

    def fault(turn: Turn) -> None:
        for byte in turn.render(turn.ask()):
            turn.send_bytes(bytes([byte]))
            time.sleep(pause)

    return fault


def rewrite(change: Callable[[Answer], Answer]) -> Fault:
    """Let the CA do its part, and say something else."""
    return lambda turn: turn.send(change(turn.ask()))


# -- below --------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """A thread per connection, all of them ended by `server_close`."""

    daemon_threads = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(
        self, port: int, tls: ssl.SSLContext, ca: Pebble, routes: Mapping[str, str], take: Callable[[Exchange], Fault]
    ) -> None:
        super().__init__((HOST, port), _Handler)
        self.tls, self.routes, self.take = tls, routes, take
        parts = urlsplit(ca.directory_url)
        self.upstream = (parts.hostname or "", parts.port or 443)
        self.trust = ssl.create_default_context(cafile=str(ca.ca_bundle))
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()

    def server_close(self) -> None:
        self.stopping.set()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                # The plain socket's: that of TLS takes the thread's own state away from under it.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that leave are what this is made for."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one to the CA behind it."""

    protocol_version = "HTTP/1.1"
    server: _Server
    connection: ssl.SSLSocket

    def setup(self) -> None:
        self.request.settimeout(_UPSTREAM_LIMIT)
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()
        self.connection.settimeout(None)
        self.server.connections.add(self.connection)
        self._upstream = http.client.HTTPSConnection(
            *self.server.upstream, timeout=_UPSTREAM_LIMIT, context=self.server.trust
        )

    def handle(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            super().handle()

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        self._upstream.close()
        self.hang_up()

    def relay(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            # Whoever sent it has died over it: to any CA it is no request yet.
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _CONNECTION_HEADERS}
        exchange = Exchange(
            time.monotonic(), self.command, self.path, _route(self.server.routes, path), headers, body
        )  # fmt: skip
        self.server.take(exchange)(Turn(exchange, self))

    do_GET = do_HEAD = do_POST = relay  # noqa: N815 - the names that http.server calls

    def ask_upstream(self, exchange: Exchange) -> Answer:
        ca = self._upstream
        ca.putrequest(exchange.method, exchange.path, skip_host=True, skip_accept_encoding=True)
        for name, value in exchange.headers.items():
            ca.putheader(name, value)
        if exchange.body:
            ca.putheader("Content-Length", str(len(exchange.body)))
        ca.endheaders(exchange.body or None)
        with ca.getresponse() as response:
            said = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
        kept = {name: value for name, value in headers.items() if name not in _CONNECTION_HEADERS}
        return Answer(response.status, kept, said)

    def hang_up(self, linger: bytes | None = None) -> None:
        """Close without TLS's farewell; with `linger` set to nothing, by RST."""
        self.close_connection = True
        if linger is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.rfile.close()  # or the socket stays open behind it
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        pass


def _routes(ca: Pebble) -> dict[str, str]:
    """Return routes by path, those of the directory and those that we know of Pebble."""
    named = {name: url for name, url in ca.directory().items() if isinstance(url, str)}
    # The renewal information of a certificate is below what the directory names (RFC 9773 §4.1).
    found = {urlsplit(url).path + "/" * (name == "renewalInfo"): name for name, url in named.items()}
    return {**found, **_IN_PEBBLE}


def _route(routes: Mapping[str, str], path: str) -> str:
    return routes.get(path) or next((n for p, n in routes.items() if p.endswith("/") and path.startswith(p)), "")


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
