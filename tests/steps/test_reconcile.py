"""What other programs write is taken over: policies, certificates, deletions, changed settings."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event

from certworker.core.certificate import read_leaf
from certworker.core.issuance import State
from certworker.steps.expire import expire
from certworker.steps.reconcile import SWEEP, reconcile
from certworker.steps.scan import scan
from certworker.store import certificates, policies
from certworker.store.database import Database, open_database
from certworker.store.lineages import Issuer
from tests.store.given import url_of
from tests.store.plans import statements

from .world import World

POLICY = "7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c11"
CERTIFICATE = "0d43a38a-c38c-478b-a329-8b6986724048"
TIME = "2026-11-22T12:00:00.000000Z"


def insert_policy(world: World, names: list[object], policy_id: str = POLICY, mode: str = "auto") -> None:
    """Insert a policy as another program does: the given columns alone, in raw SQL."""
    domains = json.dumps(names) if world.db.embedded else "{" + ",".join(f'"{name}"' for name in names) + "}"
    world.execute(
        "INSERT INTO tls_policies (id, mode, domains, status, created_at, updated_at) "
        f"VALUES ('{policy_id}', '{mode}', :domains, 'pending', '{TIME}', '{TIME}')",
        domains=domains,
    )


def insert_certificate(world: World, chain_pem: str, key_pem: str, domain: str = "m.test") -> None:
    world.execute(
        "INSERT INTO certificates (id, domain, cert_pem, key_pem, expires_at, status, created_at, updated_at) "
        f"VALUES ('{CERTIFICATE}', :domain, :chain, :key, '2027-01-01T00:00:00.000000Z', 'active', '{TIME}', '{TIME}')",
        domain=domain, chain=chain_pem, key=key_pem,
    )  # fmt: skip


def pair_of(world: World, dns_name: str) -> tuple[str, str]:
    """Return chain and plain key of a certificate the CA has made."""
    lineage = world.issue(dns_name)
    row = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    assert row is not None
    return row.cert_pem, world.sealer.open(row.key_pem, table="certificates", column="key_pem", row_id=row.id)


def test_a_raw_row_with_given_columns_alone_is_worked_on(world: World) -> None:
    """Another gateway program inserts a policy; it gets its certificates."""
    insert_policy(world, ["a.test", "B.Test"])
    world.take_over()
    world.work()

    assert world.policy_status(POLICY) == "active"
    assert {row[0] for row in world.rows("SELECT domain FROM certificates")} == {"a.test", "b.test"}


def test_an_impossible_name_puts_its_policy_in_error_and_stops_nothing_else(world: World) -> None:
    """The reason is in the audit log; its other names, and other policies, go on."""
    insert_policy(world, ["a..b", "good.test", "*.wild.test", "1.2.3.4"])
    other = world.add_policy("other.test")
    world.take_over()
    world.work()

    assert world.policy_status(POLICY) == "error"
    assert world.policy_status(other) == "active"
    assert world.lineage("good.test").status == "active"
    (diff,) = [row[0] for row in world.rows("SELECT diff FROM audit_logs WHERE action = 'policy.error'")]
    diff = json.loads(diff) if isinstance(diff, str) else diff
    assert {refused["value"] for refused in diff["after"]["reason"]} == {"a..b", "*.wild.test", "1.2.3.4"}
    assert world.ca.count("POST", "/new-order") == 2


def test_mending_the_row_mends_the_policy(world: World) -> None:
    """The bad name is taken out by raw SQL; the next reconcile sees it."""
    insert_policy(world, ["a..b", "good.test"])
    world.take_over()
    world.work()
    domains = '["good.test"]' if world.db.embedded else "{good.test}"
    world.execute("UPDATE tls_policies SET domains = :domains", domains=domains)

    world.take_over()

    assert world.policy_status(POLICY) == "active"


def test_two_policies_share_a_lineage(world: World) -> None:
    """One name, one certificate, however many policies want it; removing one never stops the other."""
    first, second = world.add_policy("a.test"), world.add_policy("a.test")
    world.take_over()
    world.work()
    assert len(world.ca.issued) == 1
    assert world.policy_status(first) == world.policy_status(second) == "active"

    world.db.write(lambda tx: policies.remove(tx, first))
    world.take_over()
    assert world.lineage("a.test").next_check_at is not None

    world.db.write(lambda tx: policies.remove(tx, second))
    world.take_over()
    assert world.lineage("a.test").next_check_at is None
    assert world.count("certificates") == 1


def test_a_removed_name_is_renewed_no_more(world: World) -> None:
    """Its certificate stays, and is served until it expires."""
    insert_policy(world, ["a.test", "b.test"])
    world.take_over()
    world.work()
    domains = '["b.test"]' if world.db.embedded else "{b.test}"
    world.execute("UPDATE tls_policies SET domains = :domains", domains=domains)
    world.take_over()
    world.clock.move(timedelta(days=80))
    world.take_over()
    world.work()

    assert [issued.dns_names for issued in world.ca.issued][2:] == [{"b.test"}]
    assert world.count("certificates") == 2


def test_a_paused_policy_rests_and_goes_on_when_resumed(world: World) -> None:
    """Nothing is ordered while it is paused; at its resumption what is due is due at once."""
    policy_id = world.add_policy("a.test")
    now = world.clock()
    world.db.write(lambda tx: policies.set_paused(tx, policy_id, now, now))
    world.take_over()
    world.work()
    assert world.count("issuances") == 0

    world.db.write(lambda tx: policies.set_paused(tx, policy_id, None, now))
    world.take_over()
    world.work()
    assert world.policy_status(policy_id) == "active"


def test_pausing_cancels_what_is_queued_but_not_what_is_ordered(world: World) -> None:
    """A queued issuance nobody wants any more is closed without a request to the CA."""
    policy_id = world.add_policy("a.test")
    world.take_over()
    now = world.clock()
    world.db.write(lambda tx: policies.set_paused(tx, policy_id, now, now))

    world.take_over()

    assert world.last_issuance("a.test").state == State.CANCELLED
    assert world.ca.requests == []


def test_another_issuer_makes_another_lineage(world: World) -> None:
    """A changed profile is taken over at the next reconcile; the old certificate serves on meanwhile."""
    world.ca.profiles = {"short": timedelta(days=6)}
    insert_policy(world, ["a.test"])
    world.take_over()
    world.work()
    assert world.policy_status(POLICY) == "active"

    world.wanted = replace(world.wanted, issuer=Issuer(world.ca.directory_url, "short", "ecdsa-p256"))
    world.take_over()
    assert world.policy_status(POLICY) == "pending"
    world.work()

    assert world.policy_status(POLICY) == "active"
    assert [issued.profile for issued in world.ca.issued] == [None, "short"]
    assert world.count("certificates") == 2


def test_reconcile_costs_nothing_when_nothing_changed(world: World) -> None:
    """No notes, no work: our own writes leave none behind."""
    world.issue("a.test")
    assert reconcile(world.db, world.clock, world.wanted, world.sealer) <= 1

    assert reconcile(world.db, world.clock, world.wanted, world.sealer) == 0
    assert world.rows("SELECT count(*) FROM changes WHERE topic <> 'gateway'") == [(0,)]


def test_the_first_look_takes_each_row_once(world: World) -> None:
    """All of them are noted; a sweep on top would double the work of a start."""
    for number in range(3):
        world.add_policy(f"n{number}.test")

    assert reconcile(world.db, world.clock, world.wanted, world.sealer) == 3
    assert reconcile(world.db, world.clock, world.wanted, world.sealer) == 0


def test_what_was_taken_over_does_not_wait_for_the_rest(world: World) -> None:
    """Thousands may be new: what the first of them want is queued while the others are still noted."""
    for number in range(450):
        world.add_policy(f"n{number}.test")
    left: list[int] = []

    reconcile(world.db, world.clock, world.wanted, world.sealer, taken=lambda: left.append(world.count("changes")))

    assert left == [250, 50, 0]


def test_the_sweep_finds_what_no_note_tells(world: World) -> None:
    """A lineage that lost its place in the scan is found within the hour."""
    world.issue("a.test")
    world.execute("UPDATE lineages SET next_check_at = NULL")
    world.clock.move(SWEEP)

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    assert world.lineage("a.test").next_check_at is not None


def test_a_foreign_certificate_is_described_and_sealed(world: World) -> None:
    """A pair that another program stored as plain PEM gets a revision, names and a sealed key."""
    chain_pem, key_pem = pair_of(world, "m.test")
    world.execute("DELETE FROM certificates")
    insert_policy(world, ["m.test"], mode="manual")
    insert_certificate(world, chain_pem, key_pem)

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    row = world.db.read(lambda tx: certificates.find(tx, CERTIFICATE))
    assert row is not None
    assert row.dns_names == ["m.test"]
    assert row.revision is not None
    assert row.key_pem.startswith("cw1.")
    assert world.policy_status(POLICY) == "active"


@pytest.mark.parametrize("fault", ["key", "chain"])
def test_a_foreign_certificate_that_cannot_be_served_is_an_error(world: World, fault: str) -> None:
    """Flipped to `error` with the reason in the audit log; the manual policy that wants it too."""
    chain_pem, key_pem = pair_of(world, "m.test")
    other_chain, other_key = pair_of(world, "n.test")
    world.execute("DELETE FROM certificates")
    insert_policy(world, ["m.test"], mode="manual")
    insert_certificate(world, "garbage" if fault == "chain" else other_chain, key_pem)
    assert other_key != key_pem
    assert chain_pem != other_chain

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    assert world.rows(f"SELECT status FROM certificates WHERE id = '{CERTIFICATE}'") == [("error",)]
    assert world.policy_status(POLICY) == "error"
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.error'") == [(1,)]


def test_an_upload_that_is_not_valid_yet_serves_when_it_is(world: World) -> None:
    """It must not take over from one that visitors accept; until then it is an error with the date."""
    chain_pem, key_pem = pair_of(world, "m.test")
    world.execute("DELETE FROM certificates")
    insert_policy(world, ["m.test"], mode="manual")
    insert_certificate(world, chain_pem, key_pem)
    start = read_leaf(chain_pem).validity.not_before
    world.clock.now = start - timedelta(days=3)
    world.take_over()
    (reason,) = [row[0] for row in world.rows("SELECT diff FROM audit_logs WHERE action = 'certificate.error'")]
    assert "served from then on" in str(reason)
    assert world.policy_status(POLICY) == "error"
    world.take_over()

    world.clock.now = start + timedelta(minutes=1)
    expire(world.db, world.clock)
    world.take_over()

    assert world.rows(f"SELECT status FROM certificates WHERE id = '{CERTIFICATE}'") == [("active",)]
    assert world.policy_status(POLICY) == "active"


def test_an_upload_whose_chain_is_out_of_order_is_an_error(world: World) -> None:
    """Some clients would fail with it."""
    chain_pem, key_pem = pair_of(world, "m.test")
    stranger, _ = pair_of(world, "n.test")
    world.execute("DELETE FROM certificates")
    insert_certificate(world, chain_pem + stranger, key_pem)

    world.take_over()

    assert world.rows(f"SELECT status FROM certificates WHERE id = '{CERTIFICATE}'") == [("error",)]


def test_a_deleted_certificate_is_issued_again_and_leaves_a_tombstone(world: World) -> None:
    """Nodes are told to drop it, and the policy that still wants it gets a new one."""
    lineage = world.issue("a.test")
    world.execute("DELETE FROM certificates")

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    assert world.rows("SELECT certificate_id FROM removed_certificates") != []
    assert world.lineage("a.test").status == "pending"
    scan(world.db, world.clock)
    world.work()
    assert len(world.ca.issued) == 2
    assert world.lineage("a.test").certificate_id != lineage.certificate_id


def test_a_changed_wish_reaches_the_nodes(world: World) -> None:
    """Who wants a certificate travels with it: a new or a removed policy gives it a new revision."""
    lineage = world.issue("a.test")
    before = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    insert_policy(world, ["a.test"])
    reconcile(world.db, world.clock, world.wanted, world.sealer)
    after = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))

    assert before is not None
    assert after is not None
    assert (after.revision or 0) > (before.revision or 0)
    assert after.fingerprint == before.fingerprint


def certificate_of(world: World, dns_name: str) -> certificates.StoredCertificate:
    lineage = world.lineage(dns_name)
    row = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    assert row is not None
    return row


@pytest.mark.parametrize("how", ["key", "status"])
def test_a_spoiled_certificate_of_ours_is_replaced(world: World, how: str) -> None:
    """Its key was overwritten, or another program says it is revoked: error, and a new one at once."""
    insert_policy(world, ["a.test"])
    world.take_over()
    world.work()
    before = certificate_of(world, "a.test")
    if how == "key":
        world.execute("UPDATE certificates SET key_pem = 'garbage'")
    else:
        world.execute("UPDATE certificates SET status = 'error'")

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    assert certificate_of(world, "a.test").status == "error"
    assert world.policy_status(POLICY) == "error"
    scan(world.db, world.clock)
    world.work()
    after = certificate_of(world, "a.test")
    assert (after.id, after.status) == (before.id, "active")
    assert after.fingerprint != before.fingerprint
    assert world.policy_status(POLICY) == "active"


def test_every_flip_of_a_foreign_certificate_is_in_the_audit_log(world: World) -> None:
    """Stored as active, found to be expired: said so, with the reason."""
    chain_pem, key_pem = pair_of(world, "m.test")
    world.execute("DELETE FROM certificates")
    world.clock.move(timedelta(days=100))
    insert_certificate(world, chain_pem, key_pem)

    reconcile(world.db, world.clock, world.wanted, world.sealer)

    assert world.rows(f"SELECT status FROM certificates WHERE id = '{CERTIFICATE}'") == [("expired",)]
    assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'certificate.expired'") == [(1,)]


def test_an_upload_serves_all_the_names_it_has(world: World) -> None:
    """A manual policy is active when an upload has its names, filed under whichever; and pending when it is deleted."""
    world.add_policy("m.test", "n.test", shared=True)
    world.take_over()
    world.work()
    row = certificate_of(world, "m.test")
    key_pem = world.sealer.open(row.key_pem, table="certificates", column="key_pem", row_id=row.id)
    world.execute("DELETE FROM certificates")
    insert_policy(world, ["m.test", "n.test"], mode="manual")
    insert_certificate(world, row.cert_pem, key_pem)
    world.take_over()
    assert world.policy_status(POLICY) == "active"

    world.execute(f"DELETE FROM certificates WHERE id = '{CERTIFICATE}'")
    world.take_over()
    assert world.policy_status(POLICY) == "pending"


def test_a_row_that_cannot_be_read_holds_up_no_other(sqlite_db: Database) -> None:
    """Whatever is strange about it (PostgreSQL refuses these two): it is set aside, and the next one is taken."""
    world = World(sqlite_db)
    insert_policy(world, ["\ud800.test"], mode="manual")
    good = world.add_policy("good.test")
    chain_pem, key_pem = pair_of(world, "m.test")
    world.execute("DELETE FROM certificates WHERE domain = 'm.test'")
    insert_certificate(world, chain_pem, key_pem)
    world.execute("UPDATE certificates SET key_pem = CAST(key_pem AS BLOB)")

    world.take_over()
    world.work()

    assert world.policy_status(good) == "active"
    assert world.rows(f"SELECT status FROM certificates WHERE id = '{CERTIFICATE}'") == [("error",)]
    assert world.policy_status(POLICY) == "error"


def test_a_page_of_policies_costs_few_statements(world: World) -> None:
    """Whatever number of them: 200 here, in one transaction."""
    ids = [world.add_policy(f"n{number}.test") for number in range(200)]
    with statements(world.db) as sent:
        assert reconcile(world.db, world.clock, world.wanted, world.sealer) == 200

    assert len(sent) <= 40
    assert {world.policy_status(policy_id) for policy_id in ids} == {"pending"}
    assert world.rows("SELECT count(*) FROM lineages WHERE next_check_at IS NOT NULL") == [(200,)]


def test_a_look_at_nothing_writes_nothing(world: World) -> None:
    """It is taken every second, and on SQLite whoever writes waits for each other."""
    world.issue("a.test")
    reconcile(world.db, world.clock, world.wanted, world.sealer)
    with statements(world.db) as sent:
        assert reconcile(world.db, world.clock, world.wanted, world.sealer) == 0

    assert len(sent) <= 4
    assert all(one.startswith("SELECT") and "FOR UPDATE" not in one for one in sent)


def test_a_page_ends_where_it_would_lock_too_much(world: World) -> None:
    """Policies of many names are taken in transactions of their own."""
    for policy in range(3):
        world.add_policy(*[f"n{number}.p{policy}.test" for number in range(1500)])
    world.add_policy("last.test")
    left: list[int] = []

    reconcile(world.db, world.clock, world.wanted, world.sealer, taken=lambda: left.append(world.count("changes")))

    assert left == [3, 2, 0]


def test_a_policy_that_changes_meanwhile_is_taken_again(postgresql_db: Database, second: Database) -> None:
    """It was read before it was locked; the others of its page are not held up."""
    world = World(postgresql_db)
    insert_policy(world, ["a.test"])
    other = world.add_policy("other.test")

    locking: list[str] = []

    def change(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT lineages") and "FOR UPDATE" in statement and not locking:
            locking.append(statement)
            World(second).execute("UPDATE tls_policies SET domains = '{b.test}' WHERE id = :id", id=POLICY)

    event.listen(world.db.engine, "before_cursor_execute", change)
    looks: list[str] = []
    reconcile(world.db, world.clock, world.wanted, world.sealer, taken=lambda: looks.append(world.policy_status(other)))

    assert world.lineage("a.test").next_check_at is None
    assert world.lineage("b.test").next_check_at is not None
    assert world.lineage("other.test").next_check_at is not None
    assert len(looks) == 2


@pytest.fixture
def second(postgresql_db: Database) -> Iterator[Database]:
    """The same database with connections of its own."""
    second = open_database(url_of(postgresql_db))
    yield second
    second.close()
