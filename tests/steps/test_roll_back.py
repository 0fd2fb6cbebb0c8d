"""What nodes cannot serve gives way to what was before it: certificates, and versions."""

from datetime import timedelta
from uuid import uuid4

import pytest

from certworker.core.gateway import Defaults
from certworker.core.rollout import Cursor, Heartbeat
from certworker.steps.deliver import Scopes
from certworker.steps.publish import find_hold, publish, publish_changes
from certworker.steps.roll_back import SETTLES, TakenBack, take_back_certificates, take_back_version
from certworker.steps.scan import scan
from certworker.steps.verify import OVERDUE, count_overdue, verify
from certworker.store import certificates, nodes, versions
from certworker.store.certificates import StoredCertificate
from certworker.store.versions import Version

from .world import NODE_SILENT, World

WHY = "its key or signature is too weak"


def revision(world: World) -> int:
    return int(str(world.rows("SELECT value FROM counters WHERE name = 'revision'")[0][0]))


def beat(world: World, node: str = "n1", *, refuses: bool = True, at: int | None = None) -> None:
    """Let a node say what it thinks of the only certificate."""
    why = {current(world).id: WHY} if refuses else {}
    cursor = Cursor(1, revision(world) if at is None else at)
    heartbeat = Heartbeat(node, None, 1, cursor, "haproxy 2.6.12", unserved=why, refused=why)
    world.db.write(lambda tx: nodes.record(tx, heartbeat))


def take_back(world: World) -> list[TakenBack]:
    return take_back_certificates(world.db, world.clock, world.sealer, lambda: 0.5, NODE_SILENT)


def current(world: World) -> StoredCertificate:
    found = world.db.read(lambda tx: certificates.find_of_lineage(tx, world.lineage("a.test").id))
    assert found is not None
    return found


@pytest.fixture
def renewed(world: World) -> StoredCertificate:
    """What served before a renewal whose certificate was just activated."""
    world.issue("a.test")
    before = current(world)
    world.execute("UPDATE lineages SET served_at = updated_at")
    lineage = world.lineage("a.test")
    assert lineage.renew_at is not None
    world.clock.now = lineage.renew_at
    scan(world.db, world.clock)
    world.work()
    assert current(world).serial != before.serial
    return before


def test_what_every_node_refuses_is_taken_back(world: World, renewed: StoredCertificate) -> None:
    """The pair before serves under the same id, with a new revision; why, and when a new one is made, is shown."""
    refused = current(world)
    world.clock.move(SETTLES)
    beat(world)
    beat(world, "n2")

    (taken,) = take_back(world)

    now = current(world)
    assert (now.serial, now.fingerprint, now.status) == (renewed.serial, renewed.fingerprint, "active")
    assert (now.id, now.revision) == (refused.id, (refused.revision or 0) + 1)
    place = {"table": "certificates", "column": "key_pem", "row_id": now.id}
    assert world.sealer.open(now.key_pem, **place) == world.sealer.open(renewed.key_pem, **place)
    lineage = world.lineage("a.test")
    assert (lineage.status, lineage.error["type"]) == ("active", "certworker:not-servable")
    assert WHY in lineage.error["detail"]
    assert lineage.next_check_at == world.clock() + timedelta(days=1)
    assert taken.serial == renewed.serial
    ((audited,),) = world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.taken_back'")
    assert audited == 1


def test_it_is_taken_back_once(world: World, renewed: StoredCertificate) -> None:
    """A node that has not looked at the old one yet still speaks of the new one."""
    world.issue("b.test")
    world.clock.move(SETTLES)
    beat(world)
    take_back(world)
    world.clock.move(SETTLES)

    assert take_back(world) == []
    assert current(world).serial == renewed.serial


def test_the_next_one_is_made_in_its_time(world: World, renewed: StoredCertificate) -> None:
    world.clock.move(SETTLES)
    beat(world)
    take_back(world)
    scan(world.db, world.clock)
    assert world.last_issuance("a.test").state == "done"

    world.clock.move(timedelta(days=1))
    scan(world.db, world.clock)
    world.work()

    assert current(world).serial not in (renewed.serial, None)
    assert world.lineage("a.test").error is None


@pytest.mark.usefixtures("renewed")
def test_what_one_node_serves_stays(world: World) -> None:
    """The other one has a trouble of its own."""
    new = current(world).serial
    world.clock.move(SETTLES)
    beat(world)
    beat(world, "n2", refuses=False)

    assert take_back(world) == []
    assert current(world).serial == new


@pytest.mark.usefixtures("renewed")
def test_a_node_that_is_gone_has_no_say(world: World) -> None:
    world.clock.move(SETTLES)
    beat(world)
    beat(world, "gone", refuses=False)
    world.execute("UPDATE node_status SET heartbeat_at = '2000-01-01T00:00:00.000000Z' WHERE node_id = 'gone'")

    assert len(take_back(world)) == 1


@pytest.mark.usefixtures("renewed")
@pytest.mark.parametrize("case", ["too soon", "not looked at", "no node", "served"])
def test_nothing_is_taken_back_before_it_is_certain(world: World, case: str) -> None:
    new = current(world).serial
    world.clock.move(timedelta() if case == "too soon" else SETTLES)
    if case != "no node":
        beat(world, at=revision(world) - 1 if case == "not looked at" else None)
    if case == "served":
        world.execute("UPDATE lineages SET served_at = updated_at")

    assert take_back(world) == []
    assert current(world).serial == new


def test_without_one_before_it_there_is_nothing_to_go_back_to(world: World) -> None:
    """The first one; and one whose predecessor has ended."""
    world.issue("a.test")
    world.clock.move(SETTLES)
    beat(world)

    assert take_back(world) == []


def test_what_has_ended_does_not_serve_again(world: World, renewed: StoredCertificate) -> None:
    new = current(world).serial
    world.clock.now = renewed.expires_at
    beat(world)

    assert take_back(world) == []
    assert current(world).serial == new


@pytest.mark.usefixtures("renewed")
def test_what_is_not_served_for_long_is_an_alert(world: World) -> None:
    """Where there is a node; it ends when all serve it."""
    world.clock.move(OVERDUE)
    assert count_overdue(world.db, world.clock) == 0
    beat(world, at=0, refuses=False)
    assert count_overdue(world.db, world.clock) == 1
    world.clock.move(-timedelta(seconds=1))
    assert count_overdue(world.db, world.clock) == 0
    world.clock.move(timedelta(hours=1))
    beat(world, refuses=False)
    assert verify(world.db, world.clock, Scopes(), NODE_SILENT) == 1

    assert count_overdue(world.db, world.clock) == 0


# -- versions -------------------------------------------------------------------------------------------

DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))


def listen(world: World, port: int) -> Version:
    """Publish a gateway with one listener."""
    world.execute("DELETE FROM listeners")
    world.execute(
        "INSERT INTO listeners (id, port, protocol, created_at, updated_at) VALUES (:id, :port, 'http', :at, :at)",
        id=str(uuid4()), port=port, at="2026-11-22T12:00:00.000000Z",
    )  # fmt: skip
    publish(world.db, world.clock, DEFAULTS)
    return published(world)


def published(world: World) -> Version:
    found = world.db.read(versions.find_published)
    assert found is not None
    return found


def refuse(world: World, version: Version, node: str = "n1", serves: int | None = 1) -> None:
    heartbeat = Heartbeat(
        node, None, serves, Cursor(), "haproxy 2.6.12", error="port 81: another process listens on it",
        refused_version_id=version.id,
    )  # fmt: skip
    world.db.write(lambda tx: nodes.record(tx, heartbeat))


def ports(version: Version) -> list[int]:
    return [listener["port"] for listener in version.snapshot_json["listeners"]]


def test_a_version_that_a_node_refuses_is_taken_back(world: World) -> None:
    """The one before is published anew; why, and that the rows wait for a person, is on record."""
    first, second = listen(world, 80), listen(world, 81)
    refuse(world, second)

    done = take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT)

    now = published(world)
    assert done is not None
    assert (ports(now), now.restores, now.created_by) == ([80], first.number, "certworker")
    hold = world.db.read(find_hold)
    assert hold is not None
    assert "n1 refused it: port 81: another process listens on it" in str(hold)
    ((diff,),) = world.rows("SELECT diff FROM audit_logs WHERE action = 'config.rolled_back'")
    assert "another process listens" in str(diff)
    publish_changes(world.db, world.clock, DEFAULTS, always=True)
    assert published(world) == now


def test_what_others_serve_stays(world: World) -> None:
    """A node that is new, or alone with its trouble, has no veto; a canary speaks for all."""
    listen(world, 80)
    version = listen(world, 81)
    refuse(world, version, "new", serves=None)
    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None
    refuse(world, version)
    serving = Heartbeat("n2", version.id, version.number, Cursor(), "haproxy 2.6.12")
    world.db.write(lambda tx: nodes.record(tx, serving))
    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None
    assert published(world) == version

    world.execute(
        "INSERT INTO nodes (id, name, token_hash, canary, enrolled_at) VALUES (:id, 'n1', 'x', true, :at)",
        id=str(uuid4()), at="2026-11-22T12:00:00.000000Z",
    )  # fmt: skip

    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is not None


def test_the_way_back_never_leads_to_what_was_refused(world: World) -> None:
    """Two attempts in a row fail: what served before both is published, not the first of them."""
    listen(world, 80)
    for port in (81, 82):
        refuse(world, listen(world, port))
        take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT)
        assert ports(published(world)) == [80]


def test_what_was_brought_back_is_not_taken_back(world: World) -> None:
    """A node that refuses both would lead all others to and fro."""
    listen(world, 80)
    refuse(world, listen(world, 81))
    take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT)
    refuse(world, published(world))

    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None


def test_only_the_published_version_is_taken_back(world: World) -> None:
    """A node that is behind speaks of an older one; one that is gone has no say; the first has none before it."""
    first = listen(world, 80)
    refuse(world, first)
    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None
    second = listen(world, 81)
    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None
    refuse(world, second, "gone")
    world.execute("UPDATE node_status SET heartbeat_at = '2000-01-01T00:00:00.000000Z' WHERE node_id = 'gone'")

    assert take_back_version(world.db, world.clock, DEFAULTS, NODE_SILENT) is None
    assert published(world) == second
