"""`nodes` and `enrolments`: which gateway machines belong to the fleet, and who may join it.

Of every secret there is only a hash here.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, delete, insert, literal, select, update

from certworker.store.rows import columns_of, insert_new, to_value
from certworker.store.tables import enrolments, nodes
from certworker.store.types import db_now, seconds_from_now


@dataclass(frozen=True, slots=True)
class EnrolledNode:
    """A row of `nodes`."""

    id: str
    name: str
    token_hash: str = field(repr=False)
    """SHA-256, hex."""
    canary: bool
    enrolled_at: datetime
    removed_at: datetime | None
    """None: it belongs to the fleet."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A row of `enrolments`: one token that one node can be enrolled with."""

    id: str
    name: str
    secret_hash: str = field(repr=False)
    canary: bool
    expires_at: datetime
    """By the database's clock."""
    node_id: str | None
    """The node that was enrolled with it."""


def invite(
    tx: Connection, enrolment_id: str, name: str, secret_hash: str, valid: timedelta, *, canary: bool
) -> datetime:
    """Let one node be enrolled as `name`, and nobody with an older token for it; return until when."""
    tx.execute(delete(enrolments).where(enrolments.c.name == name, enrolments.c.node_id.is_(None)))
    expires_at = seconds_from_now(literal(int(valid.total_seconds())))
    row = insert(enrolments).values(
        id=enrolment_id, name=name, secret_hash=secret_hash, canary=canary, expires_at=expires_at
    )
    until: datetime = tx.execute(row.returning(enrolments.c.expires_at)).scalar_one()
    return until


def lock(tx: Connection, enrolment_id: str) -> Enrolment | None:
    """Return an enrolment, locked until the commit."""
    query = select(*columns_of(Enrolment, enrolments)).where(enrolments.c.id == enrolment_id).with_for_update()
    row = tx.execute(query).first()
    return None if row is None else to_value(Enrolment, row)


def has_expired(tx: Connection, enrolment: Enrolment) -> bool:
    """Say whether its time is over."""
    return tx.execute(select(literal(enrolment.expires_at, enrolments.c.expires_at.type) <= db_now())).scalar_one()


def enrol(tx: Connection, enrolment: Enrolment, node_id: str, token_hash: str) -> bool:
    """Use an enrolment up; False if a node of that name is there."""
    if not insert_new(tx, nodes, id=node_id, name=enrolment.name, token_hash=token_hash, canary=enrolment.canary):
        return False
    tx.execute(update(enrolments).where(enrolments.c.id == enrolment.id).values(node_id=node_id))
    return True


def find(tx: Connection, node_id: str) -> EnrolledNode | None:
    """Return a node, which may have been removed."""
    return _first(tx, nodes.c.id == node_id)


def find_named(tx: Connection, name: str) -> EnrolledNode | None:
    """Return the node of this name that belongs to the fleet."""
    return _first(tx, nodes.c.name == name, nodes.c.removed_at.is_(None))


def lock_present(tx: Connection, node_id: str) -> EnrolledNode | None:
    """Return a node that belongs to the fleet, and see that it does until the commit."""
    query = select(*columns_of(EnrolledNode, nodes)).where(nodes.c.id == node_id, nodes.c.removed_at.is_(None))
    row = tx.execute(query.with_for_update()).first()
    return None if row is None else to_value(EnrolledNode, row)


def list_present(tx: Connection) -> list[EnrolledNode]:
    """Return the nodes that belong to the fleet, by name."""
    query = select(*columns_of(EnrolledNode, nodes)).where(nodes.c.removed_at.is_(None)).order_by(nodes.c.name)
    return [to_value(EnrolledNode, row) for row in tx.execute(query)]


def list_open(tx: Connection) -> list[Enrolment]:
    """Return the enrolments that a node can still use, by name."""
    query = select(*columns_of(Enrolment, enrolments)).where(
        enrolments.c.node_id.is_(None), enrolments.c.expires_at > db_now()
    )
    return [to_value(Enrolment, row) for row in tx.execute(query.order_by(enrolments.c.name))]


def take_back(tx: Connection, name: str) -> bool:
    """End every enrolment in a name; False if there was none that could still be used."""
    gone = delete(enrolments).where(enrolments.c.name == name)
    return any(node_id is None for node_id in tx.execute(gone.returning(enrolments.c.node_id)).scalars())


def remove(tx: Connection, name: str) -> str | None:
    """End a node's token; return the node's id, None if there is no such node."""
    row = update(nodes).where(nodes.c.name == name, nodes.c.removed_at.is_(None)).values(removed_at=db_now())
    return tx.execute(row.returning(nodes.c.id)).scalar()


def forget(tx: Connection, kept: timedelta) -> int:
    """Delete enrolments whose time has been over, and nodes that were removed, for longer than `kept`."""
    before = seconds_from_now(literal(-int(kept.total_seconds())))
    gone = tx.execute(delete(enrolments).where(enrolments.c.expires_at < before)).rowcount
    return gone + tx.execute(delete(nodes).where(nodes.c.removed_at < before)).rowcount


def _first(tx: Connection, *conditions: ColumnElement[bool]) -> EnrolledNode | None:
    row = tx.execute(select(*columns_of(EnrolledNode, nodes)).where(*conditions)).first()
    return None if row is None else to_value(EnrolledNode, row)
