"""The gateway's rows become a published config version, once per change.

What is published and what the rows say may differ: after a roll-back, or when a draft was published that
the rows have left behind. Publishing by itself is *held* then, until a person publishes the rows or the
rows say again what is published: the next row that some program changes would otherwise bring back what a
person has just taken away.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.diff import compare
from certworker.core.gateway import Built, Fault, build, read_responders
from certworker.core.gateway_rows import Defaults, GatewayRows
from certworker.core.snapshot import Snapshot, read_snapshot
from certworker.errors import InputError
from certworker.store import audit, changes, gateway, settings_kv, versions
from certworker.store.database import Database
from certworker.store.versions import Version, VersionRow

FAULTS = "publish_faults"
"""settings_kv: why the rows as they are cannot be published, a JSON list of lines; absent when they can."""
LEFT_OUT = "publish_left_out"
"""settings_kv: which rows the published version is without, likewise."""
HOLD = "publish_hold"
"""settings_kv: since when and because of which version nothing is published by itself, a `Hold` as JSON."""
_AUDITED = 200
"""Changes, and faults, that an audit row names; of the others it has the number."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Why nothing is published by itself."""

    number: int
    """The version that was published instead of the rows."""
    by: str
    at: str
    """ISO 8601."""
    why: str = ""

    def __str__(self) -> str:
        because = f" because {self.why}" if self.why else ""
        return (
            f"version {self.number} was published by {self.by} instead of the rows, at {self.at}{because}; "
            "the rows are published again by `certworker config publish`, or when they say the same"
        )


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish came to."""

    version: VersionRow | None
    """The version that is published now; of a draft, the draft. None if there was nothing to do it with."""
    faults: tuple[Fault, ...] = ()
    """Rows that break a rule: without them it was published, or because of them it was not."""
    refused: bool = False
    """Whether nothing was published because of the faults; the version before stands."""
    warnings: tuple[str, ...] = ()
    changed: bool = False
    """Whether it is a new version."""
    hold: Hold | None = None
    """Why the rows were not published by themselves, or will not be."""


@dataclass(frozen=True, slots=True)
class _Move:
    """One change of what is published, or could be: a transaction and what it is made with."""

    tx: Connection
    now: datetime
    defaults: Defaults
    by: str
    why: str = ""
    """What led to it, where nobody asked for it."""


def publish(
    db: Database, clock: Clock, defaults: Defaults, *, created_by: str = audit.WORKER, leave_out: bool = False
) -> Published:
    """Publish the gateway's rows, unless they are published already; a hold ends.

    A row that breaks a rule refuses the whole, or is left out with all that hangs on it.
    """

    def act(move: _Move) -> Published:
        done = _publish_rows(move, leave_out=leave_out)
        if not done.refused:
            settings_kv.forget(move.tx, HOLD)
        return done

    return _carry_out(db, clock, defaults, created_by, act)


def publish_changes(
    db: Database, clock: Clock, defaults: Defaults, *, leave_out: bool = False, always: bool = False
) -> Published | None:
    """The same by itself, if something was noted since (or `always`) and no hold is on; None if nothing was."""
    if not always and not db.read(lambda tx: changes.pending(tx, changes.GATEWAY)):
        return None

    def act(move: _Move) -> Published:
        # Every worker saw the note; whoever had the lock first has taken it, and need not be done after.
        if always or changes.pending(move.tx, changes.GATEWAY):
            return _publish_unless_held(move, leave_out=leave_out)
        return Published(None)

    return _carry_out(db, clock, defaults, audit.WORKER, act)


def pass_over_changes(db: Database) -> None:
    """Take the notes of changed rows and publish nothing: a person does (AUTO_PUBLISH=off), from the rows."""
    if db.read(lambda tx: changes.pending(tx, changes.GATEWAY)):
        db.write(_take_notes)


def draft(
    db: Database, clock: Clock, defaults: Defaults, *, created_by: str = audit.WORKER, leave_out: bool = False
) -> Published:
    """Store the gateway's rows as a draft, unless they are published, or the newest draft, already."""
    return _carry_out(db, clock, defaults, created_by, lambda move: _draft_rows(move, leave_out=leave_out))


def publish_draft(
    db: Database, clock: Clock, defaults: Defaults, number: int, *, created_by: str = audit.WORKER
) -> Published:
    """Publish the draft `number` as it is. Raises InputError if there is none, or a newer version was published."""
    return _carry_out(db, clock, defaults, created_by, lambda move: _publish_draft(move, number))


def roll_back(
    db: Database, clock: Clock, defaults: Defaults, number: int | None = None, *, created_by: str = audit.WORKER
) -> Published:
    """Publish what the archived version `number` holds as a new version; None is what was published before.

    Where challenges are answered is no part of it: that stays as the settings say. Raises InputError if there
    is no such version.
    """
    return _carry_out(db, clock, defaults, created_by, lambda move: _roll_back(move, number))


def take_back(db: Database, clock: Clock, defaults: Defaults, version_id: str, why: str) -> Published | None:
    """Publish what was published before `version_id`, which some node does not serve; None if it stays.

    It stays where a newer one is published by now, where it brought back an older one itself (nodes would be
    led to and fro), and where there is none before it.
    """

    def act(move: _Move) -> Published:
        current = versions.find_published(move.tx)
        if current is None or current.id != version_id or current.restores is not None or current.number is None:
            return Published(current)
        if versions.find_before(move.tx, current.number, current.digest) is None:
            return Published(current)
        return _roll_back(replace(move, why=why), None)

    done = _carry_out(db, clock, defaults, audit.WORKER, act)
    return done if done.changed else None


def find_hold(tx: Connection) -> Hold | None:
    """Return why nothing is published by itself, None if it is."""
    text = settings_kv.find(tx, HOLD)
    return None if text is None else Hold(**json.loads(text))


def figures(tx: Connection) -> dict[str, int]:
    """Return the published version's number (0 for none), how many rows were `refused` or `left_out`, and `held`."""
    return {
        "version": versions.published_number(tx) or 0,
        "refused": len(find_lines(tx, FAULTS)),
        "left_out": len(find_lines(tx, LEFT_OUT)),
        "held": int(find_hold(tx) is not None),
    }


def find_lines(tx: Connection, key: str) -> list[str]:
    """Return what is kept under FAULTS or LEFT_OUT: a line for each row."""
    text = settings_kv.find(tx, key)
    lines: list[str] = [] if text is None else json.loads(text)
    return lines


def _find_snapshot(version: Version | None) -> Snapshot | None:
    """Return what a version holds; None if another program, or a release to come, wrote it in a way of its own."""
    try:
        return None if version is None else read_snapshot(version.snapshot_json)
    except InputError:
        return None


def _carry_out(db: Database, clock: Clock, defaults: Defaults, by: str, act: Callable[[_Move], Published]) -> Published:
    def locked(tx: Connection) -> Published:
        versions.lock(tx)
        return replace(act(_Move(tx, clock(), defaults, by)), hold=find_hold(tx))

    # The rows are read table by table: a document applied meanwhile must be seen whole or not at all.
    return db.write(locked, at_one_moment=True)


def _publish_unless_held(move: _Move, *, leave_out: bool) -> Published:
    if find_hold(move.tx) is None:
        return _publish_rows(move, leave_out=leave_out)
    _take_notes(move.tx)
    current = versions.find_published(move.tx)
    _hold_unless_same(move, current)
    return Published(current)


def _publish_rows(move: _Move, *, leave_out: bool) -> Published:
    _take_notes(move.tx)
    rows, current = gateway.read(move.tx), versions.find_published(move.tx)
    if rows == GatewayRows() and current is None:
        return Published(None)
    built = build(rows, move.defaults)
    _keep_faults(move, built, leave_out=leave_out)
    if built.faults and not leave_out:
        return Published(current, built.faults, refused=True)
    digest = built.snapshot.digest()
    if current is not None and current.digest == digest:
        return Published(current, built.faults, warnings=built.warnings)
    version = _publish(move, "config.published", _add(move, built.snapshot, digest), built.snapshot, current)
    return Published(version, built.faults, warnings=built.warnings, changed=True)


def _draft_rows(move: _Move, *, leave_out: bool) -> Published:
    rows = gateway.read(move.tx)
    if rows == GatewayRows():
        return Published(None)
    built = build(rows, move.defaults)
    current, newest = versions.find_published(move.tx), versions.find_newest_draft(move.tx)
    if built.faults and not leave_out:
        return Published(current, built.faults, refused=True)
    digest = built.snapshot.digest()
    for same in (current, newest):
        if same is not None and same.digest == digest:
            return Published(same, built.faults, warnings=built.warnings)
    version = _add(move, built.snapshot, digest)
    _audit(move, "config.drafted", version, built.snapshot, current)
    return Published(version, built.faults, warnings=built.warnings, changed=True)


def _publish_draft(move: _Move, number: int) -> Published:
    version, current = _get(move.tx, number), versions.find_published(move.tx)
    if version.status == "archived":
        raise InputError(f"version {number}: is archived; `certworker config rollback {number}` brings it back")
    if version.status == "published":
        return Published(current)
    if current is not None and (current.number or 0) > number:
        raise InputError(
            f"version {number}: version {current.number} was published after this draft was made, and would be undone; "
            f"look at `certworker config diff published {number}`, and make a new draft"
        )
    snapshot = _get_snapshot(version)
    if current is not None and current.digest == version.digest:
        return Published(current)
    version = _publish(move, "config.published", version, snapshot, current)
    _hold_unless_same(move, version)
    return Published(version, changed=True)


def _roll_back(move: _Move, number: int | None) -> Published:
    current = versions.find_published(move.tx)
    target = _get(move.tx, number) if number is not None else _before(move.tx, current)
    if target.status == "draft":
        raise InputError(
            f"version {target.number}: is a draft, which was never published; `certworker config publish "
            f"{target.number}` publishes it"
        )
    snapshot = _get_snapshot(target).model_copy(update={"responders": read_responders(move.defaults)})
    digest = snapshot.digest()
    if current is not None and current.digest == digest:
        return Published(current)
    version = _add(move, snapshot, digest, restores=target.restores or target.number)
    version = _publish(move, "config.rolled_back", version, snapshot, current)
    _hold_unless_same(move, version)
    return Published(version, changed=True)


def _before(tx: Connection, current: Version | None) -> Version:
    if current is None or current.number is None:
        raise InputError("nothing to roll back: certworker has published no version yet")
    found = versions.find_before(tx, current.restores or current.number, current.digest)
    if found is None:
        raise InputError(
            f"nothing to roll back to: no version before {current.restores or current.number} is kept; "
            "see `certworker config versions`"
        )
    return found


def _get(tx: Connection, number: int) -> Version:
    found = versions.find(tx, number)
    if found is None:
        raise InputError(f"version {number}: there is none; see `certworker config versions`")
    return found


def _get_snapshot(version: Version) -> Snapshot:
    try:
        return read_snapshot(version.snapshot_json)
    except InputError as error:
        raise InputError(f"version {version.number}: this release cannot serve it: {error}") from None


def _add(move: _Move, snapshot: Snapshot, digest: str, *, restores: int | None = None) -> Version:
    return versions.add_draft(move.tx, snapshot.document(), digest, move.by, move.now, restores=restores)


def _publish(move: _Move, action: str, version: Version, snapshot: Snapshot, current: Version | None) -> Version:
    _audit(move, action, version, snapshot, current)
    return versions.publish(move.tx, version)


def _hold_unless_same(move: _Move, published: VersionRow | None) -> None:
    """Hold what is published while the rows say something else."""
    held = find_hold(move.tx)
    if published is None or build(gateway.read(move.tx), move.defaults).snapshot.digest() == published.digest:
        settings_kv.forget(move.tx, HOLD)
    elif held is None or held.number != published.number:
        at = move.now.isoformat(timespec="seconds")
        hold = {"number": published.number, "by": move.by, "at": at, "why": move.why}
        settings_kv.put(move.tx, HOLD, json.dumps(hold))


def _take_notes(tx: Connection) -> None:
    while changes.take(tx, changes.GATEWAY, 1000):
        pass


def _keep_faults(move: _Move, built: Built, *, leave_out: bool) -> None:
    """Keep the faults for `status`; an audit row only when they are new."""
    key, other, action = (LEFT_OUT, FAULTS, "config.left_out") if leave_out else (FAULTS, LEFT_OUT, "config.refused")
    lines = [str(fault) for fault in built.faults]
    settings_kv.forget(move.tx, other)
    if not lines:
        settings_kv.forget(move.tx, key)
    elif settings_kv.find(move.tx, key) != json.dumps(lines):
        settings_kv.put(move.tx, key, json.dumps(lines))
        _record(move, action, {}, "faults", lines)


def _audit(move: _Move, action: str, version: Version, snapshot: Snapshot, current: Version | None) -> None:
    listed = [change.document() for change in compare(_find_snapshot(current), snapshot)]
    before = None if current is None else current.number
    diff = {"table": "config_versions", "id": version.id, "before": before, "after": version.number}
    if version.restores is not None:
        diff["restores"] = version.restores
    if move.why:
        diff["reason"] = move.why
    _record(move, action, diff, "changes", listed)


def _record(move: _Move, action: str, diff: dict[str, Any], what: str, listed: list[Any]) -> None:
    shown = {what: listed[:_AUDITED], "more": max(len(listed) - _AUDITED, 0)}
    audit.record(move.tx, action, {**diff, **shown}, move.now, actor=move.by)
