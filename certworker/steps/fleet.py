"""What nodes on other machines are told and may write. An `api.node.ControlPlane` on the database."""

from datetime import timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.delivery import Node, Scope, Standing, join_scopes
from certworker.core.rollout import CertificateChanges, Cursor, Heartbeat
from certworker.core.transit import EnrolRequest, NodeToken, VersionDocument
from certworker.errors import NodeRemoved
from certworker.steps.admit import admit, recognise
from certworker.steps.deliver import Scopes, look, read_changes
from certworker.store import enrolments, nodes, settings_kv, versions
from certworker.store.database import Database
from certworker.store.seal import Sealer

_RECENT = (settings_kv.RELEASED_VERSION, settings_kv.RELEASED_BEFORE)
_SELDOM, _OFTEN = timedelta(seconds=10), timedelta(seconds=1)


class Fleet:
    """The control plane as nodes see it, in as many threads as ask."""

    def __init__(self, db: Database, sealer: Sealer, clock: Clock, silent: timedelta) -> None:
        """Speak for `db`; a node that was not heard of for `silent` is not live."""
        self._db, self._sealer, self._clock, self._silent = db, sealer, clock, silent
        self._scopes = Scopes()

    @property
    def heartbeat_every(self) -> timedelta:
        """A node that is heard of so often is live even if two of its heartbeats get lost."""
        return max(_OFTEN, min(_SELDOM, self._silent / 4))

    def look(self) -> Standing:
        """Return where the control plane is."""
        return look(self._db, self._silent)

    def admit(self, request: EnrolRequest) -> str:
        """Enrol a node and return its id."""
        return admit(self._db, self._clock, request)

    def recognise(self, token: NodeToken) -> Node:
        """Return whose token it is."""
        return recognise(self._db, token)

    def version_id_for(self, node: Node) -> str | None:
        """Return which version this node is to serve: a canary the published one, the others the released one."""
        return self._db.read(lambda tx: _version_id(tx, node))

    def find_version(self, version_id: str) -> VersionDocument | None:
        """Return that version, None if it is gone."""
        found = self._db.read(lambda tx: versions.find_by_id(tx, version_id))
        if found is None:
            return None
        return VersionDocument(id=found.id, number=found.number or 0, snapshot=found.snapshot_json)

    def changes_for(self, node: Node, cursor: Cursor, *, continued: bool) -> CertificateChanges:
        """Return a page of the certificates that this node can answer with, by what it serves and is to serve.

        By both, because it serves on what it has until the new version is proved.
        """

        def read(tx: Connection) -> CertificateChanges:
            scope = self._scope(tx, node)
            return read_changes(tx, self._sealer, cursor, scope, continued=continued)

        return self._db.read(read)

    def record(self, node: Node, heartbeat: Heartbeat, agent: str, address: str) -> None:
        """Write what a node proved, unless it was removed meanwhile: nobody is to wait for it then."""

        def write(tx: Connection) -> bool:
            present = enrolments.lock_present(tx, node.id) is not None
            if present:
                nodes.record(tx, heartbeat, agent, address)
            return present

        if not self._db.write(write):
            raise NodeRemoved(f"node {node.name} was removed")

    def _scope(self, tx: Connection, node: Node) -> Scope:
        wanted, said = _version_id(tx, node), nodes.find(tx, node.name)
        # What it says it serves is believed as far back as a node that refuses the newest version can be: else
        # a stolen token would say a version that has what this node was to have no longer.
        recent = {wanted, *(settings_kv.find(tx, key) for key in _RECENT)}
        served = said.version_id if said is not None and said.version_id in recent else None
        return join_scopes(self._scopes.of(tx, {wanted, served}))


def _version_id(tx: Connection, node: Node) -> str | None:
    if node.canary:
        return versions.published_id(tx)
    return settings_kv.find(tx, settings_kv.RELEASED_VERSION)
