"""What an embedded node is told by the database, while others write to it."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from certworker.core.gateway import Defaults
from certworker.core.rollout import Cursor
from certworker.errors import VersionRefused
from certworker.settings import load
from certworker.source import DatabaseSource
from certworker.steps.publish import publish
from certworker.store import certificates
from certworker.store.database import Database
from certworker.store.rows import new_id
from certworker.wiring import App
from tests.steps.world import World


def test_what_commits_during_a_look_is_delivered_by_the_next(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor never runs ahead of what was read: no certificate is passed over for good."""
    world = World(db)
    world.issue("a.test")
    source = DatabaseSource(App(load({}), db, world.sealer, world.clock))
    first = source.changes_after(Cursor())
    original, once = certificates.changed_since, []

    def meanwhile(tx: Connection, revision: int, limit: int) -> Any:
        page = original(tx, revision, limit)
        if not once:
            once.append(True)
            world.issue("b.test")
        return page

    monkeypatch.setattr(certificates, "changed_since", meanwhile)
    second = source.changes_after(first.cursor)
    third = source.changes_after(second.cursor)

    assert [one.dns_names for one in first.changed] == [("a.test",)]
    assert ("b.test",) in [one.dns_names for one in (*second.changed, *third.changed)]


def test_a_version_that_cannot_be_read_is_refused_with_what_to_do(db: Database) -> None:
    """As a version that a node refuses: it goes on with the one before, and says so."""
    world = World(db)
    world.execute("INSERT INTO listeners (id, port, protocol, enabled) VALUES (:id, 80, 'http', true)", id=new_id())
    publish(db, world.clock, Defaults(timedelta(seconds=10), timedelta(seconds=2), ()))
    world.execute("""UPDATE config_versions SET snapshot_json = '{"schema_version": 99}'""")

    with pytest.raises(VersionRefused, match=r"version 1 cannot be read: .*schema_version.*config publish"):
        DatabaseSource(App(load({}), db, world.sealer, world.clock)).published()
