"""`/healthz`, `/readyz` and `/metrics` on API_LISTEN.

Healthy means that the process answers; ready means that it can work: the database answers and the scan
runs.
"""

from datetime import datetime, timedelta

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from certworker.api.metrics import Facts, FactsCollector
from certworker.api.serve import Server
from certworker.errors import StoreError

_LATE_SCANS = 3


class ApiServer:
    """The HTTP API for operators."""

    def __init__(self, listen: str, facts: Facts, scan_interval: timedelta) -> None:
        self._facts = facts
        self._patience = max(scan_interval * _LATE_SCANS, timedelta(seconds=30))
        self._server = Server(listen, "API_LISTEN", self._app(), lifespan="off")
        self.start = self._server.start
        self.stop = self._server.stop

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
