"""`/healthz`, `/readyz` and `/metrics` on API_LISTEN.

Healthy means that the process answers; ready means that it can work: the database answers and the scan
runs.
"""

import socket
import threading
from datetime import datetime, timedelta

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from certworker.api.metrics import Facts, FactsCollector
from certworker.errors import CertworkerError, StoreError

_LATE_SCANS = 3
_STOP_LIMIT = 5.0


class ApiServer:
    """The HTTP API in a thread of its own."""

    def __init__(self, listen: str, facts: Facts, scan_interval: timedelta) -> None:
        self._listen = listen
        self._facts = facts
        self._patience = max(scan_interval * _LATE_SCANS, timedelta(seconds=30))
        config = uvicorn.Config(self._app(), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=30)
        self._server = uvicorn.Server(config)
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
                f"cannot listen for the API on {self._listen}: {reason}; "
                "stop the program that holds it, or set API_LISTEN to another address"
            ) from None
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="api", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; repeating it is harmless."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_STOP_LIMIT)
            self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _app(self) -> FastAPI:
        app = FastAPI(title="certworker", docs_url=None, redoc_url=None, openapi_url=None)
        registry = CollectorRegistry()
        registry.register(FactsCollector(self._facts))

        @app.get("/healthz")
        def healthz() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/readyz")
        def readyz(response: Response) -> dict[str, object]:
            trouble = self._trouble()
            response.status_code = 503 if trouble else 200
            return {"status": "not ready", "why": trouble} if trouble else {"status": "ready"}

        @app.get("/metrics")
        def metrics() -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        return app

    def _trouble(self) -> str | None:
        try:
            last = self._facts.last_scan_at()
        except StoreError as error:
            return str(error)
        if last is None:
            return "no scan has run yet"
        late = self._facts.now() - last
        return f"the last scan was at {_shown(last)}, {late} ago" if late > self._patience else None


def _shown(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
