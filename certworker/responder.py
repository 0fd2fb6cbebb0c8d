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
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from types import TracebackType
from typing import Self

from certworker.errors import CertworkerError

LOOKUP_THREADS = 4
LINGER = timedelta(seconds=1)
"""How long a refused client may take to read its answer and to stop sending."""
ACCEPT_AT_ONCE = 64
"""Connections that are taken before the others are looked after."""
ACCEPT_AGAIN = timedelta(milliseconds=200)
"""After a connection that could not be taken: no descriptor is left for it."""

_TCHARS = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""What methods and names of fields are made of: a token (RFC 9110 §5.6.2)."""
_REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.([01])" % _TCHARS)
_FIELDS = re.compile(rb"(?:\r\n%b:[\t -~\x80-\xff]*)*" % _TCHARS)
_TELLING = re.compile(rb"\r\n(host|connection|content-length|transfer-encoding):([^\r]*)", re.IGNORECASE)
"""The fields that say anything to us."""
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
        at_hand: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        """Answer on `host`:`port` with the key authorization that `find` returns for a live token.

        `at_hand` is asked first. `on_fetch` is told each token that was answered to GET, and what it raises is
        dropped. These two must not block; `find` runs in threads, and may.
        """
        self.counters = Counters()
        self._host, self._port = host, port
        self._find, self._on_fetch, self._limits, self._at_hand = find, on_fetch, limits, at_hand
        self._listener: socket.socket | None = None
        self._conversations: set[Conversation] = set()

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
        self._thread = threading.Thread(target=self._run, args=[self._listener], name="responder", daemon=True)
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """What answers, once it is started."""
        return self._thread

    def stop(self) -> None:
        """Close the port and every connection; repeating it is harmless."""
        if self._listener is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
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
        self._lookups = Lookups(self._loop, self._find, self._limits, self._at_hand)
        self._accept_from(listener)
        self._loop.run_forever()
        listener.close()
        for conversation in list(self._conversations):
            conversation.close()
        self._lookups.close()
        self._loop.close()

    def _accept_from(self, listener: socket.socket) -> None:
        self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take connections; while the process may open no more files, clients wait."""
        for _ in range(ACCEPT_AT_ONCE):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # They stay readable: without a pause we would run hot.
                self._loop.remove_reader(listener)
                self._loop.call_later(ACCEPT_AGAIN.total_seconds(), self._accept_from, listener)
                return
            client.setblocking(False)
            conversation = Conversation(
                client, self._loop, self._lookups, self._limits, self.counters, self._tell, self._conversations.discard
            )
            self._conversations.add(conversation)
            conversation.begin(full=len(self._conversations) > self._limits.connections)

    def _tell(self, token: str) -> None:
        with suppress(Exception):
            self._on_fetch(token)


class Conversation:
    """One client's connection. Its methods are called by the loop, and none of them waits."""

    def __init__(
        self,
        client: socket.socket,
        loop: asyncio.AbstractEventLoop,
        lookups: "Lookups",
        limits: Limits,
        counters: Counters,
        tell: Callable[[str], object],
        ended: Callable[["Conversation"], object],
    ) -> None:
        self._client, self._loop, self._lookups, self._limits = client, loop, lookups, limits
        self._counters, self._tell, self._ended = counters, tell, ended
        self._heard = b""
        """Of requests that are not answered yet."""
        self._reading = False
        self._lingering = False
        self._asked: Request | None = None
        """What a lookup is under way for."""
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        """Whether the timer is that of a head which has begun: more bytes win no time."""

    def begin(self, *, full: bool) -> None:
        """Look what the client wants; `full` means that it is one too many."""
        if full:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._hear()  # mostly it has said it by now

    def close(self) -> None:
        """End the connection."""
        self._asked = None
        self._stop_waiting()
        self._read(False)
        self._client.close()
        self._ended(self)

    # -- what the client says --------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            data = self._client.recv(self._limits.head_bytes)
        except BlockingIOError:
            self._listen()
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif not self._lingering:
            self._heard += data
            self._serve()

    def _serve(self) -> None:
        """Answer the first request of what was heard, if it is whole."""
        try:
            request, self._heard = take_request(self._heard, self._limits.head_bytes)
            if request is None:
                self._listen()
                return
            self._stop_waiting()
            if request.token is None:
                self._answer(request, None)
            elif known := self._lookups.remembered(request.token):
                self._answer(request, known)
            else:
                self._look_up(request, request.token)
        except Refused as refused:
            self._refuse(refused.status)

    def _listen(self) -> None:
        """Wait for more: for the rest of a head since its first byte, or for a request."""
        self._read(True)
        if self._heard and not self._in_head:
            self._wait(self._limits.head, self._end_slow)
            self._in_head = True
        elif not self._heard and not self._lingering:
            self._wait(self._limits.idle, self.close)

    def _end_slow(self) -> None:
        self._counters.refused += 1
        self.close()

    # -- what we say -----------------------------------------------------------------------------------

    def _look_up(self, request: Request, token: str) -> None:
        running = self._lookups.begin(token)
        self._asked = request
        self._read(False)
        self._wait(self._limits.lookup, partial(self._looked_up, None))
        running.add_done_callback(self._looked_up)

    def _looked_up(self, done: "asyncio.Future[str | None] | None") -> None:
        """Go on when a lookup has ended; None stands for one that takes too long."""
        request, self._asked = self._asked, None
        if request is None:
            return  # it took too long, or the client has gone
        if done is None or done.cancelled() or done.exception():
            self._counters.failed += 1
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._answer(request, done.result())

    def _answer(self, request: Request, found: str | None) -> None:
        if not self._send(render_answer(found, request)):
            return
        if not (request.token and found):
            self._counters.unknown += 1
        else:
            self._counters.answered += 1
            if request.method == b"GET":
                self._tell(request.token)
        if not request.keep_alive:
            self.close()
        elif self._heard:
            self._read(False)
            self._loop.call_soon(self._go_on)  # others first: it may have sent a thousand requests at once
        else:
            self._listen()

    def _go_on(self) -> None:
        if self._client.fileno() >= 0:
            self._serve()

    def _refuse(self, status: HTTPStatus) -> None:
        """Send `status`, then let the client finish: closing on unread bytes would reset the answer away."""
        self._counters.refused += 1
        self._lingering, self._heard = True, b""
        body = f"{status.phrase.lower()}\n".encode()
        if self._send(_render_head(status, len(body), keep_alive=False, second=int(time.time())) + body):
            with suppress(OSError):
                self._client.shutdown(socket.SHUT_WR)
            self._wait(LINGER, self.close)
            self._read(True)

    def _send(self, data: bytes) -> bool:
        """Send all of it at once, as a client that reads its answers has room for; end the connection otherwise."""
        with suppress(OSError):
            if self._client.send(data) == len(data):
                return True
        self.close()
        return False

    # -- the loop --------------------------------------------------------------------------------------

    def _read(self, on: bool) -> None:
        if on != self._reading:
            self._reading = on
            if on:
                self._loop.add_reader(self._client, self._hear)
            else:
                self._loop.remove_reader(self._client)

    def _wait(self, limit: timedelta, late: Callable[[], object]) -> None:
        """Call `late` when `limit` is over, unless something else is waited for by then."""
        self._stop_waiting()
        self._timer = self._loop.call_later(limit.total_seconds(), late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._in_head = None, False


class Lookups:
    """Calls `find` in threads, not more often than the limits allow, and remembers live answers."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, find: Callable[[str], str | None], limits: Limits,
        at_hand: Callable[[str], str | None],
    ) -> None:  # fmt: skip
        self._loop, self._find, self._limits, self._at_hand = loop, find, limits, at_hand
        self._pool = ThreadPoolExecutor(LOOKUP_THREADS, "responder-lookup")
        self._running: dict[str, asyncio.Future[str | None]] = {}
        self._live: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._allowance = float(limits.lookups_per_second)
        self._allowance_at = 0.0

    def remembered(self, token: str) -> str | None:
        """Return the key authorization of a token that is proved in this process, or was live seconds ago."""
        if (found := self._at_hand(token)) is not None:
            return found
        until, known = self._live.get(token, (0.0, ""))
        return known if until > self._loop.time() else None

    def begin(self, token: str) -> "asyncio.Future[str | None]":
        """Return the lookup of a token, which others may be waiting for too; Refused when there are too many."""
        running = self._running.get(token)
        if running is not None:
            return running
        if len(self._running) >= self._limits.lookups_waiting or not self._allowed():
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE)
        running = self._loop.run_in_executor(self._pool, self._find, token)
        self._running[token] = running
        running.add_done_callback(partial(self._finish, token))
        return running

    def close(self) -> None:
        for running in self._running.values():
            running.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, token: str, done: "asyncio.Future[str | None]") -> None:
        del self._running[token]
        found = None if done.cancelled() or done.exception() else done.result()
        if found:
            self._live[token] = (self._loop.time() + self._limits.remember.total_seconds(), found)
            self._live.move_to_end(token)
            if len(self._live) > self._limits.remembered:
                self._live.popitem(last=False)

    def _allowed(self) -> bool:
        now = self._loop.time()
        most = float(self._limits.lookups_per_second)
        self._allowance = min(most, self._allowance + (now - self._allowance_at) * most)
        self._allowance_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True


def take_request(heard: bytes, limit: int) -> tuple[Request | None, bytes]:
    """Return the first request of what was heard and what is behind it; None while its head is not whole.

    Refused as soon as it can only become one that we do not answer. RFC 9112 §2.2 would let us skip an empty
    line before it; no proxy sends one.
    """
    end = heard.find(b"\r\n\r\n")
    if end > limit - 4 or (end < 0 and len(heard) > limit):
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if end < 0:
        line, complete, _ = heard.partition(b"\n")
        if complete and not (line.endswith(b"\r") and _REQUEST_LINE.fullmatch(line[:-1])):
            raise Refused(HTTPStatus.BAD_REQUEST)  # now: a client of HTTP/0.9 sends no more
        return None, heard
    return parse_request(heard[:end]), heard[end + 4 :]


def parse_request(head: bytes) -> Request:
    """Understand a request head, without its empty line, or raise Refused."""
    start = _REQUEST_LINE.match(head)
    if start is None or _FIELDS.fullmatch(head, start.end()) is None:
        raise Refused(HTTPStatus.BAD_REQUEST)
    fields: dict[bytes, list[bytes]] = {}
    for name, value in _TELLING.findall(head, start.end()):
        fields.setdefault(name.lower(), []).append(value.strip())
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
    head = _render_head(status, len(body), request.keep_alive, int(time.time()))
    return head + (body if request.method == b"GET" else b"")


@lru_cache(16)
def _render_head(status: HTTPStatus, length: int, keep_alive: bool, second: int) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {formatdate(second, usegmt=True)}",
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
