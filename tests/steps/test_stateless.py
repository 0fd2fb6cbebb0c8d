"""Proxies that answer challenges by themselves: which hosts, with what, and not before they all do."""

from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest

from certworker.core.gateway import Defaults
from certworker.core.rollout import Cursor, Heartbeat
from certworker.steps.issue import advance
from certworker.steps.publish import publish
from certworker.steps.reap import TOMBSTONES, reap
from certworker.steps.reconcile import reconcile
from certworker.store import nodes

from .world import World

TIME = "2026-11-22T12:00:00.000000Z"
DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))


@pytest.fixture
def stateless(world: World) -> World:
    """A gateway whose port 80 answers by itself."""
    listen(world, "stateless")
    return world


def listen(world: World, challenge: str | None, enabled: bool = True) -> None:
    world.execute("DELETE FROM listeners")
    world.execute(
        "INSERT INTO listeners (id, port, protocol, enabled, challenge, created_at, updated_at) "
        "VALUES (:id, 80, 'http', :enabled, :challenge, :at, :at)",
        id=str(uuid4()), enabled=enabled, challenge=challenge, at=TIME,
    )  # fmt: skip


def prove(world: World, revision: int | None = None, node: str = "n1", **unanswered: str) -> None:
    """Let a node say that it answers for everything up to `revision`, by default all there is."""
    newest = int(str(world.rows("SELECT value FROM counters WHERE name = 'revision'")[0][0]))
    why = {name.replace("_", "."): said for name, said in unanswered.items()}
    cursor = Cursor(1, newest if revision is None else revision)
    heartbeat = Heartbeat(node, None, 1, cursor, "haproxy 2.6.12", unanswered=why)
    world.db.write(lambda tx: nodes.record(tx, heartbeat))


def rows(world: World) -> dict[str, str | None]:
    return {str(host): thumb for host, thumb in world.rows("SELECT host, thumbprint FROM thumbprints ORDER BY host")}


def of_account(world: World) -> str:
    thumbprint = world.db.read(world.bench().accounts.thumbprint)
    assert thumbprint is not None
    return thumbprint


def looks(world: World) -> int:
    """Return how often the CA was told to look."""
    return world.ca.count("POST", "/challenge/*")


def held(world: World) -> str:
    """Return why the only open issuance waits."""
    ((error,),) = world.rows("SELECT error FROM issuances WHERE closed_at IS NULL")
    return str(error)


def order(world: World, *names: str) -> None:
    """Want certificates, and work until the proxies are waited for."""
    world.add_policy(*names)
    world.take_over()
    world.work(patience=40)
    world.take_over()  # by now there is an account


def go_on(world: World) -> None:
    world.clock.move(timedelta(hours=1))
    world.work()


# -- the rows -------------------------------------------------------------------------------------------


def test_every_wanted_host_has_the_accounts_thumbprint(stateless: World) -> None:
    """Also of shared certificates; each row with a revision of its own."""
    stateless.add_policy("a.test", "b.test", shared=True)
    order(stateless, "c.test")

    assert rows(stateless) == dict.fromkeys(("a.test", "b.test", "c.test"), of_account(stateless))
    ((distinct,),) = stateless.rows("SELECT count(DISTINCT revision) FROM thumbprints")
    assert distinct == 3
    before = stateless.rows("SELECT * FROM thumbprints ORDER BY host")
    stateless.take_over()
    assert stateless.rows("SELECT * FROM thumbprints ORDER BY host") == before


def test_without_a_stateless_listener_there_are_none(world: World) -> None:
    listen(world, None)
    order(world, "a.test")
    listen(world, "stateless", enabled=False)
    world.take_over()

    assert rows(world) == {}
    assert looks(world) == 1


def test_a_host_that_nobody_wants_any_more_is_answered_for_no_more(stateless: World) -> None:
    """Unless another policy wants it; the row tells the nodes for a while, and goes."""
    stateless.add_policy("both.test")
    order(stateless, "both.test", "one.test")
    stateless.execute("DELETE FROM tls_policies WHERE CAST(domains AS TEXT) LIKE '%one.test%'")
    stateless.take_over()

    assert rows(stateless) == {"both.test": of_account(stateless), "one.test": None}
    stateless.clock.move(TOMBSTONES + timedelta(days=1))
    reap(stateless.db, stateless.clock)
    assert list(rows(stateless)) == ["both.test"]


def test_another_key_is_another_thumbprint_everywhere(stateless: World) -> None:
    order(stateless, "a.test", "b.test")
    before = of_account(stateless)
    stateless.execute("DELETE FROM acme_accounts")
    stateless.bench().accounts.add()
    stateless.take_over()

    assert of_account(stateless) != before
    assert set(rows(stateless).values()) == {of_account(stateless)}


def test_when_the_last_stateless_listener_goes_so_do_the_rows(stateless: World) -> None:
    order(stateless, "a.test")
    listen(stateless, "forward")
    stateless.take_over()

    assert rows(stateless) == {"a.test": None}
    go_on(stateless)
    assert stateless.lineage("a.test").status == "active"


def test_what_is_published_counts_as_long_as_it_is(stateless: World) -> None:
    """Rows that say `forward` reach no proxy while publishing is held: the hosts are answered for as before."""
    publish(stateless.db, stateless.clock, DEFAULTS)
    order(stateless, "a.test")
    listen(stateless, "forward")
    stateless.take_over()
    go_on(stateless)
    assert rows(stateless) == {"a.test": of_account(stateless)}
    assert looks(stateless) == 0

    publish(stateless.db, stateless.clock, DEFAULTS)
    stateless.take_over()
    prove(stateless)
    go_on(stateless)

    assert rows(stateless) == {"a.test": None}
    assert stateless.lineage("a.test").status == "active"


def test_a_change_in_the_middle_of_a_sweep_starts_it_anew(stateless: World) -> None:
    """No page of policies keeps what was true before."""
    order(stateless, *(f"n{number}.test" for number in range(3)))
    stateless.execute("INSERT INTO settings_kv (key, value) VALUES ('sweep_after', 'ffffffff')")
    stateless.execute("DELETE FROM acme_accounts")
    stateless.bench().accounts.add()
    reconcile(
        stateless.db, stateless.clock, stateless.wanted, stateless.sealer,
        thumbprint=stateless.bench().accounts.thumbprint,
    )  # fmt: skip

    assert set(rows(stateless).values()) == {of_account(stateless)}


# -- the barrier ----------------------------------------------------------------------------------------


def test_the_ca_is_not_told_to_look_before_every_live_node_answers(stateless: World) -> None:
    """One that is behind is waited for, and named; the order stays as it is, no validation is spent."""
    order(stateless, "a.test")
    prove(stateless)
    prove(stateless, node="n2", revision=0)
    go_on(stateless)
    assert looks(stateless) == 0
    assert "n2: has not proved yet that it answers for a.test" in held(stateless)

    prove(stateless, node="n2")
    go_on(stateless)

    assert stateless.lineage("a.test").status == "active"
    assert stateless.ca.count("POST", "/new-order") == 1


def test_a_node_that_does_not_answer_for_a_host_holds_that_host_alone(stateless: World) -> None:
    order(stateless, "a.test", "b.test")
    prove(stateless, a_test="404 no such challenge")
    go_on(stateless)

    assert stateless.lineage("b.test").status == "active"
    assert stateless.lineage("a.test").status == "pending"
    assert "n1: a.test: 404 no such challenge" in held(stateless)


def test_a_node_that_was_not_heard_of_for_long_is_not_waited_for(stateless: World) -> None:
    order(stateless, "a.test")
    prove(stateless)
    prove(stateless, node="gone", revision=0)
    stateless.execute("UPDATE node_status SET heartbeat_at = '2000-01-01T00:00:00.000000Z' WHERE node_id = 'gone'")
    go_on(stateless)

    assert stateless.lineage("a.test").status == "active"


def test_with_no_node_at_all_nobody_looks(stateless: World) -> None:
    order(stateless, "a.test")
    go_on(stateless)

    assert looks(stateless) == 0
    assert "no node was heard of" in held(stateless)


def test_an_account_whose_thumbprint_is_not_on_its_way_yet_waits(stateless: World) -> None:
    """Every proxy has taken over what there is, which is another key's."""
    order(stateless, "a.test")
    stateless.execute("UPDATE thumbprints SET thumbprint = 'of-another-key'")
    prove(stateless)
    go_on(stateless)

    assert looks(stateless) == 0
    assert "no thumbprint of the account" in held(stateless)


def test_proxies_are_waited_for_in_hand_at_first(stateless: World) -> None:
    """A second at a time: a heartbeat is about to come, and giving the issuance back costs more."""
    stateless.add_policy("a.test")
    stateless.take_over()
    bench = stateless.bench()
    (session,) = stateless.claim()

    while session.wait_until is None:
        advance(bench, session)

    assert session.issuance.lease_owner is not None
    assert session.wait_until == stateless.clock() + timedelta(seconds=1)
    stateless.take_over()
    prove(stateless)
    while session.issuance.is_open:
        advance(bench, session)
        stateless.clock.move(timedelta(seconds=1))
    assert session.issuance.state == "done"


def test_a_node_that_serves_nothing_yet_is_waited_for(world: World) -> None:
    """Also where listeners only pass challenges on: nobody listens on its port 80."""
    beat = Heartbeat("n1", None, None, Cursor(), "haproxy 2.6.12", error="port 80 is taken")
    world.db.write(lambda tx: nodes.record(tx, beat))
    order(world, "a.test")
    go_on(world)
    assert looks(world) == 0
    assert "n1: serves no version yet: port 80 is taken" in held(world)

    world.db.write(lambda tx: nodes.record(tx, replace(beat, version_number=1)))
    go_on(world)

    assert world.lineage("a.test").status == "active"


def test_enrolled_nodes_are_waited_for(world: World) -> None:
    """None of them was heard of, so nobody listens; once they are removed, the proxies are somebody else's."""
    world.execute(
        "INSERT INTO nodes (id, name, token_hash, canary, enrolled_at) VALUES (:id, 'gw1', 'x', false, :at)",
        id=str(uuid4()), at=TIME,
    )  # fmt: skip
    order(world, "a.test")
    go_on(world)
    assert looks(world) == 0
    assert "no node was heard of" in held(world)

    world.execute("DELETE FROM nodes")
    go_on(world)

    assert world.lineage("a.test").status == "active"


def test_the_first_node_is_waited_for(world: World) -> None:
    """The worker that runs the proxy may start after the one that orders; the proxies may be somebody else's, too."""
    listen(world, "forward")
    publish(world.db, world.clock, DEFAULTS)
    world.execute("UPDATE config_versions SET created_at = '2100-01-01T00:00:00.000000Z'")  # by the database's time
    order(world, "a.test")
    go_on(world)
    assert looks(world) == 0
    assert "no node serves it yet" in held(world)

    world.execute("UPDATE config_versions SET created_at = '2020-01-01T00:00:00.000000Z'")
    go_on(world)

    assert world.lineage("a.test").status == "active"
