"""A control plane with a node API on loopback, and gateway machines that are only a connection."""

import http.client
import json
import secrets
import ssl
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from certworker.api.node import NodeApi, make_tls
from certworker.cli.pebble import free_ports
from certworker.core.rollout import Cursor, Heartbeat
from certworker.core.snapshot import Listener, Policy, Snapshot
from certworker.core.transit import EnrolRequest, NodeToken
from certworker.node.remote import Endpoint, Line, RemoteSource, enrol
from certworker.steps.admit import dismiss, invite
from certworker.steps.deliver import look
from certworker.steps.fleet import Fleet
from certworker.steps.identity import take_identity
from certworker.store import versions
from certworker.store.database import Database, Transaction
from tests.steps.world import World

SILENT = timedelta(seconds=60)


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


@dataclass(frozen=True)
class Answer:
    """What came back over plain HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Plane:
    """What a worker with NODE_LISTEN is for its nodes."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.world = World(db)
        self.identity = take_identity(db, self.world.sealer)
        self.fleet = Fleet(db, self.world.sealer, self.world.clock, SILENT)
        (self.port,) = free_ports(1)
        self.api = self.serve()
        self.lines: list[Line] = []

    def serve(self) -> NodeApi:
        tls = make_tls(self.identity.certificate_pem, self.identity.key_pem)
        api = NodeApi(f"127.0.0.1:{self.port}", self.fleet, tls)
        api.start()
        return api

    def stop(self) -> None:
        for line in self.lines:
            line.close()
        self.api.stop()

    # -- what the control plane does --------------------------------------------------------------------

    def publish(self, *policies: str | None) -> str:
        """Publish a version with one https listener for each policy; None: for all."""
        number = self.world.count("config_versions")
        listeners = tuple(
            Listener.model_validate({"id": uuid(port), "port": port, "protocol": "https", "tls_policy_id": policy})
            for port, policy in enumerate(policies, 1000 + number)
        )
        named = tuple(Policy(id=policy, mode="auto") for policy in sorted({*policies} - {None}) if policy is not None)
        snapshot = Snapshot(listeners=listeners, policies=named)
        now = self.world.clock()

        def publish(tx: Transaction) -> str:
            draft = versions.add_draft(tx, snapshot.document(), snapshot.digest(), "test", now)
            return versions.publish(tx, draft).id

        version_id = self.db.write(publish)
        self.api.poke()
        return version_id

    def dismiss(self, name: str) -> bool:
        return dismiss(self.db, self.world.clock, name, actor="test")

    def look(self) -> str | None:
        return look(self.db, SILENT).released_id

    # -- machines ---------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"https://127.0.0.1:{self.port}", self.identity.pin)

    def line(self, limit: timedelta = timedelta(seconds=20)) -> Line:
        self.lines.append(Line(self.endpoint, limit))
        return self.lines[-1]

    def request(self, name: str, *, canary: bool = False) -> EnrolRequest:
        """Return what a machine that was given a token asks."""
        invitation = invite(self.db, self.world.clock, name, canary=canary, actor="test")
        return EnrolRequest(
            enrolment_id=invitation.enrolment_id, secret=invitation.secret, name=name,
            node_secret=secrets.token_urlsafe(32),
        )  # fmt: skip

    def join(self, name: str, *, canary: bool = False) -> "Machine":
        request = self.request(name, canary=canary)
        return Machine(self, name, NodeToken(enrol(self.line(), request), request.node_secret))

    def ask(self, method: str, path: str, token: str | None = None, body: bytes | str | None = None) -> Answer:
        """Ask as no agent would: any bytes, any token."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


class Machine:
    """A node without a proxy: it proves whatever a test says."""

    def __init__(self, plane: Plane, name: str, token: NodeToken) -> None:
        self.plane = plane
        self.name = name
        self.token = token
        self.source = RemoteSource(plane.line(), token, "certworker test")

    def heartbeat(self, version_id: str | None, cursor: Cursor = Cursor(), **more: Any) -> Heartbeat:  # noqa: B008
        number = None if version_id is None else 1
        return Heartbeat(self.name, version_id, number, cursor, "haproxy 2.6.12", **more)

    def prove(self, version_id: str | None, cursor: Cursor = Cursor()) -> None:  # noqa: B008
        self.source.report(self.heartbeat(version_id, cursor))

    def served(self) -> str | None:
        """Return the id of the version that it is told to serve."""
        published = self.source.published()
        return None if published is None else published.id
