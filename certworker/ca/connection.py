"""One kept connection to one origin, on which nothing takes longer than its deadline.

What is said on it is in `http1`. A socket's own time limit starts anew with every read, so a server that sends one
byte a second holds a thread for hours. Here each read and write gets what is left of the request's time.
"""

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast

from certworker.ca.http1 import Answer, Answers, NotHttp, render_request
from certworker.ca.proxies import Proxy
from certworker.ca.urls import Origin

_PIECE = 16 * 1024
"""Bytes: no TLS record has more (RFC 8446 §5.1)."""
_TIMEVAL = "@qq" if socket.SO_RCVTIMEO == 66 else "@ll"
"""Linux has another number for it where a C long is too short for the time (asm-generic/socket.h)."""
_NEARLY = 1.02
"""So much longer than is left a call may take: else every request would have to set the kernel's limit anew."""


class ProxyRefused(Exception):
    """The proxy did not open a way to the CA; the message says why."""


class Deadline:
    """What is left of a request's time."""

    def __init__(self, seconds: float, stopwatch: Callable[[], float]) -> None:
        self._until = stopwatch() + seconds
        self._stopwatch = stopwatch

    def left(self) -> float:
        """Return the seconds left, or raise TimeoutError if there are none."""
        left = self._until - self._stopwatch()
        if left <= 0:
            raise TimeoutError
        return left


class _Timed:
    """A socket on which nothing takes longer than the deadline of the request under way.

    The kernel keeps the time (SO_RCVTIMEO, socket(7)). With Python's own limit, a read is a call that waits and one
    that reads, each of which lets go of Python's lock, and so may hand it to another thread.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        sock.setblocking(False)  # to Python: it makes one call,
        os.set_blocking(sock.fileno(), True)  # in which the kernel waits
        self.sock = sock
        self.deadline = deadline
        self.answered = False
        """Whether a byte has come since the request began."""
        self._limit = 0.0
        """Seconds that the kernel lets a call take, 0 before it was told."""
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def is_silent(self) -> bool:
        return not self._readable.poll(0)

    def send(self, data: bytes) -> None:
        while data:
            self._keep_limit()
            with suppress(BlockingIOError, ssl.SSLWantWriteError):
                data = data[self.sock.send(data) :]

    def receive(self) -> bytes:
        while True:
            self._keep_limit()
            try:
                data = self.sock.recv(_PIECE)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue  # too late
            self.answered = self.answered or bool(data)
            return data

    def _keep_limit(self) -> None:
        """Let the next call take no longer than is left, nearly: raise TimeoutError if nothing is."""
        left = self.deadline.left()
        if not left <= self._limit <= left * _NEARLY:
            self._limit = left
            seconds = struct.pack(_TIMEVAL, int(left), int(left % 1 * 1e6) or 1)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)


class Connection:
    """An open connection; not for two threads at a time."""

    def __init__(self, sock: socket.socket, origin: Origin, deadline: Deadline) -> None:
        self._timed = _Timed(sock, deadline)
        self._answers = Answers(self._timed.receive)
        self._authority = origin.authority
        self.is_open = True
        """Whether the last answer left the connection open for another request."""

    @property
    def answered(self) -> bool:
        """Whether any byte of an answer to the last request has come."""
        return self._timed.answered

    def is_idle(self) -> bool:
        """Say whether nothing has come since the last answer; if so, the other side closed or is out of step."""
        return self._timed.is_silent()

    def exchange(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        max_bytes: int,
        deadline: Deadline,
    ) -> Answer:
        """Send one request and read its whole answer."""
        self._timed.deadline, self._timed.answered = deadline, False
        self._timed.send(render_request(method, target, self._authority, headers, body))
        answer = self._answers.read(method, max_bytes)
        self.is_open = not answer.is_last
        return answer

    def close(self) -> None:
        """Close the connection; no request can follow."""
        # No unwrap: it would wait for the other side's farewell.
        self._timed.sock.close()


def open_connection(origin: Origin, proxy: Proxy | None, tls: ssl.SSLContext, deadline: Deadline) -> Connection:
    """Connect to `origin`, through `proxy` if there is one, and prove by TLS who answers."""
    sock = _reach_proxy(proxy, deadline) if proxy else _connect(origin.host, origin.port, deadline)
    try:
        if proxy:
            _ask_proxy(_Timed(sock, deadline), origin, proxy)
        if origin.scheme == "https":
            sock.settimeout(deadline.left())
            # A cut is told from an end, or a truncated answer without a length would pass for a whole one.
            sock = tls.wrap_socket(sock, server_hostname=origin.host, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise
    return Connection(sock, origin, deadline)


def _connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """Try one address after the other; each gets its share of the time left."""
    addresses = _resolve(host, port, deadline)
    for tries_left in range(len(addresses), 0, -1):
        family, kind, protocol, _, address = addresses[-tries_left]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.left() / tries_left)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException as error:
            sock.close()
            if tries_left > 1 and isinstance(error, OSError):
                continue
            raise
        return sock
    raise socket.gaierror(socket.EAI_NONAME, "no address")


_Addresses = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]]


def _resolve(host: str, port: int, deadline: Deadline) -> _Addresses:
    """Look up `host`. The system's resolver knows no time limit, so it is asked in a thread that may be left behind."""
    found: _Addresses = []
    failed: list[OSError] = []

    def look_up() -> None:
        try:
            found.extend(cast(_Addresses, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:
            failed.append(error if isinstance(error, OSError) else socket.gaierror(socket.EAI_NONAME, "no such name"))

    thread = threading.Thread(target=look_up, daemon=True, name=f"resolve-{host}")
    thread.start()
    thread.join(deadline.left())
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError
    return found


def _reach_proxy(proxy: Proxy, deadline: Deadline) -> socket.socket:
    try:
        return _connect(proxy.host, proxy.port, deadline)
    except OSError as error:
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else (error.strerror or "no connection")
        raise ProxyRefused(f"cannot reach the proxy at {proxy.host}:{proxy.port}: {reason.lower()}") from error


def _ask_proxy(timed: _Timed, origin: Origin, proxy: Proxy) -> None:
    """Have the proxy open a tunnel (RFC 9110 §9.3.6)."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    try:
        timed.send("\r\n".join([*lines, "", ""]).encode("ascii"))
        status = Answers(timed.receive).read_head().status
    except (OSError, NotHttp) as error:
        raise ProxyRefused(f"the proxy at {proxy.host}:{proxy.port} broke off") from error
    if not 200 <= status < 300:
        raise ProxyRefused(f"the proxy at {proxy.host}:{proxy.port} answered {status}")
