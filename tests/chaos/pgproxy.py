"""A TCP proxy before PostgreSQL: cuts, stalls or refuses connections, and loses the answer to a COMMIT.

It reads no more of the protocol than it must: libpq sends a simple query, such as BEGIN or COMMIT, as one
packet, and waits for the answer.
"""

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Self

_PIECE = 65536
_LOOK = 0.02
"""Seconds after which a connection looks whether the proxy stalls or stops."""
_RESET = struct.pack("ii", 1, 0)


def _query(text: str) -> bytes:
    """Return a simple query as it goes over the wire."""
    return b"Q" + struct.pack("!i", len(text) + 5) + text.encode() + b"\0"


_BEGIN, _COMMIT = _query("BEGIN"), _query("COMMIT")


def parameter(text: str) -> bytes:
    """Return a statement's text parameter as it goes over the wire."""
    return struct.pack("!i", len(text)) + text.encode()


@dataclass(eq=False)
class LostCommit:
    """A COMMIT that the server carried out and whose client never hears of it."""

    marks: tuple[bytes, ...]
    """All of them were sent in its transaction."""
    cut: bool
    """Whether the client's connection then ends; else it only stays silent."""
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def reached(self) -> bool:
        """Whether it has happened: the server has answered."""
        return self._done.is_set()

    def _note(self) -> None:
        self._done.set()


class PostgresProxy:
    """Forwards to the PostgreSQL at `port`, between `__enter__` and `__exit__`."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._losses: list[LostCommit] = []
        self._stalled = threading.Event()
        self._refusing = threading.Event()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept, name="postgres-proxy")
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread in self._threads():
            thread.join()

    def cut(self) -> None:
        """End every connection with RST; new ones are taken."""
        with self._lock:
            clients = list(self._open)
        for client in clients:
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.shutdown(socket.SHUT_RD)

    def stall(self) -> None:
        """Pass nothing on any more, in either direction, and close nothing: half-open connections."""
        self._stalled.set()

    def refuse(self) -> None:
        """End every connection, and each new one at once: no server behind it."""
        self._refusing.set()

    def resume(self) -> None:
        """Go on, after `stall` with what has come meanwhile."""
        self._stalled.clear()
        self._refusing.clear()

    def lose_commit(self, *marks: bytes, cut: bool = True) -> LostCommit:
        """Lose the answer to the next COMMIT of a transaction in which all these bytes were sent."""
        loss = LostCommit(marks, cut)
        with self._lock:
            self._losses.append(loss)
        return loss

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._threads())

    def _threads(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._open.values())

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="postgres-proxy-connection")
            with self._lock:
                self._open[client] = thread
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
                self._relay(client, server)
        except OSError:
            pass
        finally:
            with self._lock:
                del self._open[client]

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        transaction, loss = b"", None
        while not self._stopping.is_set() and not self._refusing.is_set():
            if self._stalled.is_set():
                self._stopping.wait(_LOOK)
                continue
            ready, _, _ = select.select([client, server], [], [], _LOOK)
            if client in ready:
                data = client.recv(_PIECE)
                if not data:
                    return
                transaction = data if data == _BEGIN else transaction + data
                if data == _COMMIT:
                    loss = self._take_loss(transaction)
                server.sendall(data)
            if server in ready:
                data = server.recv(_PIECE)
                if not data:
                    return
                if loss is None:
                    client.sendall(data)
                    continue
                loss._note()
                if loss.cut:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                else:
                    self._await_end(client)
                return

    def _await_end(self, client: socket.socket) -> None:
        while not self._stopping.is_set():
            if select.select([client], [], [], _LOOK)[0] and not client.recv(_PIECE):
                return

    def _take_loss(self, transaction: bytes) -> LostCommit | None:
        with self._lock:
            for loss in self._losses:
                if all(mark in transaction for mark in loss.marks):
                    self._losses.remove(loss)
                    return loss
        return None
