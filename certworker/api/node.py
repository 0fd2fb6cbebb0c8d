"""The node API: what gateway machines ask the control plane, over HTTPS on NODE_LISTEN.

    POST /v1/enrol                                        a one-time token becomes a node
    GET  /v1/node/version?after=ID&epoch=&revision=&wait=   the version to serve, 204 if it is `after`
    GET  /v1/node/certificates?epoch=&revision=&scope=&continued=   a page of what changed
    POST /v1/node/heartbeat                               what the node proved

A node is who its token says, whatever it sends. `version` with `wait` answers at once when there is
another version or a newer certificate, so that one long poll is enough for both. Faults are problem
documents (RFC 9457). Neither requests nor answers are logged: they hold tokens and keys.
"""

import asyncio
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Protocol, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from certworker.api.board import Board
from certworker.api.failures import Failures
from certworker.api.serve import Server
from certworker.core.delivery import Node, Standing
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.transit import (
    ChangesAnswer,
    EnrolAnswer,
    EnrolRequest,
    HeartbeatAnswer,
    HeartbeatBody,
    NodeToken,
    VersionAnswer,
    VersionDocument,
    read,
    read_node_token,
)
from certworker.errors import (
    CertworkerError,
    EnrolmentRefused,
    InputError,
    NodeRemoved,
    StoreError,
    TokenUnknown,
)

MAX_ENROLMENT = 4 * 1024
MAX_HEARTBEAT = 8 * 1024 * 1024
"""Bytes. A node that meets 10,000 certificates for the first time proves some 1.2 MB of fingerprints."""
BODY_LIMIT = timedelta(seconds=30)
"""How long a body may take to arrive."""
LONGEST_WAIT = 60
"""Seconds that a node may ask to wait."""
CONNECTIONS = 4000
_THREADS = 8
"""Requests that are worked on at the same time; each has a database connection for that long."""
_NO_STORE = {"Cache-Control": "no-store"}

_log = logging.getLogger(__name__)

T = TypeVar("T")


class ControlPlane(Protocol):
    """What the node API asks, from its threads; `parts` builds it on the database. All may raise StoreError."""

    def look(self) -> Standing:
        """Return where the control plane is."""

    def admit(self, request: EnrolRequest) -> str:
        """Enrol a node and return its id; EnrolmentRefused if that token is good for nothing."""

    def recognise(self, token: NodeToken) -> Node:
        """Return whose token it is; TokenUnknown, NodeRemoved."""

    def version_id_for(self, node: Node) -> str | None:
        """Return which version this node is to serve, None if there is none yet."""

    def find_version(self, version_id: str) -> VersionDocument | None:
        """Return that version."""

    def changes_for(self, node: Node, cursor: Cursor, *, continued: bool) -> CertificateChanges:
        """Return a page of the certificates that this node can answer with."""

    def record(self, node: Node, heartbeat: Heartbeat, agent: str, address: str) -> None:
        """Write what a node proved; NodeRemoved if it was removed meanwhile."""

    @property
    def heartbeat_every(self) -> timedelta:
        """How often nodes are to be heard of."""


_Counter = Annotated[int, Query(ge=0, lt=2**63)]


class VersionQuery(BaseModel):
    """Where the node is, and how long it would wait for something newer."""

    after: Annotated[str, Query(max_length=36)] = ""
    epoch: _Counter = 0
    revision: _Counter = 0
    wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0


class CertificatesQuery(BaseModel):
    """The node's cursor, and whether it goes on with pages that began with a complete one."""

    epoch: _Counter = 0
    revision: _Counter = 0
    scope: Annotated[str, Query(max_length=64)] = ""
    continued: bool = False


@dataclass(frozen=True, slots=True)
class _Problem:
    status: int
    title: str


_PROBLEMS: dict[type[CertworkerError], _Problem] = {
    InputError: _Problem(400, "not understood"),
    TokenUnknown: _Problem(401, "token unknown"),
    EnrolmentRefused: _Problem(403, "enrolment refused"),
    NodeRemoved: _Problem(403, "node removed"),
    StoreError: _Problem(503, "database away"),
}


class NodeApi:
    """The node API in a thread of its own."""

    def __init__(self, listen: str, plane: ControlPlane, tls: ssl.SSLContext) -> None:
        self._plane = plane
        self._threads = ThreadPoolExecutor(_THREADS, "node-api")
        self._failures = Failures()
        self._board = Board(lambda: self._work(plane.look))
        self._server = Server(
            listen, "NODE_LISTEN", self._app(), tls,
            lifespan="on", limit_concurrency=CONNECTIONS,
        )  # fmt: skip

    def start(self) -> None:
        """Listen; CertworkerError if the address cannot be had."""
        self._server.start()

    def stop(self) -> None:
        """Answer who waits, and stop listening; repeating it is harmless."""
        self._board.close()
        self._server.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def poke(self) -> None:
        """Something changed that nodes may wait for."""
        self._board.poke()

    @asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        async with self._board.kept_up_to_date():
            yield

    def _app(self) -> FastAPI:
        app = FastAPI(title="certworker nodes", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._life)
        app.post("/v1/enrol")(self._enrol)
        app.get("/v1/node/version")(self._version)
        app.get("/v1/node/certificates")(self._certificates)
        app.post("/v1/node/heartbeat")(self._heartbeat)
        app.exception_handler(CertworkerError)(self._refuse)
        app.exception_handler(RequestValidationError)(_refuse_query)
        app.exception_handler(HTTPException)(_refuse_http)
        app.exception_handler(Exception)(_own_fault)
        return app

    # -- routes -----------------------------------------------------------------------------------------

    async def _enrol(self, request: Request) -> Response:
        self._listen_to(request)
        asked = read(EnrolRequest, await _body(request, MAX_ENROLMENT), "the enrolment")
        node_id = await self._work(lambda: self._plane.admit(asked))
        _log.info("node.enrolled", extra={"node": asked.name, "address": _address(request)})
        return _json(EnrolAnswer(node_id=node_id))

    async def _version(self, request: Request, query: Annotated[VersionQuery, Query()]) -> Response:
        node = await self._recognise(request)
        if query.wait:
            at = Cursor(query.epoch, query.revision)
            await self._board.wait(
                lambda standing: standing.is_news(query.after, at, canary=node.canary), timedelta(seconds=query.wait)
            )
            node = await self._recognise(request)  # it may have been removed
        version_id = await self._work(lambda: self._plane.version_id_for(node))
        if (version_id or "") == query.after:
            return Response(status_code=204, headers=_NO_STORE)
        if version_id is None:
            return _json(VersionAnswer(version=None))
        found = version_id
        return _json(VersionAnswer(version=await self._work(lambda: self._plane.find_version(found))))

    async def _certificates(self, request: Request, query: Annotated[CertificatesQuery, Query()]) -> Response:
        node = await self._recognise(request)
        cursor = Cursor(query.epoch, query.revision, query.scope)
        changes = await self._work(lambda: self._plane.changes_for(node, cursor, continued=query.continued))
        return _json(ChangesAnswer(changes=changes))

    async def _heartbeat(self, request: Request) -> Response:
        node = await self._recognise(request)
        said = read(HeartbeatBody, await _body(request, MAX_HEARTBEAT), "the heartbeat")
        heartbeat, address = said.heartbeat(node.name), _address(request)
        await self._work(lambda: self._plane.record(node, heartbeat, said.agent, address))
        if node.canary:
            self._board.poke()  # others may be waiting for what it proved
        return _json(HeartbeatAnswer(heartbeat_secs=self._plane.heartbeat_every.total_seconds()))

    # -- who asks ---------------------------------------------------------------------------------------

    def _listen_to(self, request: Request) -> None:
        wait = self._failures.wait(_address(request))
        if wait:
            raise HTTPException(429, "too many wrong tokens came from this address", {"Retry-After": f"{wait + 1:.0f}"})

    async def _recognise(self, request: Request) -> Node:
        """Return whose token it is; a good one is good from any address, behind which there may be many nodes."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        token = read_node_token(text.strip()) if scheme.lower() == "bearer" else None
        try:
            if token is None:
                raise TokenUnknown("a node's token is needed: Authorization: Bearer TOKEN")
            return await self._work(lambda: self._plane.recognise(token))
        except TokenUnknown:
            self._listen_to(request)
            raise

    async def _work(self, what: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, what)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        kind = next((problem for known, problem in _PROBLEMS.items() if isinstance(error, known)), None)
        if kind is None:
            return await _own_fault(request, error)
        if isinstance(error, (TokenUnknown, EnrolmentRefused)):
            self._failures.note(_address(request))
            _log.warning("node_api.refused", extra={"address": _address(request), "error": str(error)})
        headers = {"WWW-Authenticate": "Bearer"} if kind.status == 401 else {}
        return problem(kind.status, kind.title, str(error), headers)


async def _refuse_query(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return problem(400, "not understood", f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}")


async def _refuse_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, "not answered", str(error.detail), error.headers or {})


async def _own_fault(_request: Request, _error: Exception) -> Response:
    # uvicorn logs it.
    return problem(500, "a fault of ours", "the control plane failed; its log says at what")


def problem(status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a problem document (RFC 9457)."""
    document = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return Response(json.dumps(document), status, {**_NO_STORE, **(headers or {})}, "application/problem+json")


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), headers=_NO_STORE, media_type="application/json")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


async def _body(request: Request, most: int) -> bytes:
    """Return the body, or refuse one that is too long or too slow."""
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_LIMIT.total_seconds()):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise HTTPException(413, f"a body has at most {most} bytes here")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_LIMIT.total_seconds():.0f} s") from None
    return bytes(content)


def make_tls(certificate_pem: str, key_pem: str) -> ssl.SSLContext:
    """Return what the node API proves itself with: TLS 1.3, which every agent speaks.

    Python loads a key from a file only. This one is in memory and has no name, so that the key lies on no disk,
    and nobody else can read it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    descriptor = os.memfd_create("node-api", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, f"{key_pem}{certificate_pem}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context
