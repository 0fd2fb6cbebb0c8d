"""One HTTP server in a thread of its own; what it answers is handed in."""

import asyncio
import socket
import ssl
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

from certworker.errors import CertworkerError

STOP_LIMIT = 5.0
ANSWER_LIMIT = 2.0
"""How many seconds a stop waits for answers under way."""
_FLUSH = 0.1
_KEEP_ALIVE = 30


class _Uvicorn(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers finish and cut what is idle, which over TLS would be waited for until its client speaks."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=ANSWER_LIMIT)
        await asyncio.sleep(_FLUSH)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


class Server:
    """An application on one address, over TLS if there is a context for it."""

    def __init__(
        self, listen: str, setting: str, app: FastAPI, tls: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        """Prepare to serve `app` on `listen`, which the setting named `setting` says; `options` are uvicorn's."""
        self._listen = listen
        self._setting = setting
        factory = None if tls is None else lambda *_: tls
        config = uvicorn.Config(
            app, log_config=None, access_log=False, ws="none", server_header=False, timeout_keep_alive=_KEEP_ALIVE,
            ssl_context_factory=factory, **options,
        )  # fmt: skip
        self._server = _Uvicorn(config)
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen; CertworkerError if the address cannot be had."""
        host, _, port = self._listen.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, int(port)), family=family)
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]
            raise CertworkerError(
                f"cannot listen on {self._listen}: {reason}; "
                f"stop the program that holds it, or set {self._setting} to another address"
            ) from None
        # Accepted connections inherit it. asyncio does not set it itself on a socket that was handed in, and an
        # answer, sent in two parts, would wait 40 ms for the client's kernel to acknowledge the first.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="api", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; repeating it is harmless."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(STOP_LIMIT)
            self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
