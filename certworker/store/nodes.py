"""`node_status`: what every node proved to serve, and when it was last heard of."""

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Integer, Select, bindparam, delete, func, literal, select, update

from certworker.core.rollout import Heartbeat
from certworker.store import counters
from certworker.store.rows import insert_new, new_id
from certworker.store.tables import config_versions, node_status
from certworker.store.types import db_now, seconds_from_now


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A row of `node_status`."""

    node_id: str
    version_id: str | None
    heartbeat_at: datetime
    """The database's time."""
    metadata: dict[str, Any] | None
    epoch: int
    """The database's, now: what a node proved before a restore says nothing about what is there since."""

    @property
    def revision(self) -> int:
        """Every certificate up to this revision was proved to be served, or is named in `unserved`."""
        cursor = self._member("cursor")
        revision = cursor.get("revision", 0) if cursor.get("epoch") == self.epoch else 0
        return revision if isinstance(revision, int) else 0

    @property
    def version(self) -> int | None:
        """Number of the version it proved to serve."""
        number = self._value("version_number")
        return number if isinstance(number, int) else None

    @property
    def proxy(self) -> str | None:
        """For example `haproxy 2.6.12`."""
        return self._text("proxy")

    @property
    def agent(self) -> str | None:
        """The program that sent it, for example `certworker 1.0.0`."""
        return self._text("agent")

    @property
    def address(self) -> str | None:
        """Where it came from; None for an embedded node."""
        return self._text("address")

    @property
    def fingerprints(self) -> dict[str, str]:
        return self._member("fingerprints")

    @property
    def unserved(self) -> dict[str, str]:
        return self._member("unserved")

    @property
    def refused(self) -> dict[str, str]:
        """Certificate id -> what the node, or its proxy, has against it."""
        return self._member("refused")

    @property
    def refused_version_id(self) -> str | None:
        """The newest version, if the node did not take it over."""
        refused = self._value("refused_version_id")
        return refused if isinstance(refused, str) else None

    @property
    def unanswered(self) -> dict[str, str]:
        """Host -> why the node does not answer challenges for it."""
        return self._member("unanswered")

    @property
    def untold(self) -> int:
        """How many more it has in `unserved` and `unanswered` than it named: any one may be among them."""
        untold = self._value("untold")
        return untold if isinstance(untold, int) else 0

    @property
    def warnings(self) -> list[str]:
        """What there is to remark on the version that it serves."""
        found = self._value("warnings")
        return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []

    @property
    def error(self) -> str | None:
        return self._text("error")

    def _text(self, name: str) -> str | None:
        value = self._value(name)
        return value if isinstance(value, str) else None

    def _member(self, name: str) -> dict[str, Any]:
        value = self._value(name)
        return value if isinstance(value, dict) else {}

    def _value(self, name: str) -> Any:
        # Any program may write the column, anything.
        return self.metadata.get(name) if isinstance(self.metadata, dict) else None


def record(tx: Connection, heartbeat: Heartbeat, agent: str | None = None, address: str | None = None) -> None:
    """Write a node's newest heartbeat, with the database's time; `agent` says which program sent it, and from where."""
    metadata = {key: value for key, value in asdict(heartbeat).items() if key not in ("node_id", "version_id")}
    metadata |= {"agent": agent, "address": address, "revision": heartbeat.cursor.revision}
    known = None
    if heartbeat.version_id is not None:
        query = select(config_versions.c.id).where(config_versions.c.id == heartbeat.version_id)
        known = tx.execute(query).scalar()
    values = {"version_id": known, "heartbeat_at": db_now(), "metadata": metadata}
    row = update(node_status).where(node_status.c.node_id == heartbeat.node_id).values(**values)
    if tx.execute(row).rowcount == 0:
        insert_new(tx, node_status, id=new_id(), node_id=heartbeat.node_id, **values)


def find(tx: Connection, node_id: str) -> NodeStatus | None:
    """Return what one node said last."""
    return next(iter(_read(tx, _ALL.where(node_status.c.node_id == node_id))), None)


def forget(tx: Connection, node_id: str) -> bool:
    """Delete what a node said, so that nobody waits for it; False if it never said anything."""
    return tx.execute(delete(node_status).where(node_status.c.node_id == node_id)).rowcount > 0


def is_any(tx: Connection) -> bool:
    """Say whether a node was ever heard of."""
    return tx.execute(select(node_status.c.id).limit(1)).first() is not None


def list_all(tx: Connection) -> list[NodeStatus]:
    """Return every node that was ever heard of, by name."""
    return _read(tx, _ALL)


def live(tx: Connection, silent: timedelta) -> list[NodeStatus]:
    """Return the nodes heard of within `silent`, by name."""
    since = seconds_from_now(literal(-int(silent.total_seconds())))
    return _read(tx, _ALL.where(node_status.c.heartbeat_at > since))


def newest_heartbeat(tx: Connection, silent: timedelta) -> datetime | None:
    """Return when a node was last heard of; None if that is longer ago than `silent`: no node is live."""
    return tx.execute(_NEWEST, {"silent": -int(silent.total_seconds())}).scalar()


_NEWEST = select(func.max(node_status.c.heartbeat_at)).where(
    node_status.c.heartbeat_at > seconds_from_now(bindparam("silent", type_=Integer))
)
_ALL = select(
    node_status.c.node_id, node_status.c.version_id, node_status.c.heartbeat_at, node_status.c.metadata
).order_by(node_status.c.node_id)


def _read(tx: Connection, query: Select[Any]) -> list[NodeStatus]:
    epoch = counters.value(tx, counters.EPOCH)
    rows = tx.execute(query)
    return [NodeStatus(node_id, version_id, at, metadata, epoch) for node_id, version_id, at, metadata in rows]
