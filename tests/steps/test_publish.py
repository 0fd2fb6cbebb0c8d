"""Rows become versions: once per change, seen at one moment, and never behind a person's back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Connection, event

from certworker.core.gateway import Defaults
from certworker.core.snapshot import read_snapshot
from certworker.errors import InputError, StoreRefused
from certworker.steps.publish import (
    FAULTS,
    LEFT_OUT,
    Published,
    draft,
    figures,
    find_hold,
    pass_over_changes,
    publish,
    publish_changes,
    publish_draft,
    roll_back,
)
from certworker.steps.reap import KEPT_VERSIONS, reap
from certworker.store import audit, changes, settings_kv, versions
from certworker.store.database import Database, open_database
from certworker.store.versions import VersionRow
from tests.store.given import INSERTS, LISTENER, ROUTE, TARGET, Program, url_of

from .world import Clock

DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))
GATEWAY = ("listeners", "upstream_pools", "routes", "upstream_targets")
OTHER = "12121212-1212-4212-8212-121212121212"


class Gateway:
    """A gateway's rows as another program writes them, and short words for what is done with them."""

    def __init__(self, db: Database, program: Program) -> None:
        self.db, self.sql, self.clock = db, program, Clock()

    def publish(self, **more: Any) -> Published:
        return publish(self.db, self.clock, DEFAULTS, created_by="alice", **more)

    def draft(self) -> Published:
        return draft(self.db, self.clock, DEFAULTS, created_by="alice")

    def publish_draft(self, number: int) -> Published:
        return publish_draft(self.db, self.clock, DEFAULTS, number, created_by="bob")

    def roll_back(self, number: int | None = None, defaults: Defaults = DEFAULTS) -> Published:
        return roll_back(self.db, self.clock, defaults, number, created_by="bob")

    def look(self, **more: Any) -> Published | None:
        """Do what the service does every two seconds."""
        return publish_changes(self.db, self.clock, DEFAULTS, **more)

    def weigh(self, weight: int) -> None:
        """Change one row: what is published has this weight, or another."""
        self.sql(f"UPDATE upstream_targets SET weight = {weight} WHERE id = '{TARGET}'")

    @property
    def versions(self) -> list[VersionRow]:
        return self.db.read(versions.list_all)

    @property
    def statuses(self) -> dict[int | None, str]:
        return {one.number: one.status for one in self.versions}

    @property
    def weight(self) -> int:
        """The weight that is published."""
        found = self.db.read(versions.find_published)
        assert found is not None
        return read_snapshot(found.snapshot_json).pools[0].targets[0].weight

    @property
    def held(self) -> int | None:
        hold = self.db.read(find_hold)
        return None if hold is None else hold.number

    @property
    def audited(self) -> list[dict[str, Any]]:
        return [row for row in self.db.read(audit.newest) if row["action"].startswith("config.")]

    def fact(self, key: str) -> str | None:
        return self.db.read(lambda tx: settings_kv.find(tx, key))


@pytest.fixture
def gateway(db: Database) -> Iterator[Gateway]:
    """A listener, a route, a pool and a target, nothing published."""
    program = Program(db)
    for table in GATEWAY:
        program(INSERTS[table])
    yield Gateway(db, program)
    program.close()


def test_the_same_content_is_published_once(gateway: Gateway) -> None:
    """Whoever asks, however often; a row that is written as it was is no change."""
    first = gateway.publish()
    gateway.weigh(1)

    assert first.changed
    assert gateway.look(always=True) == gateway.publish()
    assert gateway.look() is None
    assert not gateway.publish().changed
    assert gateway.statuses == {1: "published"}


def test_a_version_says_who_made_it_and_what_changed(gateway: Gateway) -> None:
    """The audit row is of the same transaction, and names the difference by table, id and field."""
    gateway.publish()
    gateway.weigh(7)
    gateway.publish()

    newest, first = gateway.audited
    assert [one.created_by for one in gateway.versions] == ["alice", "alice"]
    assert gateway.statuses == {2: "published", 1: "archived"}
    assert (newest["actor"], newest["action"], newest["diff"]["before"], newest["diff"]["after"]) == (
        "alice", "config.published", 1, 2,
    )  # fmt: skip
    assert newest["diff"]["changes"] == [
        {"table": "upstream_targets", "id": TARGET, "change": "changed", "fields": {"weight": {"from": 1, "to": 7}}}
    ]
    assert {change["table"] for change in first["diff"]["changes"]} == {*GATEWAY, "responders"}
    assert {change["change"] for change in first["diff"]["changes"]} == {"added"}


def test_a_long_difference_is_cut_in_the_audit_log(gateway: Gateway) -> None:
    """It says how many more there are."""
    for number in range(300):
        gateway.sql(INSERTS["upstream_targets"].replace(TARGET, f"00000000-0000-4000-8000-{number:012d}"))
    gateway.publish()

    (row,) = gateway.audited
    assert (len(row["diff"]["changes"]), row["diff"]["more"]) == (200, 105)


def test_at_most_one_version_is_published(gateway: Gateway) -> None:
    """The database refuses a second one, whoever writes it."""
    gateway.publish()
    gateway.draft()
    with pytest.raises(StoreRefused):
        gateway.db.write(
            lambda tx: tx.exec_driver_sql(
                "INSERT INTO config_versions (id, snapshot_json, status, created_by) "
                f"VALUES ('{OTHER}', '{{}}', 'published', 'mallory')"
            )
        )

    assert gateway.statuses == {1: "published"}


@pytest.mark.parametrize("leave_out", [False, True])
def test_a_bad_row(gateway: Gateway, *, leave_out: bool) -> None:
    """It refuses the whole, or is left out with all that hangs on it: either way said in status and audit log."""
    gateway.sql(f"UPDATE upstream_targets SET address = '169.254.169.254:80' WHERE id = '{TARGET}'")
    kept, forgotten = (LEFT_OUT, FAULTS) if leave_out else (FAULTS, LEFT_OUT)

    done = gateway.look(leave_out=leave_out)

    assert done is not None
    assert [(one.table, one.row_id, one.field) for one in done.faults] == [("upstream_targets", TARGET, "address")]
    assert done.refused is not leave_out
    assert [one.status for one in gateway.versions] == (["published"] if leave_out else [])
    assert "169.254.169.254" in (gateway.fact(kept) or "")
    assert gateway.fact(forgotten) is None
    number, count = int(leave_out), {kept: 1, forgotten: 0}
    assert gateway.db.read(figures) == {
        "version": number, "refused": count[FAULTS], "left_out": count[LEFT_OUT], "held": 0,
    }  # fmt: skip
    said = [row["action"] for row in gateway.audited if "faults" in row["diff"]]
    assert said == ["config.left_out" if leave_out else "config.refused"]
    gateway.look(leave_out=leave_out, always=True)
    assert len([row for row in gateway.audited if "faults" in row["diff"]]) == 1

    gateway.sql(f"UPDATE upstream_targets SET address = '10.0.0.1:80' WHERE id = '{TARGET}'")
    gateway.look(leave_out=leave_out)
    assert gateway.fact(kept) is None


@pytest.mark.parametrize(
    "hostile", ["[" * 900 + "]" * 900, '{"x": ' + "9" * 5000 + "}", '{"host": "a\\nb"}', '"text"', "[]", "7"]
)
def test_hostile_json_is_one_row_s_fault(gateway: Gateway, hostile: str) -> None:
    """What Python cannot even read is a fault of that row, and the others are served."""
    gateway.sql(f"UPDATE routes SET match_expr = '{hostile}'")

    done = gateway.publish(leave_out=True)

    assert [(fault.table, fault.row_id) for fault in done.faults] == [("routes", ROUTE)]
    assert done.changed


def test_a_name_that_does_not_resolve_blocks_nothing(gateway: Gateway) -> None:
    """Names are resolved by the proxies."""
    gateway.sql(f"UPDATE upstream_targets SET address = 'gone.invalid:80' WHERE id = '{TARGET}'")

    assert gateway.publish().changed


def test_without_rows_there_is_no_version(db: Database) -> None:
    """The first one is made when there is something to serve."""
    assert publish(db, Clock(), DEFAULTS) == draft(db, Clock(), DEFAULTS) == Published(None)


# -- drafts -----------------------------------------------------------------------------------------


def test_a_draft_is_published_by_its_number(gateway: Gateway) -> None:
    """As it is, whatever the rows say by then; it is made once, and published once."""
    made = gateway.draft().version
    assert made is not None
    assert not gateway.draft().changed
    assert gateway.statuses == {1: "draft"}

    assert gateway.publish_draft(1).changed
    assert gateway.statuses == {1: "published"}
    assert not gateway.publish_draft(1).changed
    assert [row["action"] for row in gateway.audited] == ["config.published", "config.drafted"]


def test_rows_that_are_published_need_no_draft(gateway: Gateway) -> None:
    """The answer is the version that has them."""
    gateway.publish()
    done = gateway.draft()

    assert (done.changed, done.version and done.version.status) == (False, "published")


def test_a_draft_that_was_overtaken_is_refused(gateway: Gateway) -> None:
    """It knows nothing of what was published since, and would undo it."""
    gateway.publish()
    gateway.weigh(2)
    gateway.draft()
    gateway.weigh(3)
    gateway.publish()

    with pytest.raises(InputError, match="version 2: version 3 was published after this draft was made"):
        gateway.publish_draft(2)
    assert gateway.weight == 3


def test_a_draft_that_the_rows_have_left_behind_is_held(gateway: Gateway) -> None:
    """A person chose it: the rows do not take its place by themselves."""
    gateway.publish()
    gateway.weigh(2)
    gateway.draft()
    gateway.weigh(3)

    assert gateway.publish_draft(2).hold is not None
    assert gateway.look(always=True) is not None
    assert (gateway.weight, gateway.held) == (2, 2)


@pytest.mark.parametrize("act", [Gateway.publish_draft, Gateway.roll_back])
def test_a_version_that_is_not_there(gateway: Gateway, act: Callable[[Gateway, int], Published]) -> None:
    """The number is named, and where to look."""
    with pytest.raises(InputError, match="version 9: there is none; see `certworker config versions`"):
        act(gateway, 9)


# -- roll-back --------------------------------------------------------------------------------------


def test_a_roll_back_is_a_new_version(gateway: Gateway) -> None:
    """With the content of the old one; who did it, and what it changed, is in the audit log."""
    gateway.publish()
    gateway.weigh(9)
    gateway.publish()

    done = gateway.roll_back()

    assert done.version is not None
    assert (done.version.number, done.version.restores, done.version.created_by) == (3, 1, "bob")
    assert gateway.statuses == {3: "published", 2: "archived", 1: "archived"}
    assert gateway.weight == 1
    row = gateway.audited[0]
    assert (row["actor"], row["action"], row["diff"]["restores"]) == ("bob", "config.rolled_back", 1)
    assert row["diff"]["changes"][0]["fields"] == {"weight": {"from": 9, "to": 1}}


def test_the_rows_do_not_undo_a_roll_back(gateway: Gateway) -> None:
    """Not when some row changes, not when the service starts: a person publishes them."""
    gateway.publish()
    gateway.weigh(9)
    gateway.publish()
    done = gateway.roll_back()
    assert done.hold is not None
    assert "version 3 was published by bob instead of the rows" in str(done.hold)

    gateway.sql("UPDATE listeners SET port = 444")
    held = gateway.look()
    assert held is not None
    assert held.hold == done.hold
    gateway.look(always=True)
    assert (gateway.weight, gateway.held) == (1, 3)

    assert gateway.publish().changed
    assert (gateway.weight, gateway.held) == (9, None)
    gateway.weigh(8)
    gateway.look()
    assert gateway.weight == 8


def test_rows_that_are_put_right_end_the_hold(gateway: Gateway) -> None:
    """They say again what is published: from then on changes are published by themselves."""
    gateway.publish()
    gateway.weigh(9)
    gateway.publish()
    gateway.roll_back()

    gateway.weigh(1)
    gateway.look()
    assert (gateway.held, len(gateway.versions)) == (None, 3)
    gateway.weigh(5)
    gateway.look()
    assert gateway.weight == 5


def test_rows_that_cannot_be_published_leave_the_hold(gateway: Gateway) -> None:
    """Nothing was published instead."""
    gateway.publish()
    gateway.weigh(9)
    gateway.publish()
    gateway.roll_back()
    gateway.sql(f"UPDATE upstream_targets SET address = 'nonsense' WHERE id = '{TARGET}'")

    assert gateway.publish().refused
    assert gateway.held == 3


def test_going_back_twice_goes_further_back(gateway: Gateway) -> None:
    """Not to what was just left: that is what was wrong."""
    for weight in (1, 2, 3):
        gateway.weigh(weight)
        gateway.publish()

    gateway.roll_back()
    assert gateway.weight == 2
    gateway.roll_back()
    assert gateway.weight == 1
    with pytest.raises(InputError, match="nothing to roll back to: no version before 1 is kept"):
        gateway.roll_back()
    gateway.roll_back(4)  # which brought back 2
    assert [(one.number, one.restores) for one in gateway.versions][:3] == [(6, 2), (5, 1), (4, 2)]


def test_going_back_to_what_is_published_does_nothing(gateway: Gateway) -> None:
    """By its own number, or by that of a version with the same content."""
    gateway.publish()
    gateway.weigh(2)
    gateway.publish()
    gateway.roll_back(1)

    assert [gateway.roll_back(number).changed for number in (3, 1)] == [False, False]
    assert len(gateway.versions) == 3


def test_a_draft_is_nothing_to_go_back_to(gateway: Gateway) -> None:
    """It never served; nor is there anything before the first version."""
    with pytest.raises(InputError, match="certworker has published no version yet"):
        gateway.roll_back()
    gateway.draft()
    with pytest.raises(InputError, match="version 1: is a draft"):
        gateway.roll_back(1)
    gateway.publish_draft(1)
    gateway.weigh(2)
    gateway.publish()
    with pytest.raises(InputError, match="version 1: is archived; `certworker config rollback 1`"):
        gateway.publish_draft(1)


def test_a_roll_back_keeps_the_responders(gateway: Gateway) -> None:
    """They are settings: an old version names machines that may be gone, and no challenge would be answered."""
    gateway.publish()
    gateway.weigh(2)
    gateway.publish()
    moved = Defaults(DEFAULTS.health_interval, DEFAULTS.health_timeout, ("10.0.0.2:8402",))

    gateway.roll_back(1, moved)

    found = gateway.db.read(versions.find_published)
    assert found is not None
    assert [one.host for one in read_snapshot(found.snapshot_json).responders] == ["10.0.0.2"]
    assert gateway.weight == 1


def test_what_this_release_cannot_read_is_not_published(gateway: Gateway) -> None:
    """Another program's version, or one of a release to come; as the published one it hinders nothing."""
    gateway.publish()
    gateway.weigh(2)
    gateway.publish()
    gateway.sql("""UPDATE config_versions SET snapshot_json = '{"schema_version": 99}'""")

    with pytest.raises(InputError, match="version 1: this release cannot serve it: snapshot: schema_version"):
        gateway.roll_back(1)
    gateway.weigh(3)
    assert gateway.publish().changed


# -- two at a time ----------------------------------------------------------------------------------


def test_rows_are_read_at_one_moment(postgresql_db: Database) -> None:
    """A document that is applied while they are read is seen whole or not at all: no fault comes of it."""
    program, writer = Program(postgresql_db), Program(postgresql_db)
    for table in GATEWAY:
        program(INSERTS[table])
    once = iter([True])

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "FROM listeners" in statement and next(once, False):
            writer(INSERTS["listeners"].replace(LISTENER, OTHER).replace("443", "444"))
            writer(INSERTS["routes"].replace(ROUTE, OTHER).replace(LISTENER, OTHER))

    event.listen(postgresql_db.engine, "after_cursor_execute", interrupt)
    first = publish(postgresql_db, Clock(), DEFAULTS)
    event.remove(postgresql_db.engine, "after_cursor_execute", interrupt)

    assert next(once, None) is None
    assert first.faults == ()
    assert postgresql_db.read(lambda tx: changes.pending(tx, changes.GATEWAY))
    second = publish_changes(postgresql_db, Clock(), DEFAULTS)
    assert second is not None
    assert second.changed
    for one in (program, writer):
        one.close()


def test_many_publishers_make_one_version(gateway: Gateway) -> None:
    """Every worker sees the note; whoever is second sees what the first one published."""
    workers = [gateway.db if gateway.db.embedded else open_database(url_of(gateway.db)) for _ in range(4)]
    start = Barrier(len(workers))

    def look(db: Database) -> Published | None:
        start.wait()
        return publish_changes(db, gateway.clock, DEFAULTS, always=True)

    with ThreadPoolExecutor(len(workers)) as threads:
        for weight in range(2, 6):
            gateway.weigh(weight)
            done = [one for one in threads.map(look, workers) if one is not None]
            assert [one.changed for one in done].count(True) == 1
            assert {one.version and one.version.number for one in done} == {weight - 1}
    assert len(gateway.versions) == 4
    for db in workers:
        db.close()


# -- what is kept -----------------------------------------------------------------------------------


def test_old_versions_go_but_never_one_that_is_served(gateway: Gateway) -> None:
    """The newest hundred stay, and the published one, what a node last proved, and what nodes are to serve."""
    first = gateway.publish().version
    assert first is not None
    gateway.db.write(
        lambda tx: settings_kv.put(
            tx, settings_kv.RELEASED_VERSION, versions.add_draft(tx, {}, "x", "alice", gateway.clock()).id
        )
    )

    def add_many(tx: Connection) -> None:
        for _ in range(KEPT_VERSIONS + 5):
            made = versions.add_draft(tx, {}, "x", "alice", gateway.clock())
            versions.publish(tx, made)

    gateway.db.write(add_many)
    gateway.sql(
        "INSERT INTO node_status (id, node_id, version_id, heartbeat_at) "
        f"VALUES ('{OTHER}', 'edge-1', '{first.id}', '2026-11-22T12:00:00.000000Z')"
    )

    reaped = reap(gateway.db, gateway.clock).versions
    kept = [one.number for one in gateway.versions]
    assert reaped == 4
    assert kept == [*range(KEPT_VERSIONS + 7, 6, -1), 2, 1]
    assert reap(gateway.db, gateway.clock).versions == 0


def test_notes_of_changes_do_not_pile_up(gateway: Gateway) -> None:
    """With AUTO_PUBLISH=off nobody else would take them."""
    assert gateway.db.read(lambda tx: changes.pending(tx, changes.GATEWAY))
    pass_over_changes(gateway.db)

    assert not gateway.db.read(lambda tx: changes.pending(tx, changes.GATEWAY))
    assert gateway.versions == []
    assert gateway.publish().changed
