"""One kept connection to one origin, on which nothing takes longer than its deadline.

`http.client` speaks HTTP; what is ours is the socket below it. A socket's own time limit starts anew
with every read, so a server that sends one byte a second holds a thread for hours. Here each read and
write gets what is left of the request's time.
"""

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from certworker.ca.proxies import Proxy


class Origin(NamedTuple):
    """Where a request goes (RFC 9110 §4.3.1)."""

    scheme: str
    host: str
    port: int


class Answer(NamedTuple):
    """An HTTP answer as it came; a field that came twice is joined with a comma (RFC 9110 §5.3)."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class ProxyRefused(Exception):
    """The proxy did not open a way to the CA; the message says why."""


class TooLarge(Exception):
    """The answer is larger than was allowed."""


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


class _TimedSocket:
    """As much of a socket as http.client uses, bound to the deadline of the request under way."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self.sock = sock
        self.deadline = deadline
        self.answered = False
        """Whether a byte has been read since the request began."""

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(self.deadline.left())
        self.sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self))

    def close(self) -> None:
        """Do nothing: http.client lets go of the socket while the body is still to be read."""


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._timed.sock.settimeout(self._timed.deadline.left())
        count = self._timed.sock.recv_into(buffer)
        self._timed.answered = self._timed.answered or count > 0
        return count


class Connection:
    """An open connection; not for two threads at a time."""

    def __init__(self, timed: _TimedSocket, origin: Origin) -> None:
        self._timed = timed
        self._http = http.client.HTTPConnection(origin.host, origin.port)
        self._http.default_port = 443 if origin.scheme == "https" else 80
        self._http.auto_open = 0  # never reconnect behind our back
        self._http.sock = cast(socket.socket, timed)

    @property
    def answered(self) -> bool:
        """Whether any byte of an answer to the last request has come."""
        return self._timed.answered

    @property
    def is_open(self) -> bool:
        """Whether the last answer left the connection open for another request."""
        return self._http.sock is not None

    def is_idle(self) -> bool:
        """Say whether nothing has come since the last answer; if so, the other side closed or is out of step."""
        poll = select.poll()
        poll.register(self._timed.sock, select.POLLIN)
        return not poll.poll(0)

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
        self._http.request(method, target, body, headers)
        with self._http.getresponse() as response:
            return Answer(response.status, _read_headers(response), _read_body(response, max_bytes))

    def close(self) -> None:
        """Close the connection; no request can follow."""
        self._http.close()
        # No unwrap: it would wait for the other side's farewell.
        self._timed.sock.close()


def open_connection(origin: Origin, proxy: Proxy | None, tls: ssl.SSLContext, deadline: Deadline) -> Connection:
    """Connect to `origin`, through `proxy` if there is one, and prove by TLS who answers."""
    sock = _reach_proxy(proxy, deadline) if proxy else _connect(origin.host, origin.port, deadline)
    try:
        if proxy:
            _ask_proxy(_TimedSocket(sock, deadline), origin, proxy)
        if origin.scheme == "https":
            sock.settimeout(deadline.left())
            # A cut is told from an end, or a truncated answer without a length would pass for a whole one.
            sock = tls.wrap_socket(sock, server_hostname=origin.host, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise
    return Connection(_TimedSocket(sock, deadline), origin)


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


def _ask_proxy(timed: _TimedSocket, origin: Origin, proxy: Proxy) -> None:
    """Have the proxy open a tunnel (RFC 9110 §9.3.6)."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    answer = http.client.HTTPResponse(cast(socket.socket, timed), method="CONNECT")
    with contextlib.closing(answer):
        try:
            timed.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
            answer.begin()
        except (OSError, http.client.HTTPException) as error:
            raise ProxyRefused(f"the proxy at {proxy.host}:{proxy.port} broke off") from error
    if not 200 <= answer.status < 300:
        raise ProxyRefused(f"the proxy at {proxy.host}:{proxy.port} answered {answer.status}")


def _read_headers(response: http.client.HTTPResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.length is not None:
        if response.length > max_bytes:
            raise TooLarge
        return response.read()  # unlike read(n), this notices a body that ends too early
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise TooLarge
    return body
