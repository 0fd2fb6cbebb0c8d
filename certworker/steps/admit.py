"""Who belongs to the fleet: a node is invited, enrols itself once, is recognised by its token, and removed.

Secrets are 256 random bits, so their SHA-256 is all that has to be kept; they are compared in constant
time, after a look-up by an id that is no secret.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.delivery import Node
from certworker.core.transit import EnrolRequest, NodeToken
from certworker.errors import EnrolmentRefused, InputError, NodeRemoved, TokenUnknown
from certworker.store import audit, enrolments, nodes
from certworker.store.database import Database
from certworker.store.enrolments import Enrolment
from certworker.store.rows import new_id

VALID = timedelta(hours=1)
"""How long a one-time token is good: it is carried to the machine and used there."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a node can be enrolled with, once."""

    enrolment_id: str
    secret: str = field(repr=False)
    expires_at: datetime


def invite(db: Database, clock: Clock, name: str, *, canary: bool, actor: str) -> Invitation:
    """Let one node be enrolled as `name`; an older token for that name ends. `actor` is who says so."""
    enrolment_id, secret = new_id(), secrets.token_urlsafe(32)

    def write(tx: Connection) -> datetime:
        _refuse_taken(tx, name)
        diff = {"table": "enrolments", "id": enrolment_id, "name": name, "canary": canary}
        audit.record(tx, "node.invited", diff, clock(), actor=actor)
        return enrolments.invite(tx, enrolment_id, name, _hash(secret), VALID, canary=canary)

    return Invitation(enrolment_id, secret, db.write(write))


def _refuse_taken(tx: Connection, name: str) -> None:
    known = enrolments.find_named(tx, name) is not None
    if known or nodes.find(tx, name) is not None:
        what = "is enrolled" if known else "has reported already (an embedded node?)"
        raise InputError(f"node {name}: a node of this name {what}; `certworker node remove {name}`, or choose another")


def admit(db: Database, clock: Clock, request: EnrolRequest) -> str:
    """Enrol a node and return its id; the same again for who asks the same again, because an answer may get lost.

    EnrolmentRefused if the token is unknown, not for this name, used by another, or too old.
    """
    node_id = new_id()
    return db.write(lambda tx: _admit(tx, clock, request, node_id))


def _admit(tx: Connection, clock: Clock, request: EnrolRequest, node_id: str) -> str:
    enrolment = enrolments.lock(tx, request.enrolment_id)
    if enrolment is None or not _fits(request.secret, enrolment.secret_hash) or request.name != enrolment.name:
        raise EnrolmentRefused(
            "no such enrolment token: it was made by another control plane, or a newer one replaced it"
        )
    if enrolment.node_id is not None:
        return _admitted_before(tx, enrolment, request)
    if enrolments.has_expired(tx, enrolment):
        raise EnrolmentRefused(f"the enrolment token of node {enrolment.name} was good until {_shown(enrolment)}")
    if not enrolments.enrol(tx, enrolment, node_id, _hash(request.node_secret)):
        raise EnrolmentRefused(f"a node {enrolment.name} is enrolled already: remove it first")
    diff = {"table": "nodes", "id": node_id, "name": enrolment.name, "canary": enrolment.canary}
    audit.record(tx, "node.enrolled", diff, clock(), actor=enrolment.name)
    return node_id


def _admitted_before(tx: Connection, enrolment: Enrolment, request: EnrolRequest) -> str:
    node = enrolments.find(tx, enrolment.node_id or "")
    if node is None or node.removed_at is not None or not _fits(request.node_secret, node.token_hash):
        raise EnrolmentRefused(
            f"the enrolment token of node {enrolment.name} has been used; if not by you, remove that node"
        )
    return node.id


def _shown(enrolment: Enrolment) -> str:
    return enrolment.expires_at.isoformat(timespec="seconds")


def recognise(db: Database, token: NodeToken) -> Node:
    """Return the node that has this token; TokenUnknown if none has, NodeRemoved if it belongs to the fleet no more."""
    node = db.read(lambda tx: enrolments.find(tx, token.node_id))
    # Compared even with nothing, so that the time does not tell whether there is such a node.
    if not _fits(token.secret, "" if node is None else node.token_hash) or node is None:
        raise TokenUnknown("no node has this token: enrol it with `certworker node enroll`")
    if node.removed_at is not None:
        raise NodeRemoved(f"node {node.name} was removed: enrol it anew with `certworker node enroll {node.name}`")
    return Node(node.id, node.name, node.canary)


def dismiss(db: Database, clock: Clock, name: str, *, actor: str) -> bool:
    """Remove a node: its tokens end, and nobody waits for it any more; False if there was no such node.

    One that was only invited is one, too: its enrolment token ends.
    """

    def write(tx: Connection) -> bool:
        invited = enrolments.take_back(tx, name)
        node_id = enrolments.remove(tx, name)
        reported = nodes.forget(tx, name)
        known = invited or reported or node_id is not None
        if known:
            audit.record(tx, "node.removed", {"table": "nodes", "id": node_id, "name": name}, clock(), actor=actor)
        return known

    return db.write(write)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _fits(secret: str, expected_hash: str) -> bool:
    return hmac.compare_digest(_hash(secret), expected_hash)
