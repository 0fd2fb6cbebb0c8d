"""The steps beside the issuing: scan, expire, publish, verify, reap, and requests of a person."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from certworker.core.gateway import Defaults
from certworker.core.issuance import State
from certworker.core.rollout import Cursor, Heartbeat
from certworker.errors import UnknownName
from certworker.steps.deliver import Scopes
from certworker.steps.expire import expire
from certworker.steps.publish import publish, publish_changes
from certworker.steps.reap import HISTORY, TOKENS, reap
from certworker.steps.renew import Outcome, Ticket, outcomes, request
from certworker.steps.scan import scan
from certworker.steps.verify import unlisted, verify
from certworker.store import counters, gateway, lineages, nodes, policies, settings_kv, versions
from certworker.store.rows import new_id
from tests.store.plans import statements

from .world import World

DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))
SILENT = timedelta(seconds=60)


# -- scan ---------------------------------------------------------------------------------------------


def test_scan_queues_what_is_due_once(world: World) -> None:
    """The same scan again, or in another worker, finds nothing more."""
    world.add_policy("a.test", "b.test")
    world.take_over()

    assert world.count("issuances") == 2
    assert scan(world.db, world.clock).queued == 0


def test_scan_looks_only_at_what_is_due(world: World) -> None:
    """After the issue nothing is looked at until the planned time."""
    lineage = world.issue("a.test")
    assert scan(world.db, world.clock).looked_at == 0

    assert lineage.renew_at is not None
    world.clock.now = lineage.renew_at
    report = scan(world.db, world.clock)
    assert (report.looked_at, report.queued) == (1, 1)


# -- expire -------------------------------------------------------------------------------------------


def test_expiry_flips_certificate_lineage_and_policy_with_audit_rows(world: World) -> None:
    """Past its end a certificate is `expired` and its policy `error`; a renewal brings both back."""
    world.issue("a.test")
    policy_id = str(world.rows("SELECT id FROM tls_policies")[0][0])
    world.clock.move(timedelta(days=91))

    assert expire(world.db, world.clock) == 1
    assert expire(world.db, world.clock) == 0

    assert world.rows("SELECT status FROM certificates") == [("expired",)]
    assert world.policy_status(policy_id) == "error"
    flips = {row[0] for row in world.rows("SELECT action FROM audit_logs")}
    assert {"certificate.expired", "policy.error"} <= flips
    scan(world.db, world.clock)
    world.work()
    assert world.rows("SELECT status FROM certificates") == [("active",)]
    assert world.policy_status(policy_id) == "active"


# -- publish ------------------------------------------------------------------------------------------


def write_gateway(world: World, address: str = "127.0.0.1:9000") -> None:
    listener, pool = new_id(), new_id()
    document = {
        "upstream_pools": [{"id": pool, "name": "web", "policy": "round_robin", "health_check": None}],
        "upstream_targets": [{"id": new_id(), "pool_id": pool, "address": address, "weight": 1, "enabled": True}],
        "listeners": [
            {"id": listener, "name": None, "port": 8443, "protocol": "https", "tls_policy_id": None, "enabled": True}
        ],
        "routes": [
            {"id": new_id(), "listener_id": listener, "type": "path", "match_expr": {}, "priority": 1,
             "upstream_pool_id": pool, "enabled": True}
        ],
    }  # fmt: skip
    now = world.clock()
    world.db.write(lambda tx: gateway.replace(tx, document, now))


def test_a_change_is_published_once(world: World) -> None:
    """Numbers grow, at most one is published, publishing what is published is a no-op."""
    assert publish(world.db, world.clock, DEFAULTS).version is None
    write_gateway(world)
    first = publish_changes(world.db, world.clock, DEFAULTS)
    assert publish_changes(world.db, world.clock, DEFAULTS) is None
    again = publish(world.db, world.clock, DEFAULTS)
    world.execute("UPDATE upstream_targets SET address = '127.0.0.1:9001'")
    second = publish_changes(world.db, world.clock, DEFAULTS)

    assert first is not None
    assert first.version is not None
    assert second is not None
    assert second.version is not None
    assert again.version is not None
    assert again.version.id == first.version.id
    assert (first.version.number, second.version.number) == (1, 2)
    assert sorted(row[0] for row in world.rows("SELECT status FROM config_versions")) == ["archived", "published"]


def test_a_faulty_row_leaves_the_published_version_standing(world: World) -> None:
    """It is named with table, field and rule, told once in the audit log, and mended by mending the row."""
    write_gateway(world)
    publish(world.db, world.clock, DEFAULTS)
    world.execute("UPDATE upstream_targets SET address = '0.0.0.0:80'")

    refused = publish_changes(world.db, world.clock, DEFAULTS)
    publish(world.db, world.clock, DEFAULTS)

    assert refused is not None
    assert [fault.table for fault in refused.faults] == ["upstream_targets"]
    assert world.rows("SELECT count(*) FROM config_versions") == [(1,)]
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'config.refused'") == [(1,)]
    world.execute("UPDATE upstream_targets SET address = '127.0.0.1:9001'")
    mended = publish_changes(world.db, world.clock, DEFAULTS)
    assert mended is not None
    assert mended.version is not None
    assert mended.version.number == 2


def test_a_snapshot_holds_no_key(world: World) -> None:
    """Certificates travel beside the versions."""
    world.issue("a.test")
    write_gateway(world)
    publish(world.db, world.clock, DEFAULTS)

    text = json.dumps(world.rows("SELECT snapshot_json FROM config_versions"), default=str)
    assert "PRIVATE KEY" not in text
    assert "cw1." not in text
    assert "BEGIN" not in text


# -- verify -------------------------------------------------------------------------------------------


def beat(world: World, node_id: str, revision: int, **more: dict[str, str]) -> None:
    heartbeat = Heartbeat(node_id, None, 1, Cursor(1, revision), "haproxy 2.6.12", **more)  # type: ignore[arg-type]
    world.db.write(lambda tx: nodes.record(tx, heartbeat))


def revision_of(world: World) -> int:
    return world.db.read(lambda tx: counters.value(tx, counters.REVISION))


def test_served_means_that_every_live_node_proved_it(world: World) -> None:
    """One node of two is not enough; without nodes nothing is claimed."""
    lineage = world.issue("a.test")
    assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    beat(world, "n1", revision_of(world))
    beat(world, "n2", revision_of(world) - 1)
    assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    assert world.lineage("a.test").served_at is None

    beat(world, "n2", revision_of(world))
    assert verify(world.db, world.clock, Scopes(), SILENT) == 1
    assert world.lineage(lineage.dns_names[0]).served_at == world.clock()


@pytest.mark.parametrize("kind", ["unserved", "fingerprints"])
def test_a_node_that_presents_something_else_does_not_count(world: World, kind: str) -> None:
    """Its revision is high enough, but its probe saw another leaf, or none."""
    lineage = world.issue("a.test")
    assert lineage.certificate_id is not None
    beat(world, "n1", revision_of(world), **{kind: {lineage.certificate_id: "0" * 64}})

    assert verify(world.db, world.clock, Scopes(), SILENT) == 0


def test_a_silent_node_is_not_waited_for(world: World) -> None:
    """NODE_SILENT_SECS without a heartbeat: it is not live."""
    world.issue("a.test")
    beat(world, "gone", 0)
    old = "2020-01-01T00:00:00.000000Z"
    world.execute(f"UPDATE node_status SET heartbeat_at = '{old}'")
    beat(world, "n1", revision_of(world))

    assert verify(world.db, world.clock, Scopes(), SILENT) == 1


def test_a_renewal_has_to_be_proved_anew(world: World) -> None:
    """served_at belongs to the certificate that serves now."""
    lineage = world.issue("a.test")
    beat(world, "n1", revision_of(world))
    verify(world.db, world.clock, Scopes(), SILENT)
    assert lineage.renew_at is not None
    world.clock.now = lineage.renew_at
    world.take_over()
    world.work()

    assert world.lineage("a.test").served_at is None
    assert verify(world.db, world.clock, Scopes(), SILENT) == 0


def test_a_newer_certificate_is_not_called_served_by_an_older_proof(world: World) -> None:
    """What the node proved was another issuance's; a renewal has come between the look and the note."""
    lineage = world.issue("a.test")
    (seen,) = world.db.read(lambda tx: lineages.unserved(tx, "", 10))
    now = world.clock()

    world.db.write(lambda tx: lineages.record_served(tx, [replace(seen, issuance_id=new_id())], now))
    assert world.lineage("a.test").served_at is None
    world.db.write(lambda tx: lineages.record_served(tx, [seen], now))
    assert world.lineage(lineage.dns_names[0]).served_at == now


def test_a_look_at_what_is_served_reads_no_more_than_it_needs(world: World) -> None:
    """Without nodes one moment; with nodes, what is not proved yet; and many that are proved are noted together."""
    for number in range(20):
        world.add_policy(f"n{number}.test")
    world.take_over()
    world.work()
    with statements(world.db) as sent:
        assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    assert len(sent) == 1

    beat(world, "n1", revision_of(world))
    with statements(world.db) as sent:
        assert verify(world.db, world.clock, Scopes(), SILENT) == 20
    assert len([one for one in sent if one.startswith("UPDATE")]) == 1

    with statements(world.db) as sent:
        assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    assert len(sent) == 2


def test_what_was_proved_before_a_restore_proves_nothing(world: World) -> None:
    """Revisions are counted anew, so an old high one must not stand for what came since."""
    world.issue("a.test")
    beat(world, "n1", revision_of(world) + 100)
    world.db.write(lambda tx: counters.start_over(tx, world.clock()))

    assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    (node,) = world.db.read(nodes.list_all)
    assert node.revision == 0


def test_a_node_that_cannot_name_all_its_faults_proves_nothing(world: World) -> None:
    """Any certificate may be among them."""
    world.issue("a.test")
    beat(world, "n1", revision_of(world), untold=1)
    assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    beat(world, "n1", revision_of(world))
    assert verify(world.db, world.clock, Scopes(), SILENT) == 1


def test_what_no_listener_names_is_served_by_nobody(world: World) -> None:
    """Nodes are not even given it, so they have nothing against it."""
    world.issue("a.test")
    world.issue("b.test")
    policy_of = dict(world.rows("SELECT domain, policy_id FROM certificates JOIN policy_lineages USING (lineage_id)"))
    world.execute(
        "INSERT INTO listeners (id, name, port, protocol, tls_policy_id, enabled) "
        "VALUES (:id, 'a', 443, 'https', :policy, true)",
        id=new_id(), policy=str(policy_of["a.test"]),
    )  # fmt: skip
    publish(world.db, world.clock, DEFAULTS)
    beat(world, "n1", revision_of(world))

    assert verify(world.db, world.clock, Scopes(), SILENT) == 1
    assert world.lineage("a.test").served_at is not None
    assert world.lineage("b.test").served_at is None
    ids = [world.lineage(name).id for name in ("a.test", "b.test")]
    assert world.db.read(lambda tx: unlisted(tx, ids, Scopes())) == {world.lineage("b.test").id}


def test_what_enrolled_nodes_are_not_given_yet_is_served_by_nobody(world: World) -> None:
    """A canary tries the version that brings the listener; the others have nothing of it, and nothing against it."""
    world.issue("a.test")
    listen(world, 80, "http")
    release(world)
    world.execute(
        "INSERT INTO nodes (id, name, token_hash, canary, enrolled_at) VALUES (:id, 'gw1', 'x', false, :at)",
        id=new_id(), at="2026-01-01T00:00:00.000000Z",
    )  # fmt: skip
    listen(world, 443, "https")
    publish(world.db, world.clock, DEFAULTS)
    beat(world, "gw1", revision_of(world))
    assert verify(world.db, world.clock, Scopes(), SILENT) == 0

    release(world)
    assert verify(world.db, world.clock, Scopes(), SILENT) == 1


def listen(world: World, port: int, protocol: str) -> None:
    world.execute(
        f"INSERT INTO listeners (id, name, port, protocol, enabled) VALUES (:id, 'a', {port}, '{protocol}', true)",
        id=new_id(),
    )


def release(world: World) -> None:
    """Publish the rows, and let every node have them."""
    publish(world.db, world.clock, DEFAULTS)
    published_id = world.db.read(versions.published_id)
    assert published_id is not None
    world.db.write(lambda tx: settings_kv.put(tx, settings_kv.RELEASED_VERSION, published_id))


def test_a_version_that_cannot_be_read_hides_nothing(world: World) -> None:
    """What the nodes prove counts: they serve on what they had."""
    world.issue("a.test")
    listen(world, 80, "http")
    publish(world.db, world.clock, DEFAULTS)
    world.execute("""UPDATE config_versions SET snapshot_json = '{"schema_version": 99}'""")
    beat(world, "n1", revision_of(world))

    assert verify(world.db, world.clock, Scopes(), SILENT) == 1


@pytest.mark.parametrize("metadata", ["[1]", '"text"', "7", '{"cursor": 3, "unserved": [], "error": {}}'])
def test_metadata_of_another_program_stops_nothing(world: World, metadata: str) -> None:
    """Any JSON may stand in node_status; a node that proves nothing is not counted as serving."""
    world.issue("a.test")
    beat(world, "n1", revision_of(world))
    world.execute("UPDATE node_status SET metadata = :metadata", metadata=metadata)

    assert verify(world.db, world.clock, Scopes(), SILENT) == 0
    (node,) = world.db.read(nodes.list_all)
    assert (node.revision, node.version, node.error) == (0, None, None)


# -- reap ---------------------------------------------------------------------------------------------


def test_reap_keeps_what_may_be_needed(world: World) -> None:
    """A closed issuance stays until its certificate's end, and at least for HISTORY."""
    world.issue("a.test")
    world.clock.move(HISTORY + timedelta(days=1))
    assert reap(world.db, world.clock).issuances == 0

    world.clock.move(timedelta(days=90))
    assert reap(world.db, world.clock).issuances == 1
    assert world.count("certificates") == 1


def test_reap_drops_tokens_of_closed_issuances(world: World) -> None:
    """A token that a crash left behind is gone after TOKENS."""
    world.closed_names.add("a.test")
    world.issue("a.test")
    row = world.last_issuance("a.test")
    world.execute(
        "INSERT INTO challenges (id, issuance_id, authorization_url, dns_name, token, key_authorization, created_at) "
        f"VALUES ('{new_id()}', '{row.id}', 'https://ca.test/x', 'a.test', 'tok', 'tok.thumb', "
        "'2026-11-22T12:00:00.000000Z')"
    )
    assert reap(world.db, world.clock).tokens == 0

    world.clock.move(TOKENS + timedelta(seconds=1))
    assert reap(world.db, world.clock).tokens == 1


# -- requests -----------------------------------------------------------------------------------------


def outcome(world: World, ticket: Ticket) -> Outcome:
    """Return how a ticket stands where there are no nodes."""
    (found,) = world.db.read(lambda tx: outcomes(tx, [ticket], ()))
    return found


def test_many_outcomes_are_read_together(world: World) -> None:
    """One that ended each way, one that waits, one that is gone; who has to be served by nodes says whether it is."""
    for name in ("done.test", "served.test", "failed.test", "gone.test"):
        world.add_policy(name)
    world.closed_names.add("failed.test")
    world.take_over()
    tickets = request(world.db, world.clock, [], force=False, dry_run=False, private_ca=True).tickets
    world.work()
    world.add_policy("waits.test")
    world.take_over()
    tickets += request(world.db, world.clock, [], force=False, dry_run=False, private_ca=True).tickets
    by_name = {ticket.name: ticket for ticket in tickets}
    world.execute("UPDATE lineages SET served_at = created_at WHERE id = :id", id=by_name["served.test"].lineage_id)
    world.execute("DELETE FROM issuances WHERE id = :id", id=by_name["gone.test"].issuance_id)
    to_serve = [by_name[name].lineage_id for name in ("done.test", "served.test", "failed.test")]
    with statements(world.db) as sent:
        found = world.db.read(lambda tx: outcomes(tx, list(by_name.values()), to_serve))

    assert len(sent) == 2
    assert {one.ticket.name: (one.result, one.served) for one in found} == {
        "done.test": ("renewed", False),
        "served.test": ("renewed", True),
        "failed.test": ("failed", None),
        "gone.test": ("failed", None),
        "waits.test": ("waiting", None),
    }
    assert found[[one.ticket.name for one in found].index("done.test")].expires_at is not None


def test_an_unknown_name_queues_nothing(world: World) -> None:
    """Exit code 2's error, even if the other names are known."""
    world.issue("a.test")

    with pytest.raises(UnknownName, match=r"nope\.test"):
        request(world.db, world.clock, ["a.test", "nope.test"], force=True, dry_run=False, private_ca=True)
    assert world.count("issuances") == 1


def test_a_named_one_that_is_not_due_is_unchanged(world: World) -> None:
    """Without force nothing happens to it; with force it is renewed."""
    world.issue("a.test")
    asked = request(world.db, world.clock, ["a.test"], force=False, dry_run=False, private_ca=True)
    assert (asked.tickets, asked.unchanged) == ([], 1)

    forced = request(world.db, world.clock, ["a.test"], force=True, dry_run=False, private_ca=True)
    (ticket,) = forced.tickets
    assert outcome(world, ticket).result == "waiting"
    world.work()
    done = outcome(world, ticket)
    assert (done.result, done.served) == ("renewed", None)
    assert done.document()["fingerprint_sha256"] == world.rows("SELECT fingerprint FROM certificates")[0][0]


def test_a_dry_run_writes_nothing(world: World) -> None:
    """It says what would be renewed and why."""
    world.add_policy("a.test")
    from_policies = world.count("issuances")
    world.take_over()
    queued = world.count("issuances")
    asked = request(world.db, world.clock, ["a.test"], force=True, dry_run=True, private_ca=True)

    assert asked.would_renew == [("a.test", "first")]
    assert (from_policies, queued, world.count("issuances")) == (0, 1, 1)
    assert world.ca.requests == []


def test_asking_again_cuts_our_own_back_off_short_but_not_the_cas(world: World) -> None:
    """A person asked: the next try is now, unless the CA said when."""
    world.ca.fail_next("POST", "/new-order", status=503, problem="serverInternal")
    world.add_policy("a.test")
    world.take_over()
    world.work()
    request(world.db, world.clock, ["a.test"], force=False, dry_run=False, private_ca=True)
    assert world.last_issuance("a.test").attempt_at == world.clock()

    world.ca.fail_next("POST", "/new-order", status=429, problem="rateLimited", headers={"retry-after": "600"})
    world.work()
    request(world.db, world.clock, ["a.test"], force=False, dry_run=False, private_ca=True)
    assert world.last_issuance("a.test").attempt_at > world.clock()


def test_a_failed_request_says_why(world: World) -> None:
    """class, type, detail, retry_at and hint are there, as the contract has them."""
    world.closed_names.add("a.test")
    world.add_policy("a.test")
    asked = request_all(world)
    world.work()

    failed = outcome(world, asked)
    assert failed.result == "failed"
    assert set(failed.document()["error"]) == {"class", "type", "detail", "retry_at", "hint"}
    assert world.last_issuance("a.test").state == State.FAILED


def request_all(world: World):  # type: ignore[no-untyped-def]
    world.take_over()
    (ticket,) = request(world.db, world.clock, [], force=False, dry_run=False, private_ca=True).tickets
    return ticket


def test_force_without_names_takes_everything_that_is_wanted(world: World) -> None:
    """And nothing that is paused."""
    world.issue("a.test")
    paused = world.add_policy("b.test")
    now = world.clock()
    world.take_over()
    world.work()
    world.db.write(lambda tx: policies.set_paused(tx, paused, now, now))
    world.take_over()

    asked = request(world.db, world.clock, [], force=True, dry_run=False, private_ca=True)

    assert [ticket.name for ticket in asked.tickets] == ["a.test"]


def test_published_version_is_found(world: World) -> None:
    """The one that nodes are to serve."""
    write_gateway(world)
    published = publish(world.db, world.clock, DEFAULTS)

    found = world.db.read(versions.find_published)
    assert found == published.version


def test_certificates_are_found_by_domain(world: World) -> None:
    """`certificates.domain` is exact: one name, one certificate."""
    world.issue("a.test")

    assert world.rows("SELECT count(*) FROM certificates WHERE domain = 'a.test'") == [(1,)]
