"""Answers HTTP-01 challenges behind the proxies' own listeners (RFC 8555 §8.3).

A proxy forwards `/.well-known/acme-challenge/…`; this server answers it from the live tokens and
nothing else: no files, no wildcard answer, one constant body for whatever is unknown. It speaks just
enough HTTP/1.1 (RFC 9112) and refuses the rest: a request with a body, a query string, an escaped
or absolute target. It logs nothing, tokens are not for logs; `counters` tell how it fares.

What a flood of made-up tokens can cost is bounded three times: only a well-formed token is looked
up at all, the database sees at most LOOKUP_THREADS lookups at once and `Limits.lookups_per_second`
over time, and whatever is above that gets 503. Fetches of one token share a lookup, and a live
answer is remembered for seconds. Unknown tokens are not: one may become live at any moment.
"""

import asyncio
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Self

from certworker.errors import CertworkerError

LOOKUP_THREADS = 4
LINGER = timedelta(seconds=1)
"""How long a refused client may take to read its answer and to stop sending."""
LINGER_READ = 1 << 16
ACCEPT_AGAIN = timedelta(milliseconds=200)
"""After a connection that could not be taken: no descriptor is left for it."""

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_CHALLENGE = re.compile(rb"/\.well-known/acme-challenge/([0-9A-Za-z_-]{22,128})")
"""22 characters are the 128 bits that RFC 8555 §8.3 asks of a token; proxies match the same 22 to 128."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take; past `connections` and the lookups the answer is 503."""

    head_bytes: int = 8192
    head: timedelta = timedelta(seconds=10)
    """From the first byte of a request to its empty line, however slowly the bytes come."""
    idle: timedelta = timedelta(seconds=30)
    connections: int = 1000
    lookup: timedelta = timedelta(seconds=5)
    lookups_waiting: int = 64
    lookups_per_second: int = 500
    remember: timedelta = timedelta(seconds=5)
    remembered: int = 1000


@dataclass(slots=True)
class Counters:
    """Requests since the start, by how they ended."""

    answered: int = 0
    unknown: int = 0
    """404: no live token, or not a challenge at all."""
    refused: int = 0
    """Broken, too big, too slow or too many."""
    failed: int = 0
    """Lookups that raised or did not come back in time; their fetches got 503."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request head; one with a body never becomes a Request."""

    method: bytes
    """GET or HEAD."""
    token: str | None
    """None if the target is not a challenge's."""
    keep_alive: bool


class Refused(Exception):
    """The connection ends after this answer."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status)
        self.status = status


class Responder:
    """The server, in one thread of its own between `start` and `stop`."""

    def __init__(
        self,
        host: str,
        port: int,
        find: Callable[[str], str | None],
        on_fetch: Callable[[str], object],
        limits: Limits = Limits(),
    ) -> None:
        """Answer on `host`:`port` with the key authorization that `find` returns for a live token.

        Both callables run in threads and may block. `on_fetch` is told the tokens that were answered
        to GET; fetches that come before it could be told are one call, and what it raises is dropped.
        """
        self.counters = Counters()
        self._host, self._port = host, port
        self._find, self._on_fetch, self._limits = find, on_fetch, limits
        self._listener: socket.socket | None = None
        self._connections = 0
        self._untold: set[str] = set()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, with the real port if 0 was asked for."""
        if self._listener is None:
            raise RuntimeError("the responder is not started")
        host, port, *_ = self._listener.getsockname()
        return host, port

    def start(self) -> None:
        """Listen and answer; CertworkerError if the address cannot be had."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (self._host, self._port), family=family, backlog=self._limits.connections
            )
            self._listener.setblocking(False)
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]  # Python adds the address a second time
            raise CertworkerError(
                f"cannot answer challenges on {self._host}:{self._port}: {reason}; "
                "stop the program that holds it, or set RESPONDER_LISTEN to another address"
            ) from error
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=[self._listener], name="responder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection; repeating it is harmless."""
        if self._listener is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._listener = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._lookups = Lookups(self._find, self._limits, self.counters)
        self._teller = ThreadPoolExecutor(1, "responder-tell")
        accepting = asyncio.create_task(self._accept(listener))
        await self._stopping.wait()
        accepting.cancel()
        await asyncio.wait({accepting})
        listener.close()
        self._lookups.close()
        self._teller.shutdown(wait=False, cancel_futures=True)

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections until cancelled; while the process may open no more files, clients wait.

        asyncio's own server would then run hot, and log thousands of lines a second.
        """
        while True:
            try:
                client, _ = await self._loop.sock_accept(listener)
                await self._loop.connect_accepted_socket(self._conversation, client)
            except OSError:
                await asyncio.sleep(ACCEPT_AGAIN.total_seconds())

    def _conversation(self) -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=self._limits.head_bytes, loop=self._loop)
        return asyncio.StreamReaderProtocol(reader, self._serve_client, loop=self._loop)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # `drain` then waits until the kernel has everything, so that nothing is lost by `abort`.
        writer.transport.set_write_buffer_limits(high=0)
        self._connections += 1
        try:
            await self._converse(reader, writer)
        except TimeoutError:
            self.counters.refused += 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or we are stopping
        finally:
            self._connections -= 1
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._connections > self._limits.connections:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE)
            while await self._serve_request(reader, writer):
                pass
        except Refused as refused:
            self.counters.refused += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER.total_seconds()):
                    await refuse(refused.status, reader, writer)

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the next may follow."""
        first = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.idle.total_seconds()):
                first = await reader.read(1)
        if not first:
            return False
        async with asyncio.timeout(self._limits.head.total_seconds()):
            request = await read_request(first, reader, self._limits.head_bytes)
        token = request.token
        found = await self._lookups.find(token) if token else None
        async with asyncio.timeout(self._limits.head.total_seconds()):
            writer.write(render_answer(found, request))
            await writer.drain()
        if not (token and found):
            self.counters.unknown += 1
        else:
            self.counters.answered += 1
            if request.method == b"GET":
                self._tell(token)
        return request.keep_alive

    def _tell(self, token: str) -> None:
        if token not in self._untold:
            self._untold.add(token)
            self._teller.submit(self._tell_now, token)

    def _tell_now(self, token: str) -> None:
        self._untold.discard(token)  # first: a fetch from here on is news again
        self._on_fetch(token)


class Lookups:
    """Calls `find` in threads, not more often than the limits allow, and remembers live answers."""

    def __init__(self, find: Callable[[str], str | None], limits: Limits, counters: Counters) -> None:
        self._find, self._limits, self._counters = find, limits, counters
        self._pool = ThreadPoolExecutor(LOOKUP_THREADS, "responder-lookup")
        self._running: dict[str, asyncio.Future[str | None]] = {}
        self._live: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._allowance = float(limits.lookups_per_second)
        self._allowance_at = 0.0

    async def find(self, token: str) -> str | None:
        """Return the key authorization of a live token; Refused when that cannot be said now."""
        until, known = self._live.get(token, (0.0, ""))
        if until > asyncio.get_running_loop().time():
            return known
        running = self._running.get(token) or self._begin(token)
        done, _ = await asyncio.wait({running}, timeout=self._limits.lookup.total_seconds())
        if not done or running.cancelled() or running.exception():
            self._counters.failed += 1
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE)
        return running.result()

    def close(self) -> None:
        for running in self._running.values():
            running.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, token: str) -> asyncio.Future[str | None]:
        if len(self._running) >= self._limits.lookups_waiting or not self._allowed():
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE)
        running = asyncio.get_running_loop().run_in_executor(self._pool, self._find, token)
        self._running[token] = running
        running.add_done_callback(partial(self._finish, token))
        return running

    def _finish(self, token: str, done: asyncio.Future[str | None]) -> None:
        del self._running[token]
        found = None if done.cancelled() or done.exception() else done.result()
        if found:
            self._live[token] = (done.get_loop().time() + self._limits.remember.total_seconds(), found)
            self._live.move_to_end(token)
            if len(self._live) > self._limits.remembered:
                self._live.popitem(last=False)

    def _allowed(self) -> bool:
        now = asyncio.get_running_loop().time()
        most = float(self._limits.lookups_per_second)
        self._allowance = min(most, self._allowance + (now - self._allowance_at) * most)
        self._allowance_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True


async def read_request(first: bytes, reader: asyncio.StreamReader, limit: int) -> Request:
    """Read a request head that starts with `first`; Refused if it is not one we answer.

    RFC 9112 §2.2 would let us skip an empty line before it; no proxy sends one.
    """
    left = limit
    lines: list[bytes] = []
    while not lines or lines[-1]:
        line = first + await _read_line(reader)
        first = b""
        left -= len(line) + len(b"\r\n")
        if left < 0:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if not lines and not _REQUEST_LINE.fullmatch(line):
            raise Refused(HTTPStatus.BAD_REQUEST)  # now: a client of HTTP/0.9 sends no more
        lines.append(line)
    return parse_request(lines[0], lines[1:-1])


def parse_request(request_line: bytes, field_lines: list[bytes]) -> Request:
    """Understand a request head, or raise Refused."""
    start = _REQUEST_LINE.fullmatch(request_line)
    matches = [_FIELD.fullmatch(line) for line in field_lines]
    if start is None or None in matches:
        raise Refused(HTTPStatus.BAD_REQUEST)
    fields: dict[bytes, list[bytes]] = {}
    for match in filter(None, matches):
        fields.setdefault(match[1].lower(), []).append(match[2].strip())
    method, target, minor = start.groups()
    if len(fields.get(b"host", [])) != 1:  # RFC 9112 §3.2; proxies send it with HTTP/1.0 too
        raise Refused(HTTPStatus.BAD_REQUEST)
    if method not in (b"GET", b"HEAD"):
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED)
    if b"transfer-encoding" in fields or fields.get(b"content-length", [b"0"]) != [b"0"]:
        raise Refused(HTTPStatus.BAD_REQUEST)
    options = b",".join(fields.get(b"connection", [])).lower().replace(b" ", b"").split(b",")
    return Request(method, read_token(target), keep_alive=minor == b"1" and b"close" not in options)


def read_token(target: bytes) -> str | None:
    """Return the token if `target` is exactly the path of a challenge, with no query and no escapes."""
    match = _CHALLENGE.fullmatch(target)
    return match[1].decode() if match else None


def render_answer(found: str | None, request: Request) -> bytes:
    """Print 200 with the key authorization, or 404; HEAD gets the same without the body."""
    status = HTTPStatus.OK if found else HTTPStatus.NOT_FOUND
    body = (found or "not found\n").encode()
    return _render_head(status, len(body), request.keep_alive) + (body if request.method == b"GET" else b"")


async def refuse(status: HTTPStatus, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send `status`, then let the client finish: closing on unread bytes would reset the answer away."""
    body = f"{status.phrase.lower()}\n".encode()
    writer.write(_render_head(status, len(body), keep_alive=False) + body)
    await writer.drain()
    writer.write_eof()
    while await reader.read(LINGER_READ):
        pass


def _render_head(status: HTTPStatus, length: int, keep_alive: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        "Content-Type: text/plain",
        f"Content-Length: {length}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        lines.append("Retry-After: 1")
    return "\r\n".join([*lines, "", ""]).encode()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from error
    if not line.endswith(b"\r\n"):
        raise Refused(HTTPStatus.BAD_REQUEST)
    return line[:-2]
