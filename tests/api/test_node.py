"""The node API over real HTTPS: who may ask, what each is told, and what nobody can send."""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from certworker.api.failures import BURST, Failures
from certworker.api.node import MAX_ENROLMENT, MAX_HEARTBEAT
from certworker.core.rollout import Cursor
from certworker.core.transit import EnrolRequest, HeartbeatBody, NodeToken
from certworker.errors import ControlPlaneError, NodeRefused, NodeRemoved, StoreError
from certworker.node.remote import enrol
from certworker.steps.identity import take_identity
from certworker.steps.reap import reap
from certworker.store import nodes

from .plane import SILENT, Machine, Plane, uuid

ROUTES = [
    ("GET", "/v1/node/version"),
    ("GET", "/v1/node/certificates"),
    ("POST", "/v1/node/heartbeat"),
]


def until(look: Callable[[], object], limit: float = 10) -> None:
    give_up_at = time.monotonic() + limit
    while not look():
        assert time.monotonic() < give_up_at, "what was waited for did not happen in time"
        time.sleep(0.02)


# -- enrolment --------------------------------------------------------------------------------------


def test_a_one_time_token_makes_a_node(plane: Plane) -> None:
    """What the database keeps of either secret is a hash."""
    request = plane.request("gw1")
    node_id = enrol(plane.line(), request)
    machine = Machine(plane, "gw1", NodeToken(node_id, request.node_secret))
    machine.prove(None)

    kept = str(plane.world.rows("SELECT * FROM nodes") + plane.world.rows("SELECT * FROM enrolments"))
    kept += str(plane.world.rows("SELECT * FROM audit_logs"))
    assert [one.node_id for one in plane.db.read(nodes.list_all)] == ["gw1"]
    assert request.secret not in kept
    assert request.node_secret not in kept


def test_an_answer_that_got_lost_is_given_again(plane: Plane) -> None:
    """To who has both secrets, and to nobody else."""
    request = plane.request("gw1")
    first = enrol(plane.line(), request)

    assert enrol(plane.line(), request) == first
    other = request.model_copy(update={"node_secret": "x" * 43})
    with pytest.raises(NodeRefused, match=r"403.*has been used"):
        enrol(plane.line(), other)
    assert plane.world.count("nodes") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secret": "x" * 43}, "no such enrolment token"),
        ({"name": "gw2"}, "no such enrolment token"),
        ({"enrolment_id": uuid(1)}, "no such enrolment token"),
    ],
    ids=["secret", "name", "id"],
)
def test_a_wrong_token_enrols_nobody(plane: Plane, change: dict[str, str], said: str) -> None:
    request = plane.request("gw1")
    with pytest.raises(NodeRefused, match=said):
        enrol(plane.line(), request.model_copy(update=change))
    assert plane.world.count("nodes") == 0


def test_a_token_is_good_for_an_hour(plane: Plane) -> None:
    """By the database's clock."""
    request = plane.request("gw1")
    past = "'2020-01-01T00:00:00.000000Z'" if plane.db.embedded else "now() - interval '1 second'"
    plane.world.execute(f"UPDATE enrolments SET expires_at = {past}")

    with pytest.raises(NodeRefused, match="was good until"):
        enrol(plane.line(), request)


def test_a_newer_token_ends_an_older_one(plane: Plane) -> None:
    """For the same name."""
    older, newer = plane.request("gw1"), plane.request("gw1")
    with pytest.raises(NodeRefused):
        enrol(plane.line(), older)

    assert enrol(plane.line(), newer)


# -- who asks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nobody_is_told_anything_without_a_token(plane: Plane, method: str, path: str) -> None:
    """Not without one, not with half of one, not with another's secret: 401 and a problem document."""
    one, two = plane.join("gw1").token, plane.join("gw2").token
    plane.publish(None)
    for token in (None, "", "x", one.node_id, one.text() + "x", NodeToken(one.node_id, two.secret).text()):
        answer = plane.ask(method, path, token)

        assert answer.status == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert {"type", "title", "status", "detail"} == answer.json.keys()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_node_that_was_removed_is_told_so(plane: Plane, method: str, path: str) -> None:
    """From the next request on: 403, and what to do."""
    machine = plane.join("gw1")
    machine.prove(None)
    assert plane.dismiss("gw1")
    answer = plane.ask(method, path, machine.token.text(), b"{}")

    assert answer.status == 403
    assert "node gw1 was removed" in answer.json["detail"]
    assert plane.db.read(nodes.list_all) == []


def test_a_heartbeat_that_was_under_way_leaves_no_node_behind(plane: Plane) -> None:
    """Who was removed between the look at its token and the write is waited for by nobody."""
    machine = plane.join("gw1")
    node = plane.fleet.recognise(machine.token)
    plane.dismiss("gw1")
    with pytest.raises(NodeRemoved):
        plane.fleet.record(node, machine.heartbeat(None), "agent", "127.0.0.1")

    assert plane.db.read(nodes.list_all) == []


def test_removed_and_enrolled_again(plane: Plane) -> None:
    """The name is free; the old token stays dead."""
    old = plane.join("gw1")
    plane.dismiss("gw1")
    new = plane.join("gw1")
    new.prove(None)

    assert plane.ask("GET", "/v1/node/version", old.token.text()).status == 403


def test_wrong_tokens_are_bounded(plane: Plane) -> None:
    """An address that shows many is not listened to for a while: 429, and when to come back; nodes behind it are."""
    node = plane.join("gw1")
    answers = [plane.ask("GET", "/v1/node/version", "x") for _ in range(BURST + 1)]

    assert [answer.status for answer in answers] == [401] * BURST + [429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 7
    assert plane.ask("GET", "/v1/node/version", node.token.text()).status in (200, 204)


def test_failures_are_counted_by_address() -> None:
    """A /64 of IPv6 is one; they are forgotten with time, and the table is bounded."""
    now = 1000.0
    failures = Failures(lambda: now)
    for _ in range(BURST):
        assert failures.wait("192.0.2.1") == 0
        failures.note("192.0.2.1")
        failures.note("2001:db8::1")

    assert failures.wait("192.0.2.1") == pytest.approx(6)
    assert failures.wait("192.0.2.2") == 0
    assert failures.wait("2001:db8::ffff") > 0
    assert failures.wait("2001:db8:0:1::1") == 0
    now += 6
    assert failures.wait("192.0.2.1") == 0
    for number in range(5000):
        failures.note(f"10.0.{number >> 8}.{number & 255}")
    assert failures.wait("2001:db8::1") == 0


# -- versions ---------------------------------------------------------------------------------------


def test_a_node_is_told_the_version_once(plane: Plane) -> None:
    """And then that it has it."""
    machine = plane.join("gw1")
    assert machine.served() is None
    version_id = plane.publish(None)
    until(lambda: machine.served() == version_id)

    again = plane.ask("GET", f"/v1/node/version?after={version_id}", machine.token.text())
    assert (again.status, again.body) == (204, b"")


def test_a_node_that_was_away_gets_only_the_newest(plane: Plane) -> None:
    """Whatever was published meanwhile."""
    machine = plane.join("gw1")
    for _ in range(3):
        newest = plane.publish(None)
    plane.look()

    assert machine.served() == newest


def test_canaries_first(plane: Plane) -> None:
    """The others keep what they have until every live canary has proved the new one."""
    canaries = [plane.join("c1", canary=True), plane.join("c2", canary=True)]
    other = plane.join("gw1")
    first = plane.publish(None)
    for canary in canaries:
        canary.prove(first)
    until(lambda: other.served() == first)

    second = plane.publish(None)
    until(lambda: canaries[0].served() == second)
    canaries[0].prove(second)
    plane.look()
    assert other.served() == first
    assert plane.join("late").served() == first

    canaries[1].prove(second)
    until(lambda: other.served() == second)


def test_a_silent_canary_proves_nothing(plane: Plane) -> None:
    """It may have died of the version; without it there is nobody to wait for."""
    canary, other = plane.join("c1", canary=True), plane.join("gw1")
    canary.prove(None)
    version_id = plane.publish(None)
    long_ago = "'2020-01-01T00:00:00.000000Z'" if plane.db.embedded else "now() - interval '1 hour'"
    plane.world.execute(f"UPDATE node_status SET heartbeat_at = {long_ago}")
    plane.look()
    assert other.served() is None

    plane.dismiss("c1")
    plane.look()
    assert other.served() == version_id


# -- long polls -------------------------------------------------------------------------------------


def test_whoever_waits_is_told_at_once(plane: Plane) -> None:
    """Of a version and of a certificate; nobody waits longer than it asked for."""
    machine = plane.join("gw1")
    version_id = plane.publish(None)
    until(lambda: machine.served() == version_id)
    machine.source.report(machine.heartbeat(version_id))  # who serves nothing is waited for before the CA is asked
    machine.source.heartbeat_every = timedelta(seconds=30)
    for change in (lambda: plane.publish(None), lambda: plane.world.issue("a.test") and plane.api.poke()):
        cursor = machine.source.changes_after(Cursor()).cursor
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(machine.source.wait, cursor)
            time.sleep(0.1)
            assert not waiting.done()
            change()
            waiting.result(5)

    cursor = machine.source.changes_after(Cursor()).cursor
    machine.source.heartbeat_every = timedelta(seconds=0.2)
    began = time.monotonic()
    machine.source.wait(cursor)
    assert time.monotonic() - began < 5


def test_who_waits_holds_neither_thread_nor_connection(plane: Plane) -> None:
    """A hundred wait; the database has no connection in use, and one publish answers all."""
    machine = plane.join("gw1")
    path = "/v1/node/version?after=&wait=20"
    cursor = machine.source.changes_after(Cursor()).cursor
    path += f"&epoch={cursor.epoch}&revision={cursor.revision}"
    with ThreadPoolExecutor(100) as pool:
        waiting = [pool.submit(plane.ask, "GET", path, machine.token.text()) for _ in range(100)]
        time.sleep(1.5)
        assert not any(one.done() for one in waiting)
        ours = [thread for thread in threading.enumerate() if thread.name.startswith(("node-api", "api"))]
        in_use = plane.db.engine.pool.checkedout()  # type: ignore[attr-defined]
        plane.publish(None)
        answers = [one.result(15) for one in waiting]

    assert len(ours) <= 9
    assert in_use <= 1
    assert {answer.status for answer in answers} == {200}


def test_a_stop_answers_who_waits(plane: Plane) -> None:
    """In no time, and with nothing new."""
    machine = plane.join("gw1")
    cursor = machine.source.changes_after(Cursor()).cursor
    path = f"/v1/node/version?wait=30&epoch={cursor.epoch}&revision={cursor.revision}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(plane.ask, "GET", path, machine.token.text())
        time.sleep(0.3)
        began = time.monotonic()
        plane.api.stop()
        assert waiting.result(5).status in (204, 503)

    assert time.monotonic() - began < 2


def test_answers_are_not_held_back(plane: Plane) -> None:
    """Head and body are two writes: with Nagle's algorithm each answer on a kept connection would take 40 ms more."""
    machine = plane.join("gw1")
    took = []
    for _ in range(10):
        began = time.monotonic()
        machine.source.changes_after(Cursor())
        took.append(time.monotonic() - began)

    assert min(took) < 0.035


# -- certificates -----------------------------------------------------------------------------------


def names_of(machine: Machine, cursor: Cursor = Cursor()) -> set[str]:  # noqa: B008
    return {name for one in machine.source.changes_after(cursor).changed for name in one.dns_names}


def policies_of(plane: Plane) -> dict[str, str]:
    """Return the policy that wants each certificate, by the certificate's name."""
    query = "SELECT domain, policy_id FROM certificates JOIN policy_lineages USING (lineage_id)"
    return {name: str(policy_id) for name, policy_id in plane.world.rows(query)}


def test_a_node_gets_what_its_listeners_answer_with(plane: Plane) -> None:
    """Restricted to a policy, another's key is never delivered; without restriction, all are."""
    plane.world.issue("mine.test")
    plane.world.issue("other.test")
    mine = policies_of(plane)["mine.test"]
    machine = plane.join("gw1")
    assert names_of(machine) == set()

    plane.publish(mine)
    plane.look()
    restricted = plane.ask("GET", "/v1/node/certificates", machine.token.text())
    assert names_of(machine) == {"mine.test"}
    (foreign,) = plane.world.rows("SELECT id, fingerprint FROM certificates WHERE domain = 'other.test'")
    assert str(foreign[1]) not in restricted.body.decode()
    assert restricted.body.count(b"BEGIN PRIVATE KEY") == 1

    plane.publish(None)
    plane.look()
    assert names_of(machine) == {"mine.test", "other.test"}


def test_a_node_keeps_what_it_serves_until_the_new_version_is_proved(plane: Plane) -> None:
    """The new one may be refused: then the old one still needs its certificates."""
    plane.world.issue("a.test")
    plane.world.issue("b.test")
    policy_of = policies_of(plane)
    machine = plane.join("gw1")
    first = plane.publish(policy_of["a.test"])
    plane.look()
    cursor = machine.source.changes_after(Cursor()).cursor
    machine.prove(first, cursor)

    second = plane.publish(policy_of["b.test"])
    plane.look()
    between = machine.source.changes_after(cursor)
    machine.prove(second, between.cursor)
    after = machine.source.changes_after(between.cursor)

    assert {one.dns_names for one in between.changed} == {("a.test",), ("b.test",)}
    assert after.complete
    assert {one.dns_names for one in after.changed} == {("b.test",)}


def test_an_old_version_gives_nothing_back(plane: Plane) -> None:
    """A token that says a version of long ago does not get what the node was to have then."""
    plane.world.issue("a.test")
    plane.world.issue("b.test")
    policy_of = policies_of(plane)
    machine = plane.join("gw1")
    first = plane.publish(policy_of["a.test"])
    plane.look()
    for _ in range(2):
        plane.publish(policy_of["b.test"])
        plane.look()
    machine.prove(first, Cursor())

    assert names_of(machine) == {"b.test"}


def test_what_is_gone_is_told(plane: Plane) -> None:
    """And to a node that missed the tombstone, by giving it the whole again."""
    plane.world.issue("a.test")
    plane.world.issue("b.test")
    machine = plane.join("gw1")
    plane.publish(None)
    plane.look()
    cursor = machine.source.changes_after(Cursor()).cursor
    plane.world.execute("DELETE FROM certificates WHERE domain = 'a.test'")
    plane.world.take_over()
    told = machine.source.changes_after(cursor)
    plane.world.clock.move(timedelta(days=31))
    reap(plane.db, plane.world.clock)
    whole = machine.source.changes_after(cursor)

    assert len(told.removed) == 1
    assert not told.complete
    assert whole.complete
    assert {one.dns_names for one in whole.changed} == {("b.test",)}


# -- heartbeats -------------------------------------------------------------------------------------


def test_a_node_writes_its_own_heartbeat_only(plane: Plane) -> None:
    """Whoever it says it is: the name comes from the token, and a body that names a node is refused."""
    one, two = plane.join("gw1"), plane.join("gw2")
    two.prove(None)
    forged = one.heartbeat(None, error="all is well")
    body = json.loads(HeartbeatBody.of(forged, "x").model_dump_json())
    refused = plane.ask("POST", "/v1/node/heartbeat", one.token.text(), json.dumps({**body, "node_id": "gw2"}))
    one.source.report(replace(forged, node_id="gw2"))

    said = {row.node_id: row.error for row in plane.db.read(nodes.list_all)}
    assert refused.status == 400
    assert "node_id" in refused.json["detail"]
    assert said == {"gw1": "all is well", "gw2": None}


def test_a_heartbeat_is_kept_as_it_was_said(plane: Plane) -> None:
    """With the program that sent it, and from where."""
    machine = plane.join("gw1")
    version_id = plane.publish(None)
    heartbeat = machine.heartbeat(
        version_id, Cursor(1, 7), fingerprints={uuid(1): "a" * 64}, unserved={uuid(2): "why"},
        refused={uuid(2): "why"}, refused_version_id=uuid(3), unanswered={"a.test": "no"}, warnings=("hm",),
        error="a line\x00 and\nanother \ud83d\ude00",
    )  # fmt: skip
    machine.source.report(heartbeat)
    (row,) = plane.db.read(nodes.list_all)

    assert (row.version_id, row.version, row.revision) == (version_id, 1, 7)
    assert (row.fingerprints, row.unserved) == ({uuid(1): "a" * 64}, {uuid(2): "why"})
    assert (row.refused, row.refused_version_id, row.unanswered) == ({uuid(2): "why"}, uuid(3), {"a.test": "no"})
    assert row.error is not None
    assert row.error.startswith("a line? and?another")
    assert (row.agent, row.address, row.proxy) == ("certworker test", "127.0.0.1", "haproxy 2.6.12")
    assert machine.source.heartbeat_every == min(timedelta(seconds=10), SILENT / 4)


HOSTILE: list[Any] = [
    b"", b"\xff", b"null", b"[]", b"{", b'{"version_id": 1}', b"[" * 4000, b'{"a":' * 800, b"NaN", b"1e999",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/enrol", "/v1/node/heartbeat"])
def test_hostile_bodies_are_refused(plane: Plane, path: str) -> None:
    """400, a problem document that names the field, and nothing of what was sent."""
    token = plane.join("gw1").token.text()
    for body in HOSTILE:
        answer = plane.ask("POST", path, token, body)

        assert answer.status == 400, body[:20]
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version_id": "x"}, "version_id"),
        ({"fingerprints": {"x": "a" * 64}}, "fingerprints"),
        ({"fingerprints": {uuid(1): "secret-of-mine"}}, "fingerprints"),
        ({"unanswered": {"a..b": "x"}}, "unanswered"),
        ({"refused": {"x": "y"}}, "refused"),
        ({"refused_version_id": 7}, "refused_version_id"),
        ({"cursor": None}, "cursor"),
        ({"warnings": ["x"] * 1001}, "warnings"),
        ({"more": 1}, "more"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_heartbeat_has_its_form(plane: Plane, change: dict[str, object], field: str) -> None:
    machine = plane.join("gw1")
    body = json.loads(HeartbeatBody.of(machine.heartbeat(None), "x").model_dump_json())
    answer = plane.ask("POST", "/v1/node/heartbeat", machine.token.text(), json.dumps({**body, **change}))

    assert answer.status == 400
    assert field in answer.json["detail"]
    assert "secret-of-mine" not in answer.json["detail"]


def test_bodies_are_bounded(plane: Plane) -> None:
    """By what is for each: 413."""
    token = plane.join("gw1").token.text()

    assert plane.ask("POST", "/v1/enrol", None, b" " * (MAX_ENROLMENT + 1)).status == 413
    assert plane.ask("POST", "/v1/node/heartbeat", token, b" " * (MAX_HEARTBEAT + 1)).status == 413


@pytest.mark.parametrize(
    "query",
    ["wait=-1", "wait=61", "wait=nan", "wait=inf", "epoch=x", "epoch=-1", f"revision={2**63}", f"after={'x' * 40}"],
)
def test_hostile_queries_are_refused(plane: Plane, query: str) -> None:
    answer = plane.ask("GET", f"/v1/node/version?{query}", plane.join("gw1").token.text())

    assert answer.status == 400
    assert answer.headers["content-type"] == "application/problem+json"


def test_other_paths_and_methods(plane: Plane) -> None:
    for method, path, status in (("GET", "/", 404), ("GET", "/docs", 404), ("DELETE", "/v1/enrol", 405)):
        answer = plane.ask(method, path)

        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"


# -- faults -----------------------------------------------------------------------------------------


def test_a_database_that_is_away_is_said(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """503, and the node comes back by itself."""
    machine = plane.join("gw1")

    def away(*_: object) -> None:
        raise StoreError("cannot read from the database: connection refused")

    monkeypatch.setattr(plane.fleet, "version_id_for", away)
    with pytest.raises(ControlPlaneError, match="503: cannot read from the database"):
        machine.source.published()


def test_no_token_is_logged(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, at any level."""
    with caplog.at_level(logging.DEBUG):
        machine = plane.join("gw1")
        request: EnrolRequest = plane.request("gw2")
        enrol(plane.line(), request)
        other = request.model_copy(update={"node_secret": "y" * 43})
        with pytest.raises(NodeRefused):
            enrol(plane.line(), other)
        plane.ask("GET", "/v1/node/version", NodeToken(machine.token.node_id, request.node_secret).text())
        plane.ask("POST", "/v1/enrol", None, request.model_dump_json() + "x")
    said = caplog.text

    assert "node.enrolled" in said
    for secret in (machine.token.secret, request.secret, request.node_secret, other.node_secret):
        assert secret not in said


def test_the_identity_is_one_for_all_workers(plane: Plane) -> None:
    """And its key is sealed."""
    again = take_identity(plane.db, plane.world.sealer)
    ((stored,),) = plane.world.rows("SELECT value FROM settings_kv WHERE key = 'node_api'")

    assert again == plane.identity
    assert "PRIVATE KEY" not in stored
    assert "cw1." in stored


def test_a_late_look_releases_no_older_version(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was held up wakes when a newer version is out: nodes never go back."""
    plane.api.stop()
    plane.publish(None)
    write, newest = plane.db.write, []

    def late(fn: Callable[[Any], object]) -> object:
        monkeypatch.setattr(plane.db, "write", write)
        newest.append(plane.publish(None))
        plane.look()
        return write(fn)

    monkeypatch.setattr(plane.db, "write", late)

    assert plane.look() == newest[0]
    assert plane.world.rows("SELECT value FROM settings_kv WHERE key = 'released_version'") == [(newest[0],)]
