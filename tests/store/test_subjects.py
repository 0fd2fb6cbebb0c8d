"""The other subjects of the store: policies, lineages, certificates, accounts, versions, nodes, workers, gateway."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier, Event
from typing import Any

import pytest
from sqlalchemy import Connection, delete, literal, select, update

from certworker.core.certificate import Leaf, Validity
from certworker.core.rollout import Cursor, Heartbeat
from certworker.errors import StoreError
from certworker.store import (
    accounts,
    audit,
    certificates,
    changes,
    counters,
    gateway,
    issuances,
    lineages,
    nodes,
    policies,
    report,
    settings_kv,
    versions,
    workers,
)
from certworker.store.certificates import Activation
from certworker.store.database import Database
from certworker.store.lineages import NewCertificate
from certworker.store.rows import new_id
from certworker.store.seal import Sealer
from certworker.store.tables import acme_accounts, audit_logs, node_status, policy_lineages
from certworker.store.tables import certificates as certificate_rows
from certworker.store.tables import lineages as lineage_rows
from certworker.store.tables import workers as worker_rows
from certworker.store.types import seconds_from_now
from certworker.store.versions import Version

from .conftest import ISSUER, NOW, add_lineage
from .given import ACCOUNT, CERTIFICATE, INSERTS, LISTENER, POLICY, POOL, ROUTE, TARGET, VERSION, Program
from .plans import explain, statements, wait_for_waiting

DAY = timedelta(days=1)
PLAIN = Sealer(None, sealing=False)
DIRECTORY = "https://ca.test/dir"


def leaf_of(name: str = "a.test", serial: str = "01") -> Leaf:
    """A leaf that is valid for 90 days from NOW on."""
    return Leaf((name,), True, Validity(NOW, NOW + 90 * DAY), serial * 32, serial, "Test CA", "00" * 32)


def activate(db: Database, lineage_id: str, serial: str = "01", name: str = "a.test") -> str:
    """Let a lineage serve a leaf, as the step does, and return the certificate's id."""

    def write(tx: Connection) -> str:
        before = certificates.of_lineages(tx, [lineage_id]).get(lineage_id)
        certificate_id, leaf = before.id if before else new_id(), leaf_of(name, serial)
        lineage = lineages.find_all(tx, [lineage_id])[lineage_id]
        new = NewCertificate(lineage, certificate_id, new_id(), leaf, leaf.validity, NOW + 60 * DAY)
        flips = lineages.record_certificates(tx, [new], NOW)
        serving = Activation(certificate_id, before, lineage_id, name, "chain", "key", leaf)
        certificates.activate_all(tx, [serving], flips, NOW)
        return certificate_id

    return db.write(write)


def one(value: Any) -> Any:
    assert value is not None
    return value


def flips(db: Database) -> list[tuple[str, Any, Any]]:
    rows = db.read(lambda tx: tx.execute(select(audit_logs).order_by(audit_logs.c.created_at)).all())
    assert {row.actor for row in rows} <= {"certworker"}
    return [(row.action, row.diff["before"], row.diff["after"]) for row in rows]


def together(*acts: Callable[[], Any]) -> list[Any]:
    """Run the acts in threads of their own and return their results."""
    with ThreadPoolExecutor(len(acts)) as threads:
        return [running.result() for running in [threads.submit(act) for act in acts]]


# -- policies -----------------------------------------------------------------------------------------


def test_a_name_is_found_exactly(db: Database) -> None:
    """By the whole name, never by a part of it or by a pattern."""
    ids = [db.write(lambda tx, n=n: policies.add(tx, n, NOW)) for n in (["a.test", "b.test"], ["b.test"], ["xa.test"])]

    def wanting(name: str) -> set[str]:
        return {policy.id for policy in db.read(lambda tx: policies.wanting(tx, name))}

    assert wanting("a.test") == {ids[0]}
    assert wanting("b.test") == {ids[0], ids[1]}
    for name in ("a", "test", "%", "_.test", "A.test", "", '"a.test"', "{a.test}"):
        assert wanting(name) == set(), name


def test_a_name_is_found_by_index(postgresql_db: Database) -> None:
    """The given GIN index, whatever the number of policies."""
    plan = explain(postgresql_db, lambda tx: policies.wanting(tx, "a.test"))
    of_many = explain(postgresql_db, lambda tx: gateway.policies_naming(tx, ["a.test", "b.test"]))

    assert "tls_policies_domains_idx" in plan
    assert "tls_policies_domains_idx" in of_many


def test_policies_come_in_pages(db: Database) -> None:
    """By id, each once."""
    ids = sorted(db.write(lambda tx: policies.add(tx, ["a.test"], NOW)) for _ in range(5))

    seen, after = [], ""
    while page := db.read(lambda tx, after=after: policies.list_all(tx, after=after, limit=2)):
        seen += [policy.id for policy in page]
        after = seen[-1]
    assert seen == ids


STATUSES: dict[tuple[str, ...], str] = {
    ("active",): "active",
    ("active", "active"): "active",
    ("pending",): "pending",
    ("active", "pending"): "pending",
    ("error",): "error",
    ("active", "error"): "error",
    ("pending", "error", "active"): "error",
}


@pytest.mark.parametrize("stand", STATUSES)
def test_a_policy_stands_as_its_worst_name(db: Database, stand: tuple[str, ...]) -> None:
    """`error` before `pending` before `active`; one audit row per flip, none for no flip."""
    names = [f"{number}.test" for number in range(len(stand))]
    policy_id = db.write(lambda tx: policies.add(tx, names, NOW))

    def link(tx: Connection) -> None:
        ids = [add_lineage(tx, [name]) for name in names]
        lineages.link(tx, {policy_id: ids})
        for lineage_id, status in zip(ids, stand, strict=True):
            lineages.record_status(tx, lineage_id, status, NOW)

    db.write(link)

    wanted = STATUSES[stand]
    assert one(db.read(lambda tx: policies.find(tx, policy_id))).status == wanted
    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) == wanted
    logged = flips(db)
    if wanted == "pending":
        assert logged == [] or logged[-1][0] == "policy.pending"
    else:
        assert logged[-1][0] == f"policy.{wanted}"
        assert logged[-1][2]["status"] == wanted
    count = len(logged)
    db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW))
    assert len(flips(db)) == count


def test_many_policies_are_brought_up_to_date_together(db: Database) -> None:
    """In as many statements as one of them: locked, judged and set, and told."""
    names = [f"{number}.test" for number in range(20)]
    ids = [db.write(lambda tx, name=name: policies.add(tx, [name], NOW)) for name in names]
    manual = db.write(lambda tx: policies.add(tx, ["m.test"], NOW, mode="manual"))
    for policy_id, name in zip(ids, names, strict=True):
        db.write(lambda tx, p=policy_id, n=name: lineages.link(tx, {p: [add_lineage(tx, [n])]}))
    failed = db.read(lambda tx: lineages.naming(tx, names[0]))[0].id
    db.write(lambda tx: tx.execute(update(policy_lineages).values(lineage_status="active")))
    with statements(db) as sent:
        db.write(lambda tx: policies.refresh_statuses(tx, ids[1:], NOW))
    assert len(sent) == 3

    fail = update(policy_lineages).where(policy_lineages.c.lineage_id == failed).values(lineage_status="error")
    db.write(lambda tx: tx.execute(fail))
    found = db.write(lambda tx: policies.refresh_statuses(tx, [*ids, manual, new_id(), ids[0]], NOW))

    assert found == {**dict.fromkeys(ids, "active"), ids[0]: "error", manual: "pending"}
    assert sorted(action for action, _, _ in flips(db)) == ["policy.active"] * 19 + ["policy.error"]


def test_a_refused_name_is_an_error_whatever_serves(db: Database, lineage_id: str) -> None:
    """The audit row gives the reason."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test", "a..b"], NOW))
    db.write(lambda tx: lineages.link(tx, {policy_id: [lineage_id]}))
    db.write(lambda tx: lineages.record_status(tx, lineage_id, "active", NOW))
    refused = [{"value": "a..b", "rule": "an empty label"}]
    db.write(lambda tx: policies.record_refused(tx, {policy_id: refused}, NOW))

    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) == "error"
    assert flips(db)[-1] == ("policy.error", {"status": "active"}, {"status": "error", "reason": refused})
    db.write(lambda tx: policies.record_refused(tx, {policy_id: []}, NOW))
    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) == "active"


def test_a_failed_renewal_leaves_its_policy_active(db: Database, lineage_id: str) -> None:
    """While a valid certificate serves; a failed first issuance does not."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test"], NOW))
    db.write(lambda tx: lineages.link(tx, {policy_id: [lineage_id]}))
    error = {"class": "validation", "type": "x", "detail": "y"}

    def fail(tx: Connection) -> None:
        lineages.record_failure(tx, lineage_id, error, failures=1, next_check_at=NOW + DAY, now=NOW)

    db.write(fail)
    assert one(db.read(lambda tx: policies.find(tx, policy_id))).status == "error"
    assert flips(db)[-1][2]["reason"] == [{"names": ["a.test"], "error": error}]
    activate(db, lineage_id)
    db.write(fail)
    assert one(db.read(lambda tx: policies.find(tx, policy_id))).status == "active"
    assert one(db.read(lambda tx: lineages.find(tx, lineage_id))).error == error


@pytest.mark.parametrize(
    ("held", "status"),
    [({}, "pending"), ({"a.test": "active"}, "pending"), ({"a.test": "active", "b.test": "active"}, "active"),
     ({"a.test": "active", "b.test": "expired"}, "error"), ({"b.test": "error"}, "error")],
)  # fmt: skip
def test_a_manual_policy_stands_as_its_uploaded_certificates(
    db: Database, program: Program, held: dict[str, str], status: str
) -> None:
    """Nothing is issued for it, so they are looked at themselves."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test", "b.test"], NOW, mode="manual"))
    for name, stands in held.items():
        row = INSERTS["certificates"].replace(CERTIFICATE, new_id()).replace("m.test", name)
        program(row.replace("'active'", f"'{stands}'"))

    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) == status


def test_a_manual_policy_may_name_more_than_a_statement_can_hold(db: Database) -> None:
    """A list that another program wrote stops nothing, however long."""
    names = [f"{number}.test" for number in range(70_000)]
    policy_id = db.write(lambda tx: policies.add(tx, names, NOW, mode="manual"))

    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) == "pending"


def test_a_policy_that_is_gone_has_no_status(db: Database) -> None:
    """Removing it says whether it was there."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test"], NOW))

    assert db.write(lambda tx: policies.remove(tx, policy_id))
    assert not db.write(lambda tx: policies.remove(tx, policy_id))
    assert db.write(lambda tx: policies.refresh_status(tx, policy_id, NOW)) is None


# -- lineages -----------------------------------------------------------------------------------------


def test_a_lineage_is_made_once_per_names_and_issuer(db: Database) -> None:
    """Order and repetition of names do not matter; CA, profile and key type do."""

    def find(names: list[str], issuer: lineages.Issuer = ISSUER) -> str:
        return db.write(lambda tx: add_lineage(tx, names, issuer))

    same = find(["b.test", "a.test"])
    assert find(["a.test", "b.test", "a.test"]) == same
    assert one(db.read(lambda tx: lineages.find(tx, same))).dns_names == ["a.test", "b.test"]
    others = {
        find(["a.test"]),
        find(["a.test", "b.test"], lineages.Issuer("https://other.test/dir", "", "ecdsa-p256")),
        find(["a.test", "b.test"], lineages.Issuer(DIRECTORY, "shortlived", "ecdsa-p256")),
        find(["a.test", "b.test"], lineages.Issuer(DIRECTORY, "", "rsa-2048")),
    }
    assert len(others | {same}) == 5
    assert len(db.read(lambda tx: lineages.naming(tx, "b.test"))) == 4


def test_two_workers_that_find_a_new_name_make_one_lineage(postgresql_db: Database) -> None:
    """The second waits for the first one's commit and takes its lineage."""
    inserted, ids = Event(), []

    def first(tx: Connection) -> None:
        ids.append(add_lineage(tx, ["a.test"]))
        inserted.set()
        _await_a_waiting_session(postgresql_db)

    def second() -> None:
        assert inserted.wait(10)
        ids.append(postgresql_db.write(lambda tx: add_lineage(tx, ["a.test"])))

    together(lambda: postgresql_db.write(first), second)

    assert ids[0] == ids[1]


def _await_a_waiting_session(db: Database) -> None:
    """Return when another session of this database waits for a lock."""
    program = Program(db)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    for _ in range(10_000):
        if program(waiting) != [(0,)]:
            break
    else:
        pytest.fail("nobody waits")
    program.close()


def test_linking_says_what_changed(db: Database) -> None:
    """What was added and what was taken away; the copy of the status comes along."""
    a, b, c = (db.write(lambda tx, n=n: add_lineage(tx, [n])) for n in ("a", "b", "c"))
    policy_id = db.write(lambda tx: policies.add(tx, ["a", "b", "c"], NOW))
    db.write(lambda tx: lineages.record_status(tx, b, "error", NOW))

    assert db.write(lambda tx: lineages.link(tx, {policy_id: [a, b]})) == {a, b}
    assert db.write(lambda tx: lineages.link(tx, {policy_id: [b, a]})) == set()
    assert db.write(lambda tx: lineages.link(tx, {policy_id: [b, c]})) == {a, c}
    assert {lineage.id for lineage in db.read(lambda tx: lineages.of_policy(tx, policy_id))} == {b, c}
    copies = select(policy_lineages.c.lineage_id, policy_lineages.c.lineage_status)
    assert dict(db.read(lambda tx: tx.execute(copies).all())) == {b: "error", c: "pending"}
    assert db.read(lambda tx: lineages.policy_ids(tx, b)) == [policy_id]


def test_a_lineage_is_wanted_by_an_unpaused_automatic_policy(db: Database, lineage_id: str) -> None:
    """One of several is enough."""
    auto = db.write(lambda tx: policies.add(tx, ["a.test"], NOW))
    manual = db.write(lambda tx: policies.add(tx, ["a.test"], NOW, mode="manual"))

    def wanted() -> bool:
        listed = [lineage.id for lineage in db.read(lineages.list_wanted)]
        assert (lineage_id in listed) == db.read(lambda tx: lineages.is_wanted(tx, lineage_id))
        return bool(listed)

    assert not wanted()
    db.write(lambda tx: lineages.link(tx, {manual: [lineage_id]}))
    assert not wanted()
    db.write(lambda tx: lineages.link(tx, {auto: [lineage_id]}))
    assert wanted()
    db.write(lambda tx: policies.set_paused(tx, auto, NOW, NOW))
    assert not wanted()
    db.write(lambda tx: policies.set_paused(tx, auto, None, NOW))
    assert wanted()


def test_what_is_due_comes_longest_first_and_no_more_than_asked(db: Database) -> None:
    """Nothing before its time, nothing without one."""
    ids = [db.write(lambda tx, n=n: add_lineage(tx, [f"{n}.test"])) for n in range(5)]
    for lineage_id, hours in zip(ids, (-1, -3, -2, 1), strict=False):
        at = NOW + timedelta(hours=hours)
        db.write(lambda tx, i=lineage_id, at=at: lineages.set_next_check(tx, i, at, NOW))

    assert [found.id for found in db.write(lambda tx: lineages.due(tx, NOW, 10))] == [ids[1], ids[2], ids[0]]
    assert [found.id for found in db.write(lambda tx: lineages.due(tx, NOW, 1))] == [ids[1]]
    assert [found.id for found in db.read(lambda tx: lineages.peek_due(tx, NOW))] == [ids[1], ids[2], ids[0]]


def test_a_scan_costs_what_is_due(db: Database) -> None:
    """By the partial index, on both; so does the search for what is not proved to be served."""
    assert "ix_lineages_due" in explain(db, lambda tx: lineages.due(tx, NOW, 5))
    assert "ix_lineages_due" in explain(db, lambda tx: lineages.peek_due(tx, NOW))
    assert "ix_lineages_unserved" in explain(db, lambda tx: lineages.unserved(tx, "", 5))
    assert "ix_certificates_active" in explain(db, lambda tx: certificates.expired(tx, NOW, 5))


def test_a_policys_status_is_one_look_up_whatever_it_wants(db: Database) -> None:
    """By the partial index, though thousands of its names may lack a certificate; many policies at once too."""
    ids = [db.write(lambda tx: policies.add(tx, ["a.test"], NOW)) for _ in range(3)]

    plan = explain(db, lambda tx: policies.refresh_statuses(tx, ids, NOW), "UPDATE")

    assert "ix_policy_lineages_lacking" in plan
    assert "SCAN" not in plan.replace("SCAN json_each", "")
    assert "Hash" not in plan


def test_what_a_scan_has_locked_another_one_skips(postgresql_db: Database) -> None:
    """Two workers share what is due, and neither waits."""
    ids = [postgresql_db.write(lambda tx, n=n: add_lineage(tx, [n])) for n in ("a", "b")]
    for lineage_id in ids:
        postgresql_db.write(lambda tx, i=lineage_id: lineages.set_next_check(tx, i, NOW, NOW))

    def scan(tx: Connection) -> set[str]:
        mine = {found.id for found in lineages.due(tx, NOW, 1)}
        theirs = {found.id for found in postgresql_db.write(lambda tx: lineages.due(tx, NOW, 2))}
        assert not mine & theirs
        return mine | theirs

    assert postgresql_db.write(scan) == set(ids)


def test_a_certificate_is_served_when_it_is_proved_to_be(db: Database, lineage_id: str) -> None:
    """A renewal that came meanwhile is to be proved anew."""
    activate(db, lineage_id)
    (first,) = db.read(lambda tx: lineages.unserved(tx, "", 5))
    assert (first.lineage_id, first.revision) == (lineage_id, 1)
    assert db.read(lambda tx: lineages.unserved(tx, lineage_id, 5)) == []
    activate(db, lineage_id, "02")

    db.write(lambda tx: lineages.record_served(tx, [first], NOW))
    (second,) = db.read(lambda tx: lineages.unserved(tx, "", 5))
    db.write(lambda tx: lineages.record_served(tx, [second], NOW))

    assert (second.revision, second.fingerprint) == (2, "02" * 32)
    assert db.read(lambda tx: lineages.unserved(tx, "", 5)) == []
    assert one(db.read(lambda tx: lineages.find(tx, lineage_id))).served_at == NOW


def test_a_lineage_forgets_a_certificate_that_is_gone(db: Database, lineage_id: str) -> None:
    """Its policies wait again."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test"], NOW))
    db.write(lambda tx: lineages.link(tx, {policy_id: [lineage_id]}))
    certificate_id = activate(db, lineage_id)
    assert db.read(lambda tx: lineages.having_certificate(tx, certificate_id)) == lineage_id

    db.write(lambda tx: lineages.forget_certificate(tx, lineage_id, NOW))

    lineage = one(db.read(lambda tx: lineages.find(tx, lineage_id)))
    assert (lineage.status, lineage.certificate_id, lineage.validity) == ("pending", None, None)
    assert one(db.read(lambda tx: policies.find(tx, policy_id))).status == "pending"


def test_names_go_with_their_lineage(db: Database, lineage_id: str) -> None:
    """Nothing of a deleted lineage is left in our tables."""
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    db.write(lambda tx: lineages.link(tx, {POLICY: [lineage_id]}))

    db.write(lambda tx: tx.execute(delete(lineage_rows)))

    assert db.read(lambda tx: lineages.naming(tx, "a.test")) == []
    assert db.read(lambda tx: lineages.policy_ids(tx, lineage_id)) == []
    assert db.read(lambda tx: issuances.history(tx, lineage_id)) == []


# -- certificates and revisions -----------------------------------------------------------------------


def test_a_renewal_takes_the_row_of_the_certificate_before(db: Database, lineage_id: str) -> None:
    """One row per lineage, a new revision each time, an audit row each time."""
    first = activate(db, lineage_id, "01")
    second = activate(db, lineage_id, "02")

    assert second == first
    row = one(db.read(lambda tx: certificates.find_of_lineage(tx, lineage_id)))
    assert (row.id, row.serial, row.revision, row.status) == (first, "02", 2, "active")
    assert [(action, after["serial"]) for action, _, after in flips(db)] == [
        ("certificate.active", "01"), ("certificate.active", "02")
    ]  # fmt: skip
    assert "key" not in str(flips(db))
    assert not db.read(lambda tx: changes.pending(tx, changes.CERTIFICATE))


def test_every_change_of_a_certificate_has_a_revision(db: Database, lineage_id: str) -> None:
    """Nodes ask for what is newer than theirs, in order, and for what was removed."""
    a = activate(db, lineage_id)
    other = db.write(lambda tx: add_lineage(tx, ["b.test"]))
    b = activate(db, other, "02", "b.test")
    stored = one(db.read(lambda tx: certificates.find(tx, a)))
    db.write(lambda tx: certificates.flip(tx, stored, "error", "revoked", NOW))
    db.write(lambda tx: certificates.describe(tx, b, leaf_of("b.test", "03"), "key", NOW))
    db.write(lambda tx: certificates.record_removed(tx, CERTIFICATE, NOW))

    def since(revision: int, limit: int = 10) -> list[tuple[str, int | None]]:
        return [(c.id, c.revision) for c in db.read(lambda tx: certificates.changed_since(tx, revision, limit))]

    assert since(0) == [(a, 3), (b, 4)]
    assert since(0, 1) == [(a, 3)]
    assert since(3) == [(b, 4)]
    assert since(4) == []
    assert db.read(lambda tx: certificates.removed_between(tx, 4, 5)) == [CERTIFICATE]
    assert db.read(lambda tx: certificates.removed_between(tx, 5, 9)) == []
    assert db.read(lambda tx: certificates.removed_between(tx, 0, 4)) == []
    assert flips(db)[-1][0] in ("certificate.error", "certificate.active")


def test_a_tombstone_is_renewed_and_forgotten(db: Database) -> None:
    """A certificate that is removed again has a newer one; old ones go."""
    db.write(lambda tx: certificates.record_removed(tx, CERTIFICATE, NOW))
    db.write(lambda tx: certificates.record_removed(tx, CERTIFICATE, NOW))
    assert db.read(lambda tx: certificates.removed_between(tx, 0, 2)) == [CERTIFICATE]

    assert db.write(lambda tx: certificates.forget_removed(tx, NOW)) == 0
    assert db.write(lambda tx: certificates.forget_removed(tx, NOW + DAY)) == 1


def test_only_active_certificates_expire(db: Database, program: Program) -> None:
    """Longest ended first, up to the limit; the end itself counts."""
    for number, (status, expires_at) in enumerate(
        [("active", NOW), ("active", NOW - DAY), ("expired", NOW - DAY), ("active", NOW + DAY)]
    ):
        program(INSERTS["certificates"].replace(CERTIFICATE, f"{number}" * 8 + CERTIFICATE[8:]))
        row = certificates.certificates.c.id == f"{number}" * 8 + CERTIFICATE[8:]
        change = update(certificates.certificates).where(row).values(status=status, expires_at=expires_at)
        db.write(lambda tx, change=change: tx.execute(change))

    assert [c.id[0] for c in db.write(lambda tx: certificates.expired(tx, NOW, 9))] == ["1", "0"]
    assert [c.id[0] for c in db.write(lambda tx: certificates.expired(tx, NOW, 1))] == ["1"]


def test_revisions_become_visible_in_their_order(postgresql_db: Database) -> None:
    """The second writer waits for the first one's commit, so that whoever has read R misses nothing before R."""
    raised, order = Event(), []

    def first(tx: Connection) -> None:
        assert counters.next_value(tx, counters.REVISION) == 1
        raised.set()
        _await_a_waiting_session(postgresql_db)
        order.append(1)

    def second() -> None:
        assert raised.wait(10)
        order.append(postgresql_db.write(lambda tx: counters.next_value(tx, counters.REVISION)))

    together(lambda: postgresql_db.write(first), second)

    assert order == [1, 2]


def test_a_sequence_would_show_the_later_one_first(postgresql_db: Database) -> None:
    """Why a revision is no sequence: the second writer gets 2, commits, and is seen before 1 is."""
    program = Program(postgresql_db)
    program("CREATE SEQUENCE s")

    def first(tx: Connection) -> tuple[int, int]:
        mine = tx.exec_driver_sql("SELECT nextval('s')").scalar_one()
        theirs = postgresql_db.write(lambda tx: tx.exec_driver_sql("SELECT nextval('s')").scalar_one())
        return mine, theirs

    assert postgresql_db.write(first) == (1, 2)
    program.close()


def test_a_revision_of_a_write_that_failed_is_used_again(db: Database) -> None:
    """There are no gaps to wait for."""

    def fail(tx: Connection) -> None:
        counters.next_value(tx, counters.REVISION)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write(fail)
    assert db.write(lambda tx: counters.next_value(tx, counters.REVISION, steps=3)) == 3
    assert db.read(lambda tx: counters.value(tx, counters.EPOCH)) == 1


# -- accounts -----------------------------------------------------------------------------------------


def add_account(tx: Connection, key: str) -> None:
    accounts.add(tx, DIRECTORY, key, [], None, PLAIN, NOW)


def test_two_workers_that_make_an_account_end_up_with_one(postgresql_db: Database) -> None:
    """The second waits for the first one's commit and leaves it at that."""
    inserted = Event()

    def first(tx: Connection) -> None:
        add_account(tx, "first")
        inserted.set()
        _await_a_waiting_session(postgresql_db)

    def second() -> None:
        assert inserted.wait(10)
        postgresql_db.write(lambda tx: add_account(tx, "second"))

    together(lambda: postgresql_db.write(first), second)

    account = one(postgresql_db.read(lambda tx: accounts.find_default(tx, DIRECTORY)))
    assert account.open(account.key, PLAIN) == "first"
    assert postgresql_db.read(lambda tx: len(tx.execute(select(acme_accounts)).all())) == 1


def test_the_marked_account_is_used_else_the_oldest(db: Database, program: Program) -> None:
    """Another program's account counts: none is made beside it."""
    assert db.read(lambda tx: accounts.find_default(tx, DIRECTORY)) is None
    program(INSERTS["acme_accounts"])
    newer = INSERTS["acme_accounts"].replace(ACCOUNT, ROUTE).replace("2026", "2027")
    program(newer)
    db.write(lambda tx: add_account(tx, "ours"))
    assert one(db.read(lambda tx: accounts.find_default(tx, DIRECTORY))).id == ACCOUNT

    program(f"UPDATE acme_accounts SET is_default = true WHERE id = '{ROUTE}'")
    assert one(db.read(lambda tx: accounts.find_default(tx, DIRECTORY))).id == ROUTE
    assert db.read(lambda tx: accounts.find_default(tx, "https://other.test/dir")) is None


def test_a_registration_is_kept_beside_the_key(db: Database) -> None:
    """Whatever else is in the document stays."""
    db.write(lambda tx: accounts.add(tx, DIRECTORY, "pem", ["mailto:a@a.test"], "kid-1", PLAIN, NOW))
    account = one(db.read(lambda tx: accounts.find_default(tx, DIRECTORY)))
    assert account.account_url is None

    db.write(lambda tx: accounts.record_registered(tx, account.id, "https://ca.test/acct/1", NOW))
    db.write(lambda tx: accounts.record_registered(tx, account.id, "https://ca.test/acct/1", None))
    db.write(lambda tx: accounts.record_registered(tx, ROUTE, "https://ca.test/acct/2", None))

    kept = one(db.read(lambda tx: accounts.find(tx, account.id))).credentials_json
    assert kept == {"key": "pem", "account_url": "https://ca.test/acct/1", "contact": ["mailto:a@a.test"],
                    "tos_agreed_at": NOW.isoformat(), "eab_kid": "kid-1"}  # fmt: skip


# -- notes --------------------------------------------------------------------------------------------


def test_notes_are_taken_once_and_in_order(db: Database) -> None:
    """Per topic, repeated ones as one, and back again if the taker fails."""
    db.write(lambda tx: changes.note(tx, changes.POLICY, [POLICY, POOL, POLICY, ROUTE]))
    db.write(lambda tx: changes.note(tx, changes.GATEWAY, [LISTENER]))
    db.write(lambda tx: changes.note(tx, changes.GATEWAY, []))

    def take_and_fail(tx: Connection) -> None:
        assert changes.take(tx, changes.POLICY, 10) == [POLICY, POOL, ROUTE]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.write(take_and_fail)
    assert db.write(lambda tx: changes.take(tx, changes.POLICY, 3)) == [POLICY, POOL]
    assert db.write(lambda tx: changes.take(tx, changes.POLICY, 3)) == [ROUTE]
    assert db.write(lambda tx: changes.take(tx, changes.POLICY, 3)) == []
    assert db.read(lambda tx: changes.pending(tx, changes.GATEWAY))
    assert not db.read(lambda tx: changes.pending(tx, changes.POLICY))


def test_two_takers_share_the_notes(postgresql_db: Database) -> None:
    """What one holds the other skips."""
    postgresql_db.write(lambda tx: changes.note(tx, changes.POLICY, [POLICY, POOL]))

    def take(tx: Connection) -> list[str]:
        return [*changes.take(tx, changes.POLICY, 1), *postgresql_db.write(lambda tx: changes.take(tx, "policy", 5))]

    assert postgresql_db.write(take) == [POLICY, POOL]


def test_a_note_that_commits_late_is_found_late(postgresql_db: Database) -> None:
    """A watermark would have passed it by."""

    def write_slowly(tx: Connection) -> None:
        changes.note(tx, changes.POLICY, [POLICY])
        postgresql_db.write(lambda tx: changes.note(tx, changes.POLICY, [POOL]))
        assert postgresql_db.write(lambda tx: changes.take(tx, changes.POLICY, 5)) == [POOL]

    postgresql_db.write(write_slowly)

    assert postgresql_db.write(lambda tx: changes.take(tx, changes.POLICY, 5)) == [POLICY]


# -- versions -----------------------------------------------------------------------------------------


def publish(tx: Connection, document: dict[str, Any], digest: str, created_by: str) -> Version:
    return versions.publish(tx, versions.add_draft(tx, document, digest, created_by, NOW))


def test_one_version_is_published(db: Database) -> None:
    """The one before is archived; numbers grow."""
    assert db.read(versions.find_published) is None
    first = db.write(lambda tx: publish(tx, {"n": 1}, "d1", "alice"))
    second = db.write(lambda tx: publish(tx, {"n": 2}, "d2", "alice"))

    assert db.read(versions.find_published) == second
    assert (first.number, second.number) == (1, 2)
    program = Program(db)
    assert sorted(program("SELECT number, status FROM config_versions")) == [(1, "archived"), (2, "published")]
    program.close()


def test_two_publishers_publish_one_after_the_other(postgresql_db: Database) -> None:
    """Neither fails, and the one that came second has read what the first left."""
    postgresql_db.write(lambda tx: publish(tx, {}, "d0", "alice"))
    published, seen = Event(), []

    def first(tx: Connection) -> None:
        versions.lock(tx)
        publish(tx, {}, "d1", "alice")
        published.set()
        _await_a_waiting_session(postgresql_db)

    def second(tx: Connection) -> None:
        versions.lock(tx)
        seen.append(one(versions.find_published(tx)).digest)
        publish(tx, {}, "d2", "bob")

    def run_second() -> None:
        assert published.wait(10)
        postgresql_db.write(second)

    together(lambda: postgresql_db.write(first), run_second)

    assert seen == ["d1"]
    assert one(postgresql_db.read(versions.find_published)).digest == "d2"


def test_a_publisher_that_did_not_lock_first_is_held_up_too(postgresql_db: Database) -> None:
    """The number is the lock."""
    postgresql_db.write(lambda tx: publish(tx, {}, "d0", "alice"))
    published = Event()

    def first(tx: Connection) -> None:
        publish(tx, {}, "d1", "alice")
        published.set()
        _await_a_waiting_session(postgresql_db)

    def second() -> None:
        assert published.wait(10)
        postgresql_db.write(lambda tx: publish(tx, {}, "d2", "bob"))

    together(lambda: postgresql_db.write(first), second)

    assert one(postgresql_db.read(versions.find_published)).number == 3


# -- nodes and workers --------------------------------------------------------------------------------


def heartbeat(node_id: str, version_id: str | None = None, **values: Any) -> Heartbeat:
    return Heartbeat(node_id, version_id, None, Cursor(1, 7), "haproxy 2.6.12", **values)


def test_a_heartbeat_takes_the_place_of_the_one_before(db: Database) -> None:
    """One row per node, with the database's time."""
    version = db.write(lambda tx: publish(tx, {}, "d", "alice"))
    db.write(lambda tx: nodes.record(tx, heartbeat("edge-1", error="down")))
    db.write(lambda tx: nodes.record(tx, heartbeat("edge-2")))
    db.write(lambda tx: nodes.record(tx, heartbeat("edge-1", version.id, fingerprints={"c": "f"}, unserved={"d": "?"})))

    one_, two = db.read(nodes.list_all)
    assert (one_.node_id, one_.version_id, one_.revision, one_.error) == ("edge-1", version.id, 7, None)
    assert (one_.fingerprints, one_.unserved) == ({"c": "f"}, {"d": "?"})
    assert (two.node_id, two.fingerprints) == ("edge-2", {})


def test_a_heartbeat_may_name_a_version_that_is_gone(db: Database) -> None:
    """It is kept without it: a node must not fall silent because somebody deleted a row."""
    db.write(lambda tx: nodes.record(tx, heartbeat("edge-1", VERSION)))

    (node,) = db.read(nodes.list_all)
    assert node.version_id is None


def test_a_node_is_live_while_it_is_heard_of(db: Database) -> None:
    """By the database's time."""
    for node_id in ("edge-1", "edge-2"):
        db.write(lambda tx, node_id=node_id: nodes.record(tx, heartbeat(node_id)))
    silent = update(node_status).where(node_status.c.node_id == "edge-2")
    db.write(lambda tx: tx.execute(silent.values(heartbeat_at=seconds_from_now(literal(-61)))))

    assert [node.node_id for node in db.read(lambda tx: nodes.live(tx, timedelta(seconds=60)))] == ["edge-1"]
    assert len(db.read(lambda tx: nodes.live(tx, timedelta(seconds=600)))) == 2


@pytest.mark.parametrize(
    "metadata", ["NULL", "'[]'", "'{\"cursor\": 5}'", '\'{"cursor": {"revision": "x"}, "error": 5}\'']
)
def test_what_another_program_writes_of_a_node_is_read_with_care(db: Database, program: Program, metadata: str) -> None:
    """Whatever its shape: `status` shows the node all the same."""
    program(INSERTS["config_versions"])
    program(INSERTS["node_status"].replace("NULL", metadata))

    (node,) = db.read(nodes.list_all)
    assert (node.revision, node.fingerprints, node.unserved, node.error) == (0, {}, {}, None)


def test_workers_come_and_go(db: Database) -> None:
    """One that was not heard of for a minute is not counted on, and buried after ten."""
    for worker_id in (POLICY, POOL, ROUTE):
        db.write(lambda tx, i=worker_id: workers.enter(tx, i, "host", 1, "0.1"))
    for worker_id, seconds in ((POOL, -61), (ROUTE, -601)):
        row = update(worker_rows).where(worker_rows.c.id == worker_id)
        change = row.values(heartbeat_at=seconds_from_now(literal(seconds)))
        db.write(lambda tx, change=change: tx.execute(change))

    def there() -> set[str]:
        return set(db.read(lambda tx: tx.execute(select(worker_rows.c.id)).scalars().all()))

    assert [worker.id for worker in db.read(workers.alive)] == [POLICY]
    db.write(workers.bury)
    assert there() == {POLICY, POOL}
    db.write(lambda tx: workers.beat(tx, POOL))
    assert {worker.id for worker in db.read(workers.alive)} == {POLICY, POOL}
    db.write(lambda tx: workers.leave(tx, POOL))
    assert there() == {POLICY}
    db.write(lambda tx: workers.bury(tx, everybody=True))
    assert there() == set()


# -- small facts, audit, counts ---------------------------------------------------------------------


def test_a_fact_is_remembered_until_it_is_forgotten(db: Database) -> None:
    """The last word counts."""
    assert db.read(lambda tx: settings_kv.find(tx, "k")) is None
    for value in ("one", "two"):
        db.write(lambda tx, value=value: settings_kv.put(tx, "k", value))
    assert db.read(lambda tx: settings_kv.find(tx, "k")) == "two"
    db.write(lambda tx: settings_kv.forget(tx, "k"))
    assert db.read(lambda tx: settings_kv.find(tx, "k")) is None


def test_two_workers_may_remember_the_same_fact(db: Database, twin: Database) -> None:
    """Neither of them fails."""
    start = Barrier(4)

    def put(database: Database) -> None:
        start.wait()
        for number in range(10):
            database.write(lambda tx, n=number: settings_kv.put(tx, "k", f"{n}"))

    together(*(lambda d=d: put(d) for d in (db, twin, db, twin)))

    assert db.read(lambda tx: settings_kv.find(tx, "k")) == "9"


def test_the_newest_audit_row_comes_first(db: Database) -> None:
    """With who did it, and no more than asked for."""
    for minutes in range(3):
        at = NOW + timedelta(minutes=minutes)
        db.write(lambda tx, m=minutes, at=at: audit.record(tx, f"a{m}", {"n": m}, at, actor="alice"))

    assert [(row["action"], row["actor"]) for row in db.read(lambda tx: audit.newest(tx, 2))] == [
        ("a2", "alice"), ("a1", "alice")
    ]  # fmt: skip


def test_counts_and_rows_for_a_report(db: Database, lineage_id: str) -> None:
    """What `status` and the metrics show."""
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test"], NOW))
    db.write(lambda tx: lineages.link(tx, {policy_id: [lineage_id]}))
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    activate(db, lineage_id)

    assert db.read(report.counts) == {
        "certificates": {"active": 1}, "policies": {"active": 1}, "open_issuances": {"queued": 1}
    }  # fmt: skip
    certificate_id = db.read(lambda tx: tx.execute(select(certificate_rows.c.id)).scalar_one())
    for status in ("expired", "error"):
        db.write(lambda tx: certificates.set_status(tx, certificate_id, status, NOW))  # noqa: B023
        assert db.read(report.counts)["certificates"] == {status: 1}
    (row,) = db.read(report.lineage_rows)
    assert (row["id"], row["serial"], row["state"]) == (lineage_id, "01", "queued")
    assert db.read(lambda tx: report.lineage_rows(tx, "b.test")) == []
    assert len(db.read(lambda tx: report.lineage_rows(tx, "a.test"))) == 1


def test_certificates_and_open_issuances_are_counted_by_their_indexes(db: Database) -> None:
    """A row of a certificate is kilobytes, and closed issuances are the history of the fleet."""
    faults = explain(db, report.counts)
    all_of_them = explain(db, report.counts, before=1)
    under_way = explain(db, report.counts, before=3)
    by_an_index = "COVERING INDEX" if db.embedded else "ix_certificates_"

    assert [index for index in ("ix_certificates_expired", "ix_certificates_error") if index not in faults] == []
    assert by_an_index in all_of_them
    assert "ix_issuances_" in under_way or "uq_issuances_open" in under_way


# -- the gateway --------------------------------------------------------------------------------------


def document() -> dict[str, list[dict[str, Any]]]:
    return {
        "upstream_pools": [{"id": POOL, "name": "web", "policy": "round_robin", "health_check": {"type": "tcp"}}],
        "upstream_targets": [{"id": TARGET, "pool_id": POOL, "address": "h:1", "weight": 1, "enabled": True}],
        "tls_policies": [{"id": POLICY, "mode": "auto", "domains": ["a.test"], "shared": False}],
        "listeners": [{"id": LISTENER, "name": None, "port": 443, "protocol": "https", "tls_policy_id": POLICY,
                       "enabled": True, "challenge": None}],
        "routes": [{"id": ROUTE, "listener_id": LISTENER, "type": "path", "match_expr": {"host": "a.test"},
                    "priority": 1, "upstream_pool_id": POOL, "enabled": True}],
    }  # fmt: skip


def replace(db: Database, wanted: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    return db.write(lambda tx: gateway.replace(tx, wanted, NOW))


def test_a_document_goes_in_and_comes_out(db: Database) -> None:
    """Applying it again changes nothing and notes nothing."""
    assert replace(db, document()) == dict.fromkeys(document(), 1)
    assert db.read(gateway.export) == document()
    while db.write(lambda tx: changes.take(tx, changes.GATEWAY, 99)):
        pass

    assert replace(db, db.read(gateway.export)) == dict.fromkeys(document(), 0)
    assert not db.read(lambda tx: changes.pending(tx, changes.GATEWAY))
    rows = db.read(gateway.read)
    assert [len(part) for part in (rows.listeners, rows.routes, rows.pools, rows.targets, rows.policies)] == [1] * 5


def test_only_the_tables_that_are_named_change(db: Database) -> None:
    """Rows that are gone from one are deleted; a changed row keeps its id and its status."""
    replace(db, document())
    db.write(lambda tx: tx.execute(update(policies.tls_policies).values(status="active")))
    policy = {**document()["tls_policies"][0], "domains": ["b.test"]}

    assert replace(db, {"routes": [], "tls_policies": [policy]}) == {"routes": 1, "tls_policies": 1}
    left = db.read(gateway.export)
    assert left == {**document(), "routes": [], "tls_policies": [policy]}
    assert one(db.read(lambda tx: policies.find(tx, POLICY))).status == "active"


def test_a_document_that_breaks_a_key_changes_nothing(db: Database) -> None:
    """All of it is one transaction."""
    replace(db, document())

    with pytest.raises(StoreError, match=r"(?i)foreign key"):
        replace(db, {"upstream_targets": [], "upstream_pools": []})
    assert db.read(gateway.export) == document()


def test_two_rows_can_trade_what_is_unique(db: Database) -> None:
    """Ports of listeners and names of pools move along a chain, or in a ring."""
    pools = [{"id": i, "name": n, "policy": "weighted", "health_check": None} for i, n in ((POOL, "a"), (ROUTE, "b"))]
    listeners = [
        {"id": i, "name": None, "port": p, "protocol": "http", "tls_policy_id": None, "enabled": True}
        for i, p in ((LISTENER, 80), (TARGET, 81), (POLICY, 82))
    ]
    replace(db, {"upstream_pools": pools, "listeners": listeners})
    pools[0]["name"], pools[1]["name"] = "b", "a"
    for listener, port in zip(listeners, (81, 82, 83), strict=True):
        listener["port"] = port

    assert replace(db, {"upstream_pools": pools, "listeners": listeners}) == {"upstream_pools": 2, "listeners": 3}
    left = db.read(gateway.export)
    assert {row["id"]: row["name"] for row in left["upstream_pools"]} == {POOL: "b", ROUTE: "a"}
    assert {row["id"]: row["port"] for row in left["listeners"]} == {LISTENER: 81, TARGET: 82, POLICY: 83}


def test_a_policy_that_loses_names_waits_for_their_activation(postgresql_db: Database) -> None:
    """Both write links of several lineages, one in whatever order the table has them: the later one waits."""
    db = postgresql_db
    policy_id = db.write(lambda tx: policies.add(tx, ["a.test", "b.test"], NOW))

    def link(tx: Connection, names: list[str]) -> None:
        lineages.link(tx, {policy_id: [add_lineage(tx, [name]) for name in names]})

    db.write(lambda tx: link(tx, ["a.test", "b.test"]))
    ids = db.read(lambda tx: tx.execute(select(lineage_rows.c.id)).scalars().all())
    with db.engine.connect() as serving, serving.begin(), ThreadPoolExecutor(1) as thread:
        lineages.lock_all(serving, ids)
        losing = thread.submit(db.write, lambda tx: link(tx, []))
        wait_for_waiting(db)
        serving.execute(update(policy_lineages).values(lineage_status="active"))
        assert not losing.done()
        serving.commit()
        losing.result(10)

    assert db.read(lambda tx: tx.execute(select(policy_lineages)).all()) == []
