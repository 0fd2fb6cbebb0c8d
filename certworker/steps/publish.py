"""The gateway's rows become a published config version, once per change."""

import json
from dataclasses import dataclass

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.gateway import Defaults, Fault, GatewayRows, build
from certworker.store import audit, changes, gateway, settings_kv, versions
from certworker.store.database import Database
from certworker.store.versions import Version

FAULTS = "publish_faults"
"""settings_kv: why the rows as they are cannot be published, a JSON list of lines; absent when they can."""


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish came to."""

    version: Version | None
    """The version that is published now."""
    faults: tuple[Fault, ...] = ()
    """Why the newest rows are not; the version before stands."""
    warnings: tuple[str, ...] = ()
    changed: bool = False
    """Whether it is a new version."""


def publish(db: Database, clock: Clock, defaults: Defaults, *, created_by: str = audit.WORKER) -> Published:
    """Publish the gateway's rows, unless they are published already or one of them is faulty."""
    return db.write(lambda tx: _publish(tx, clock, defaults, created_by))


def publish_changes(db: Database, clock: Clock, defaults: Defaults) -> Published | None:
    """The same, if something was noted since; None if nothing was."""
    if not db.read(lambda tx: changes.pending(tx, changes.GATEWAY)):
        return None
    return publish(db, clock, defaults)


def _publish(tx: Connection, clock: Clock, defaults: Defaults, created_by: str) -> Published:
    versions.lock(tx)
    while changes.take(tx, changes.GATEWAY, 1000):
        pass
    rows, current = gateway.read(tx), versions.find_published(tx)
    if rows == GatewayRows() and current is None:
        return Published(None)
    built = build(rows, defaults)
    if built.faults:
        _refuse(tx, clock, [str(fault) for fault in built.faults])
        return Published(current, built.faults)
    settings_kv.forget(tx, FAULTS)
    digest = built.snapshot.digest()
    if current is not None and current.digest == digest:
        return Published(current, warnings=built.warnings)
    version = versions.publish(tx, built.snapshot.document(), digest, created_by, clock())
    before = None if current is None else current.number
    diff = {"table": "config_versions", "id": version.id, "before": before, "after": version.number}
    audit.record(tx, "config.published", diff, clock(), actor=created_by)
    return Published(version, warnings=built.warnings, changed=True)


def _refuse(tx: Connection, clock: Clock, faults: list[str]) -> None:
    """Keep the faults for `status`; an audit row only when they are new."""
    text = json.dumps(faults)
    if settings_kv.find(tx, FAULTS) == text:
        return
    settings_kv.put(tx, FAULTS, text)
    audit.record(tx, "config.refused", {"faults": faults[:20], "more": max(len(faults) - 20, 0)}, clock())
