"""`acme_accounts`: what may stand in a row, who may change it when, and what is written together."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Connection, select, text, update

from certworker.core.issuance import CLOSED, State
from certworker.errors import InputError
from certworker.store import accounts, audit, issuances
from certworker.store.accounts import StoredAccount
from certworker.store.database import Database
from certworker.store.seal import Sealer, is_sealed
from certworker.store.tables import acme_accounts
from certworker.store.tables import issuances as table
from tests.steps.world import START, World

PLAIN = Sealer(None, sealing=False)
SEALER = Sealer(bytes(range(32)))
DIRECTORY = "https://ca.test/dir"
URL = "https://ca.test/account/1"
SOON = START + timedelta(seconds=90)


def make(db: Database, key: str = "old") -> StoredAccount:
    """Insert a registered account."""
    db.write(lambda tx: accounts.add(tx, DIRECTORY, key, ["mailto:a@a.test"], "kid-1", PLAIN, START))
    account = default(db)
    db.write(lambda tx: accounts.record_registered(tx, account.id, URL, START))
    return default(db)


def default(db: Database) -> StoredAccount:
    found = db.read(lambda tx: accounts.find_default(tx, DIRECTORY))
    assert found is not None
    return found


def begin(db: Database, account: StoredAccount, key: str = "new") -> StoredAccount:
    begun = db.write(lambda tx: accounts.begin_rollover(tx, account.id, key, SOON))
    assert begun is not None
    return begun


def found(db: Database, asked: StoredAccount, key: str, url: str = URL, **more: Any) -> list[str]:
    return db.write(lambda tx: accounts.record_found(tx, asked, key, url, START, thumbprint="tp", **more))


def audited(db: Database) -> list[str]:
    return [row["action"] for row in reversed(db.read(audit.newest))]


@pytest.mark.parametrize(
    "document",
    [
        [], "text", 7, {}, {"key": 7, "account_url": [], "contact": "a@a.test", "pending_until": 3},
        {"pending_until": "tomorrow", "tos_agreed_at": "yes", "deactivated_at": "", "contact": {"a": 1}},
        {"pending_until": "2026-11-22T12:00:00", "deactivated_at": "2026-11-22"},
    ],
)  # fmt: skip
def test_whatever_stands_in_a_row_can_be_looked_at(db: Database, document: Any) -> None:
    """Another program wrote it: nothing is known of the account, and nothing falls over; writing still works."""
    account = make(db)
    db.write(lambda tx: tx.execute(update(acme_accounts).values(credentials_json=document)))

    odd = default(db)
    assert (odd.account_url, odd.pending_key, odd.contact, odd.tos_agreed_at, odd.deactivated_at) == (
        None, None, [], None, None,
    )  # fmt: skip
    assert not odd.is_rolling(START)
    assert not odd.is_overdue(SOON)
    with pytest.raises(InputError, match=account.id):
        odd.open(odd.key, PLAIN)
    db.write(lambda tx: accounts.record_registered(tx, account.id, URL, None))
    assert default(db).account_url == URL


def test_accounts_are_listed_by_ca_the_used_one_first(db: Database) -> None:
    """The marked one, else the oldest; what a successor replaced stays, unmarked."""
    first = make(db)
    db.write(lambda tx: accounts.add(tx, "https://b.test/dir", "b", [], None, PLAIN, START))
    later = START + timedelta(days=1)
    for _ in range(2):  # by two at once: the second finds that it is done
        db.write(lambda tx: accounts.add_in_place(tx, first, "second", [], None, PLAIN, later, actor="operator"))

    listed = db.read(accounts.list_all)
    assert [(one.account.key, one.account.directory_url, one.used) for one in listed] == [
        ("b", "https://b.test/dir", True), ("second", DIRECTORY, True), ("old", DIRECTORY, False),
    ]  # fmt: skip
    assert [one.created_at for one in listed] == [START, later, START]
    assert default(db).key == "second"
    assert audited(db) == ["account.replaced"]


def test_sealing_does_not_undo_what_was_written_meanwhile(db: Database) -> None:
    """It was read as plain; a key became pending before it is sealed: both are there, and both are sealed."""
    stale = make(db)
    begin(db, stale)

    db.write(lambda tx: accounts.seal(tx, stale, SEALER))

    account = default(db)
    assert account.sealed
    assert is_sealed(str(account.key))
    assert account.open(account.key, SEALER) == "old"
    assert account.open(account.pending_key, SEALER) == "new"


# -- a change of key ----------------------------------------------------------------------------------


def test_a_pending_key_is_used_by_all_that_try(db: Database) -> None:
    """What is sent late is then the same as what was sent first; stopping keeps the key, dropping forgets it."""
    account = make(db)
    begun = begin(db, account)
    again = begin(db, account, "another")

    assert begun.pending_key == again.pending_key == "new"
    assert default(db).is_rolling(SOON - timedelta(seconds=1))
    assert default(db).is_overdue(SOON)
    assert not default(db).is_rolling(SOON)
    db.write(lambda tx: accounts.stop_rollover(tx, begun))
    stopped = default(db)
    assert not stopped.is_rolling(START)
    assert not stopped.is_overdue(SOON)
    assert stopped.pending_key == "new"
    db.write(lambda tx: accounts.stop_rollover(tx, begun, drop=True))
    assert default(db).pending_key is None
    assert default(db).key == "old"


def test_the_new_key_takes_the_place_of_the_old_one_in_one_transaction(db: Database) -> None:
    """Key, what was pending, and the audit row; whoever is late hears that it is over."""
    account = make(db)
    begun = begin(db, account)

    assert found(db, begun, "new") == ["account.key_changed"]

    after = default(db)
    assert (after.key, after.pending_key, after.account_url) == ("new", None, URL)
    assert not after.is_overdue(SOON)
    assert after.contact == ["mailto:a@a.test"]
    assert audited(db) == ["account.key_changed"]
    assert found(db, begun, "new") == []
    assert found(db, account, "old", "https://ca.test/account/9") == []
    assert not db.write(lambda tx: accounts.extend_rollover(tx, begun, SOON))
    db.write(lambda tx: accounts.stop_rollover(tx, begun, drop=True))
    assert default(db) == after


def test_the_old_key_ends_a_change_only_when_its_time_is_over(db: Database) -> None:
    """Somebody may be at it right now; the key stays pending in case it is sent late."""
    begun = begin(db, make(db))

    assert found(db, begun, "old") == []
    assert default(db).is_rolling(START)
    db.write(lambda tx: accounts.record_found(tx, begun, "old", URL, SOON, thumbprint="tp"))
    after = default(db)
    assert not after.is_overdue(SOON)
    assert (after.key, after.pending_key) == ("old", "new")


@pytest.mark.parametrize(("made_again", "action"), [(False, "account.moved"), (True, "account.forgotten")])
def test_a_new_url_is_recorded_once(db: Database, made_again: bool, action: str) -> None:
    """Of two workers that asked about the same row the first one writes; the other's answer is the same."""
    account = make(db)
    moved = "https://ca.test/account/2"

    assert found(db, account, "old", moved, made_again=made_again) == [action]
    assert found(db, account, "old", moved, made_again=made_again) == []

    assert default(db).account_url == moved
    (row,) = db.read(audit.newest)
    assert row["diff"]["before"] == {"account_url": URL}
    assert row["diff"]["after"] == {"account_url": moved}
    assert "old" not in str(row["diff"])


@pytest.fixture
def publish(db: Database) -> Callable[[Connection], None]:
    """Have an issuance with the account, and let it reach `published`."""
    world = World(db)
    account = make(db)
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    issuance_id = session.issuance.id

    def publish(tx: Connection) -> None:
        values = {"state": State.VALIDATING, "account_id": account.id, "key_pem": "k", "csr_der": b"c"}
        tx.execute(update(table).where(table.c.id == issuance_id).values(values))

    return publish


def test_what_is_published_and_a_change_of_key_see_each_other(
    db: Database, publish: Callable[[Connection], None]
) -> None:
    """The change waits for the one who publishes to commit, and then counts it; the next one sees the change."""
    held = Event()
    account = default(db)

    def publishing(tx: Connection) -> None:
        accounts.hold(tx, account.id)
        held.set()
        await_a_waiting_session(db)
        publish(tx)

    def change(tx: Connection) -> int:
        accounts.begin_rollover(tx, account.id, "new", SOON)
        return accounts.count_proving(tx, account.id)

    with ThreadPoolExecutor(2) as threads:
        changing = threads.submit(lambda: held.wait(10) and db.write(change))
        threads.submit(lambda: db.write(publishing)).result(20)
        assert changing.result(20) == 1

    later = db.read(lambda tx: accounts.hold(tx, account.id))
    assert later is not None
    assert later.is_rolling(START)


def await_a_waiting_session(db: Database) -> None:
    """Return when somebody waits for a lock, or need not: on SQLite writers wait for each other anyway."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    give_up_at = time.monotonic() + 10
    while not db.embedded and not db.read(lambda tx: tx.execute(waiting).scalar()):
        assert time.monotonic() < give_up_at, "nobody waits for the account's row"
        time.sleep(0.01)


def test_issuances_of_an_account_are_counted_while_they_are_open(
    db: Database, publish: Callable[[Connection], None]
) -> None:
    """Those of another account, or that have ended, do not count."""
    account = default(db)
    counts = lambda: db.read(lambda tx: (accounts.count_open(tx, account.id), accounts.count_proving(tx, account.id)))  # noqa: E731
    assert counts() == (0, 0)
    db.write(publish)
    assert counts() == (1, 1)
    issuance_id = db.read(lambda tx: tx.execute(select(table.c.id)).scalar_one())
    for state, expected in ((State.VALIDATING, (1, 1)), (State.FINALIZING, (1, 0)), (State.FAILED, (0, 0))):
        moved = update(table).values(state=state, closed_at=START if state in CLOSED else None)
        db.write(lambda tx, moved=moved: tx.execute(moved))  # type: ignore[misc]
        assert counts() == expected
    assert db.read(lambda tx: issuances.find(tx, issuance_id)) is not None
    assert db.read(lambda tx: accounts.count_open(tx, "00000000-0000-4000-8000-000000000000")) == 0


def test_contacts_and_giving_up_are_kept_and_audited(db: Database) -> None:
    """By the operator who did it."""
    account = make(db)
    db.write(lambda tx: accounts.record_contact(tx, account.id, [], START, actor="operator"))
    db.write(lambda tx: accounts.record_deactivated(tx, account.id, START, actor="operator"))

    assert default(db).contact == []
    assert default(db).deactivated_at == START
    assert audited(db) == ["account.contact", "account.deactivated"]
    assert {row["actor"] for row in db.read(audit.newest)} == {"operator"}
