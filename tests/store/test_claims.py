"""Issuances: queued once, claimed by one worker at a time, and fenced against the one that was too slow."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Connection, insert, literal, select, update

from certworker.core.issuance import State
from certworker.errors import LeaseLost
from certworker.store import challenges, issuances, lineages, policies
from certworker.store.challenges import Answer
from certworker.store.database import Database
from certworker.store.issuances import Issuance
from certworker.store.rows import new_id
from certworker.store.tables import acme_accounts
from certworker.store.tables import issuances as rows
from certworker.store.types import seconds_from_now

from .conftest import ISSUER, NOW, add_lineage
from .plans import explain

WORKER = "cccccccc-cccc-4ccc-8ccc-cccccccccccc"
OTHER = "dddddddd-dddd-4ddd-8ddd-dddddddddddd"


def queue_some(db: Database, count: int) -> list[str]:
    """Queue so many issuances, the first due longest."""

    def add(tx: Connection) -> list[str]:
        ids = []
        for number in range(count):
            lineage_id = add_lineage(tx, [f"{number}.test"])
            ids.append(str(issuances.queue(tx, lineage_id, "first", NOW - timedelta(minutes=count - number))))
        return ids

    return db.write(add)


def claim(db: Database, worker: str = WORKER, limit: int = 10) -> list[Issuance]:
    return db.write(lambda tx: issuances.claim(tx, worker, NOW, limit))


def add_account(db: Database) -> str:
    account_id, made = new_id(), insert(acme_accounts)
    values = {"directory_url": ISSUER.directory_url, "credentials_json": {}}
    db.write(lambda tx: tx.execute(made.values(id=account_id, **values)))
    return account_id


def expire_leases(db: Database) -> None:
    """Let a minute go by for the database."""
    past = seconds_from_now(literal(-1))
    db.write(lambda tx: tx.execute(update(rows).where(rows.c.lease_until.is_not(None)).values(lease_until=past)))


def read(db: Database, issuance_id: str) -> Issuance:
    found = db.read(lambda tx: issuances.find(tx, issuance_id))
    assert found is not None
    return found


def test_a_lineage_is_queued_once(db: Database, lineage_id: str) -> None:
    """Until the open issuance is closed, whoever asks."""
    first = db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    assert first is not None
    assert db.write(lambda tx: issuances.queue(tx, lineage_id, "forced", NOW)) is None

    (claimed,) = claim(db)
    db.write(lambda tx: issuances.close(tx, claimed, State.FAILED, NOW))
    second = db.write(lambda tx: issuances.queue(tx, lineage_id, "forced", NOW))
    assert second not in (None, first)
    assert {i.id for i in db.read(lambda tx: issuances.history(tx, lineage_id))} == {first, second}


def test_two_workers_that_queue_at_once_queue_one(db: Database, twin: Database, lineage_id: str) -> None:
    """Neither of them fails."""
    start = Barrier(2)

    def queue(database: Database) -> str | None:
        def write(tx: Connection) -> str | None:
            if not database.embedded:
                tx.execute(select(1))  # both have begun
                start.wait(10)
            return issuances.queue(tx, lineage_id, "first", NOW)

        return database.write(write)

    with ThreadPoolExecutor(2) as threads:
        queued = list(threads.map(queue, [db, twin]))

    assert [one is None for one in queued].count(True) == 1


def test_a_claim_takes_what_is_due_longest_first(db: Database) -> None:
    """As many as asked for, each leased with a token that only grows."""
    ids = queue_some(db, 5)

    first, rest = claim(db, limit=2), claim(db, OTHER)
    assert [i.id for i in first] == ids[:2]
    assert [i.id for i in rest] == ids[2:]
    assert {i.lease_owner for i in first} == {WORKER}
    assert {i.lease_token for i in first + rest} == {1}
    assert claim(db) == []


def test_a_claim_leaves_what_is_not_due_or_not_asked_for(db: Database) -> None:
    """Due is the caller's clock; a one-shot run has names."""
    ids = queue_some(db, 3)

    early = NOW - timedelta(minutes=2, seconds=30)
    assert [i.id for i in db.write(lambda tx: issuances.claim(tx, WORKER, early, 10))] == ids[:1]
    assert [i.id for i in db.write(lambda tx: issuances.claim(tx, WORKER, NOW, 10, only=ids[2:]))] == ids[2:]
    assert db.write(lambda tx: issuances.claim(tx, WORKER, NOW, 10, only=[])) == []


def test_two_open_transactions_never_claim_the_same_row(postgresql_db: Database) -> None:
    """The second skips what the first has locked, and does not wait for it."""
    ids = queue_some(postgresql_db, 4)

    def first(tx: Connection) -> tuple[list[Issuance], list[Issuance]]:
        mine = issuances.claim(tx, WORKER, NOW, 2)
        return mine, claim(postgresql_db, OTHER)

    mine, theirs = postgresql_db.write(first)

    assert [i.id for i in mine] == ids[:2]
    assert [i.id for i in theirs] == ids[2:]


def test_many_workers_share_everything_once(db: Database, twin: Database) -> None:
    """Whatever the timing, every issuance is claimed by exactly one of them."""
    ids = queue_some(db, 24)
    start = Barrier(4)

    def work(number: int) -> list[str]:
        database, taken = (db, twin)[number % 2], []
        start.wait()
        while claimed := claim(database, f"{number}" * 8 + WORKER[8:], limit=2):
            taken += [issuance.id for issuance in claimed]
        return taken

    with ThreadPoolExecutor(4) as threads:
        taken = [issuance_id for part in threads.map(work, range(4)) for issuance_id in part]

    # A claim that skipped rows another one had locked may end early; nobody takes a row twice.
    assert len(taken) == len(set(taken))
    taken += [issuance.id for issuance in claim(db, limit=24)]
    assert sorted(taken) == sorted(ids)


def test_a_lease_ends_by_the_database_s_time(db: Database) -> None:
    """Whatever the clock of a worker says; then another one takes over with the next token."""
    queue_some(db, 1)
    (first,) = claim(db)

    tomorrow = NOW + timedelta(days=1)
    assert db.write(lambda tx: issuances.claim(tx, OTHER, tomorrow, 10)) == []
    expire_leases(db)
    (second,) = claim(db, OTHER)

    assert second.id == first.id
    assert (second.lease_token, second.claims) == (first.lease_token + 1, 2)


def test_whoever_lost_the_lease_writes_nothing(db: Database) -> None:
    """Not even after the new owner gave it back: the token only grows."""
    queue_some(db, 1)
    (stale,) = claim(db)
    expire_leases(db)
    (fresh,) = claim(db, OTHER)

    for act in (
        lambda tx: issuances.record(tx, stale, NOW, error={"type": "stale"}),
        lambda tx: issuances.release(tx, stale, NOW, NOW),
        lambda tx: issuances.close(tx, stale, State.FAILED, NOW),
    ):
        with pytest.raises(LeaseLost):
            db.write(act)
    assert read(db, fresh.id) == fresh
    db.write(lambda tx: issuances.release(tx, fresh, NOW, NOW))
    with pytest.raises(LeaseLost):
        db.write(lambda tx: issuances.record(tx, stale, NOW, error={"type": "stale"}))
    (again,) = claim(db)
    assert again.lease_token == stale.lease_token + 2
    with pytest.raises(LeaseLost):
        db.write(lambda tx: issuances.record(tx, stale, NOW, error={"type": "stale"}))


def test_a_lease_that_ran_out_but_was_not_taken_still_counts(db: Database) -> None:
    """Fencing is by token, not by time: nobody else has begun anything."""
    queue_some(db, 1)
    (held,) = claim(db)
    expire_leases(db)

    assert db.write(lambda tx: issuances.record(tx, held, NOW, failures=1)).failures == 1


def test_a_state_that_has_moved_on_is_not_written_over(db: Database) -> None:
    """The same worker with an old value of the row."""
    queue_some(db, 1)
    (held,) = claim(db)
    key = {"key_pem": "k", "csr_der": b"c", "spki_sha256": "s"}
    moved = db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key))

    with pytest.raises(LeaseLost):
        db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDERED))
    assert db.write(lambda tx: issuances.record(tx, moved, NOW, failures=2)).failures == 2


def test_what_was_committed_without_an_answer_is_found_when_it_is_said_again(db: Database) -> None:
    """The same claim, the same state: it was this very write. Another claim has lost."""
    queue_some(db, 1)
    (held,) = claim(db)
    key = {"key_pem": "k", "csr_der": b"c", "spki_sha256": "s"}
    moved = db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key))

    again = db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key | {"spki_sha256": "t"}))
    assert again == moved
    expire_leases(db)
    claim(db, OTHER)
    with pytest.raises(LeaseLost):
        db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key))


def test_state_at_moves_with_the_state_only(db: Database) -> None:
    """So that it says since when a row is where it is."""
    queue_some(db, 1)
    (held,) = claim(db)
    later = NOW + timedelta(hours=1)
    key = {"key_pem": "k", "csr_der": b"c", "spki_sha256": "s"}
    at = select(rows.c.state_at)

    moved = db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key))
    db.write(lambda tx: issuances.record(tx, moved, later, failures=2))
    assert db.read(lambda tx: tx.execute(at).scalar()) == NOW


def test_a_worker_keeps_what_it_still_holds(db: Database) -> None:
    """It is told the tokens of those; what another one took over meanwhile is not touched."""
    queue_some(db, 3)
    held, taken, left = claim(db)
    db.write(lambda tx: tx.execute(update(rows).where(rows.c.id == taken.id).values(lease_owner=OTHER, lease_token=2)))
    expire_leases(db)

    kept = db.write(lambda tx: issuances.extend_leases(tx, WORKER, [held.id, taken.id]))

    assert kept == {held.id: held.lease_token}
    assert {i.id for i in claim(db, OTHER)} == {taken.id, left.id}
    assert db.write(lambda tx: issuances.extend_leases(tx, WORKER, [left.id])) == {}


def test_a_heartbeat_waits_for_no_row(postgresql_db: Database, twin_pg: Database) -> None:
    """One that is being written is left out, and known to be held: to wait for it with others locked is a deadlock."""
    queue_some(postgresql_db, 2)
    free, written = claim(postgresql_db)
    tokens = {one.id: one.lease_token for one in (free, written)}

    def heartbeat(tx: Connection) -> tuple[dict[str, int], dict[str, int]]:
        return issuances.extend_leases(tx, WORKER, [*tokens], waits=False), issuances.held(tx, WORKER, [*tokens])

    def write(tx: Connection) -> tuple[dict[str, int], dict[str, int]]:
        issuances.record(tx, written, NOW, failures=1)
        return twin_pg.write(heartbeat)

    extended, held = postgresql_db.write(write)

    assert extended == {free.id: free.lease_token}
    assert held == tokens


def test_a_worker_that_ends_frees_its_own_leases(db: Database) -> None:
    """And nobody else's."""
    queue_some(db, 3)
    (mine,), (theirs,) = claim(db, limit=1), claim(db, OTHER, limit=1)

    db.write(lambda tx: issuances.free_leases(tx, WORKER))
    assert read(db, mine.id).lease_owner is None
    assert read(db, theirs.id).lease_owner == OTHER
    assert len(claim(db)) == 2


def test_a_released_issuance_waits_for_its_time(db: Database) -> None:
    """It is claimed again when it is due, and `next_attempt_at` says when."""
    queue_some(db, 1)
    (held,) = claim(db)
    later = NOW + timedelta(hours=1)
    assert db.read(issuances.next_attempt_at) is None
    db.write(lambda tx: issuances.release(tx, held, later, NOW, failures=1))

    assert db.read(issuances.next_attempt_at) == later
    assert claim(db) == []
    assert [i.failures for i in db.write(lambda tx: issuances.claim(tx, WORKER, later, 1))] == [1]


def test_a_person_can_bring_an_attempt_forward(db: Database) -> None:
    """Never back."""
    (issuance_id,) = queue_some(db, 1)
    (held,) = claim(db)
    db.write(lambda tx: issuances.release(tx, held, NOW + timedelta(hours=1), NOW))

    db.write(lambda tx: issuances.bring_forward(tx, issuance_id, NOW))
    assert read(db, issuance_id).attempt_at == NOW
    db.write(lambda tx: issuances.bring_forward(tx, issuance_id, NOW + timedelta(hours=1)))
    assert read(db, issuance_id).attempt_at == NOW


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.CANCELLED])
def test_what_is_closed_stays_closed(db: Database, state: State) -> None:
    """It is claimed no more, and its lease is free."""
    queue_some(db, 1)
    (held,) = claim(db)
    values = {"key_pem": "k", "csr_der": b"c", "chain_pem": "c"} if state is State.DONE else {}

    closed = db.write(lambda tx: issuances.close(tx, held, state, NOW, **values))

    assert not closed.is_open
    assert (closed.closed_at, closed.lease_owner) == (NOW, None)
    assert claim(db) == []
    assert db.read(issuances.list_open) == []


def test_only_what_nobody_works_on_is_cancelled(db: Database, lineage_id: str) -> None:
    """A queued one is; a claimed one, or one with an order, is brought to its end."""
    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    assert db.write(lambda tx: issuances.cancel_unclaimed(tx, lineage_id, NOW))
    assert not db.write(lambda tx: issuances.cancel_unclaimed(tx, lineage_id, NOW))

    db.write(lambda tx: issuances.queue(tx, lineage_id, "first", NOW))
    (held,) = claim(db)
    assert not db.write(lambda tx: issuances.cancel_unclaimed(tx, lineage_id, NOW))
    values = {"key_pem": "k", "csr_der": b"c", "state": State.ORDER_INTENT}
    db.write(lambda tx: issuances.release(tx, held, NOW, NOW, **values))
    assert not db.write(lambda tx: issuances.cancel_unclaimed(tx, lineage_id, NOW))


def test_a_claim_costs_what_is_open(db: Database) -> None:
    """Not the history: the partial index is used, on both."""

    def claim_some(tx: Connection) -> list[Issuance]:
        return issuances.claim(tx, WORKER, NOW, 5)

    assert "ix_issuances_urgent" in explain(db, claim_some)
    assert "ix_issuances_due" in explain(db, claim_some, before=1)
    for act in (issuances.next_attempt_at, issuances.list_open):
        assert "ix_issuances_due" in explain(db, act) or "uq_issuances_open" in explain(db, act), act


@pytest.mark.parametrize(("count", "still_open"), [(300, 3), (300, 30), (1000, 10), (1000, 30)])
def test_a_claim_walks_the_queue_in_order(postgresql_db: Database, count: int, still_open: int) -> None:
    """However short it was when statistics were taken: PostgreSQL would read all of a long one for the first four."""
    ids = queue_some(postgresql_db, count)
    most = rows.c.id.not_in(ids[:: count // still_open])
    postgresql_db.write(lambda tx: tx.execute(update(rows).where(most).values(state=State.CANCELLED, closed_at=NOW)))
    postgresql_db.write(lambda tx: tx.exec_driver_sql("ANALYZE issuances"))
    postgresql_db.write(lambda tx: tx.execute(update(rows).values(state=State.QUEUED, closed_at=None)))

    ca = ISSUER.directory_url
    plans = [
        explain(postgresql_db, lambda tx: issuances.claim(tx, WORKER, NOW, 4, None, ca), before=1),
        explain(postgresql_db, lambda tx: issuances.next_attempt_at(tx, None, ca)),
    ]

    for plan in plans:
        assert re.findall(r"(\w+) Scan using (\w+)", plan) == [("Index", "ix_issuances_due"), ("Index", "pk_lineages")]
        assert "Bitmap" not in plan
        assert "Sort" not in plan


def test_whether_a_lineage_is_wanted_is_looked_up_for_each(postgresql_db: Database) -> None:
    """However few policies there were when statistics were taken: PostgreSQL would begin with all that there are."""
    queue_some(postgresql_db, 300)
    postgresql_db.write(lambda tx: tx.exec_driver_sql("ANALYZE"))
    found = postgresql_db.read(lambda tx: [*tx.execute(select(rows.c.lineage_id)).scalars()])

    plan = explain(postgresql_db, lambda tx: lineages.wanted_among(tx, found))

    assert re.findall(r"Index \w+ using (\w+)", plan) == ["ix_policy_lineages_lineage_id", "pk_tls_policies"]
    assert "Nested Loop" not in plan


def test_what_is_urgent_is_claimed_first(db: Database) -> None:
    """Then what is due longest; nothing is claimed twice."""
    ids = queue_some(db, 4)
    db.write(lambda tx: tx.execute(update(rows).where(rows.c.id == ids[3]).values(urgent=True)))

    assert [held.id for held in claim(db, limit=2)] == [ids[3], ids[0]]
    assert [held.id for held in claim(db, limit=9)] == [ids[1], ids[2]]


def test_a_lease_that_nobody_gave_back_counts_as_a_crash(db: Database) -> None:
    """Until the issuance moves; a worker that ends well costs none."""
    queue_some(db, 1)
    for crashes in (0, 1, 2):
        (held,) = claim(db)
        assert held.crashes == crashes
        expire_leases(db)
    db.write(issuances.free_dead_leases)
    (held,) = claim(db)
    assert held.crashes == 3

    db.write(lambda tx: issuances.free_leases(tx, WORKER))
    (held,) = claim(db)
    assert held.crashes == 3
    key = {"key_pem": "k", "csr_der": b"c", "spki_sha256": "s"}
    db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT, **key))
    expire_leases(db)
    (held,) = claim(db)
    assert held.crashes == 1


def test_the_leases_of_dead_workers_are_freed_and_no_others(db: Database) -> None:
    """Those of a former incarnation, when it is known to be dead."""
    queue_some(db, 2)
    (mine,), (theirs,) = claim(db, limit=1), claim(db, OTHER, limit=1)

    assert db.write(lambda tx: issuances.free_dead_leases(tx, [WORKER])) == 1

    assert read(db, mine.id).lease_owner is None
    assert read(db, theirs.id).lease_owner == OTHER


def want(db: Database, claimed: list[Issuance], **mode: str) -> str:
    """Let a policy name their lineages; return its id."""

    def add(tx: Connection) -> str:
        policy_id = policies.add(tx, ["a.test"], NOW, **mode)
        assert policy_id is not None
        lineages.link(tx, {policy_id: [one.lineage_id for one in claimed]})
        return policy_id

    return db.write(add)


def intend(db: Database, claimed: list[Issuance], account_id: str, names_hash: str = "h") -> list[Issuance] | None:
    """Intend an order for the same names for each of them."""

    def values(one: Issuance) -> dict[str, Any]:
        key = {"key_pem": "k", "csr_der": b"c", "spki_sha256": f"{one.id}{one.state}"}
        return {**key, "names_hash": names_hash, "account_id": account_id, "state": State.ORDER_INTENT}

    changes = [issuances.change(one, NOW, **values(one)) for one in claimed]
    return db.write(lambda tx: issuances.record_intents(tx, changes, alone=len(changes) == 1))


def test_an_order_for_the_same_names_is_not_made_twice(db: Database) -> None:
    """From its intent to its end, with the same account only; of two that come together neither is kept."""
    queue_some(db, 3)
    first, second, third = claim(db)
    want(db, [first, second, third])
    account, another = add_account(db), add_account(db)

    with pytest.raises(LeaseLost):
        intend(db, [first, second], account)
    assert read(db, first.id).state == State.QUEUED
    (intended,) = intend(db, [first], account) or ()
    assert intend(db, [second], account) is None
    assert intend(db, [third], another) is not None
    db.write(lambda tx: issuances.close(tx, intended, State.FAILED, NOW))
    assert intend(db, [second], account) is not None


def test_an_order_that_nobody_wants_is_not_made(db: Database) -> None:
    """A manual policy names its lineage, and that is not enough; what is under way may go on with it."""
    queue_some(db, 1)
    (claimed,) = claim(db)
    policy_id = want(db, [claimed], mode="manual")
    goes_on = issuances.change(claimed, NOW, failures=1)

    assert intend(db, [claimed], add_account(db)) is None
    assert db.write(lambda tx: issuances.record_linked(tx, [goes_on])) is not None
    db.write(lambda tx: policies.remove(tx, policy_id))
    assert db.write(lambda tx: issuances.record_linked(tx, [goes_on])) is None


def test_keys_are_forgotten_when_their_certificate_has_ended(db: Database) -> None:
    """And closed issuances without one after a while; open ones and living certificates stay."""
    queue_some(db, 4)
    ended, living, failed, _ = claim(db)
    done = {"key_pem": "k", "csr_der": b"c", "chain_pem": "c"}
    end = {"ended": NOW - timedelta(days=1), "living": NOW + timedelta(days=1)}
    db.write(lambda tx: issuances.close(tx, ended, State.DONE, NOW, not_after=end["ended"], **done))
    db.write(lambda tx: issuances.close(tx, living, State.DONE, NOW, not_after=end["living"], **done))
    db.write(lambda tx: issuances.close(tx, failed, State.FAILED, NOW))

    assert db.write(lambda tx: issuances.forget_keys(tx, NOW, NOW)) == 0
    later = NOW + timedelta(minutes=1)
    assert db.write(lambda tx: issuances.forget_keys(tx, later, NOW, limit=1)) == 1
    assert db.write(lambda tx: issuances.forget_keys(tx, later, NOW)) == 1
    left = db.read(lambda tx: set(tx.execute(select(rows.c.state)).scalars()))
    assert left == {"done", "queued"}
    assert read(db, living.id).key_pem == "k"


# -- challenges ---------------------------------------------------------------------------------------


def test_a_token_is_answered_while_its_issuance_is_open(db: Database) -> None:
    """Until it is withdrawn; publishing it again replaces it."""
    (issuance_id,) = queue_some(db, 1)

    def publish(authorization: str) -> None:
        answer = Answer(issuance_id, "https://ca.test/authz/1", "a.test", "t", authorization)
        db.write(lambda tx: challenges.publish_all(tx, [answer], NOW))

    publish("t.one")
    publish("t.two")
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "t")) == "t.two"
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "T")) is None
    db.write(lambda tx: challenges.withdraw(tx, [issuance_id]))
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "t")) is None


def test_two_orders_may_share_a_token(db: Database) -> None:
    """Withdrawing one leaves the other's."""
    ids = queue_some(db, 2)
    answers = [Answer(issuance_id, "u", "a.test", "t", "t.x") for issuance_id in ids]
    db.write(lambda tx: challenges.publish_all(tx, answers, NOW))

    db.write(lambda tx: challenges.withdraw(tx, ids[:1]))
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "t")) == "t.x"


def test_stale_tokens_of_closed_issuances_go(db: Database) -> None:
    """Those of open ones stay however old they are."""
    ids = queue_some(db, 2)
    answers = [Answer(issuance_id, "u", "a.test", f"t{number}", "x") for number, issuance_id in enumerate(ids)]
    db.write(lambda tx: challenges.publish_all(tx, answers, NOW))
    held, _ = claim(db)
    db.write(lambda tx: issuances.close(tx, held, State.FAILED, NOW))

    assert db.write(lambda tx: challenges.withdraw_stale(tx, NOW)) == 0
    assert db.write(lambda tx: challenges.withdraw_stale(tx, NOW + timedelta(hours=1))) == 1
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "t0")) is None
    assert db.read(lambda tx: challenges.find_key_authorization(tx, "t1")) == "x"


def test_looking_up_a_token_costs_one_look(db: Database) -> None:
    """The responder does it for every request that anybody sends."""
    assert "ix_challenges_token" in explain(db, lambda tx: challenges.find_key_authorization(tx, "t"))


def test_a_lease_of_a_clock_that_ran_ahead_is_none(db: Database) -> None:
    """The database's clock was set back by a day: whoever held it may be dead, and nobody would see that for a day."""
    (issuance_id,) = queue_some(db, 1)
    (held,) = claim(db)
    ahead = seconds_from_now(literal(86400))
    db.write(lambda tx: tx.execute(update(rows).where(rows.c.id == issuance_id).values(lease_until=ahead)))

    (taken,) = claim(db, OTHER)

    assert taken.id == held.id
    with pytest.raises(LeaseLost):
        db.write(lambda tx: issuances.record(tx, held, NOW, state=State.ORDER_INTENT))


def test_what_a_worker_of_the_release_before_left_goes_on(db: Database) -> None:
    """It ran beside the new one for a while, and committed a state that is no more."""
    queue_some(db, 1)
    left = {"state": "published", "key_pem": "k", "csr_der": b"c"}
    db.write(lambda tx: tx.execute(update(rows).values(**left)))

    (held,) = claim(db)

    assert (held.state, held.is_open) == (State.VALIDATING, True)
    assert db.write(lambda tx: issuances.record(tx, held, NOW, state=State.FINALIZING)).state == State.FINALIZING


def test_a_claim_stands_until_something_is_written(db: Database) -> None:
    """Its owner, its token and its state are what every write names."""
    queue_some(db, 1)
    (claimed,) = claim(db)
    stands = lambda one: db.read(lambda tx: issuances.is_claimed(tx, one))  # noqa: E731
    assert stands(claimed)

    moved = db.write(lambda tx: issuances.release(tx, claimed, NOW, NOW))

    assert not stands(claimed)
    assert stands(moved)
