"""A change of an account's key, killed and answered in every way that can be: it never has two keys, nor none."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from certworker.ca.client import Account, Client
from certworker.ca.keys import AccountKey
from certworker.core.issuance import State
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    AnswerFault,
    CertworkerError,
    InputError,
    ProblemReported,
    TransportFault,
)
from certworker.steps import account as steps
from certworker.steps.account import ROLLING, deactivate, register
from certworker.steps.issue import advance
from certworker.steps.register import Accounts
from certworker.store import accounts, audit
from certworker.store.accounts import StoredAccount
from certworker.store.database import Transaction

from .test_register import Hooked, at_ca, audited, lost, reset_ca, stored, worker
from .world import World

KEY_CHANGE = "/key-change"


class Killed(BaseException):
    """The process is no more: nothing behind it runs."""


def roll_over(
    world: World, used: Accounts | None = None, *, patience: timedelta = timedelta(minutes=2),
    pause: Callable[[timedelta], object] | None = None,
) -> StoredAccount:  # fmt: skip
    """Do what the command does, with a pause that moves the clock."""
    return steps.roll_over(used or worker(world), patience, pause or world.clock.move, lambda _: None)


def kill(world: World, *, after: bool) -> None:
    """End the next one that sends keyChange, before the CA sees it or after it did its part."""
    world.ca.fail_next("POST", KEY_CHANGE, raises=Killed(), after=after)  # type: ignore[arg-type]


def key_at_ca(world: World) -> AccountKey:
    """Return the one key of the row that the CA knows."""
    row, ours = stored(world), worker(world)
    keys = {ours.read_key(row, key) for key in (row.key, row.pending_key) if key is not None}
    client = Client(world.ca.directory_url, world.ca.http, world.clock)
    (found,) = (account.key for key in keys if (account := client.find_account(key)) is not None)
    return found


def assert_in_order(world: World, used: Accounts) -> None:
    """A process that has `used` the account before, and a new one, order with it; the row has the CA's key only."""
    account_id, account = used.default()
    assert (account_id, account) == worker(world).default()
    assert account.key == key_at_ca(world)
    assert Client(world.ca.directory_url, world.ca.http, world.clock).new_order(account, ["a.test"])
    assert not stored(world).is_rolling(world.clock())
    assert (world.count("acme_accounts"), len(world.ca.accounts)) == (1, 1)


def test_the_key_is_changed(world: World) -> None:
    """At the CA and in the row, sealed; the URL stays; it is the operator's, and the log of it shows no key."""
    ours = worker(world)
    _, before = ours.default()

    roll_over(world)

    _, after = ours.default()
    assert after.url == before.url
    assert after.key != before.key
    assert stored(world).sealed
    assert stored(world).pending_key is None
    assert_in_order(world, ours)
    (row,) = world.db.read(audit.newest)
    assert (row["action"], row["actor"]) == ("account.key_changed", "operator")
    assert row["diff"]["after"] == {"thumbprint": after.key.thumbprint}


def test_the_new_key_is_committed_before_the_ca_hears_of_it(world: World) -> None:
    """And nothing is published meanwhile."""
    hooked = Hooked(world.ca.http)
    ours = worker(world, hooked)
    account_id, before = ours.default()
    seen = []

    def look() -> None:
        row = stored(world)
        seen.append((row.sealed, row.pending_key is not None, row.is_rolling(world.clock())))
        assert world.db.write(lambda tx: ours.publishing_key(tx, account_id)) is None

    hooked.before[KEY_CHANGE] = look
    assert world.db.write(lambda tx: ours.publishing_key(tx, account_id)) == before.key

    roll_over(world, ours)

    assert seen == [(True, True, True)]
    assert world.db.write(lambda tx: ours.publishing_key(tx, account_id)) == ours.default()[1].key != before.key


@pytest.mark.parametrize("used_by", ["the service that was there", "a new one", "the command again"])
@pytest.mark.parametrize("at", ["before the commit", "before the CA", "after the CA"])
def test_killed_anywhere_the_account_has_one_key(world: World, at: str, used_by: str) -> None:
    """Whoever uses it next goes on with the key that the CA has; a repeated command ends what was begun."""
    service = worker(world)
    account_id, before = service.default()
    if at == "before the commit":
        world.db, real = _Dying(world.db), world.db  # type: ignore[assignment]
        with pytest.raises(Killed):
            roll_over(world)
        world.db = real
    else:
        kill(world, after=at == "after the CA")
        with pytest.raises(Killed):
            roll_over(world)
        assert stored(world).is_rolling(world.clock())
    changed = at == "after the CA"
    assert (key_at_ca(world) != before.key) == changed

    match used_by:
        case "the service that was there":
            # Refused with the old key long before it is overdue, it finds out why at once.
            assert service.recover(account_id, before, "malformed") == changed
            world.clock.move(ROLLING)
            assert_in_order(world, service)
        case "a new one":
            world.clock.move(ROLLING)
            assert_in_order(world, worker(world))
        case "the command again":
            pending = stored(world).pending_key
            roll_over(world)
            assert pending in (None, stored(world).key)
            if at == "before the commit":
                assert audited(world) == ["account.key_changed"]
    assert_in_order(world, service if service.default()[1].key == key_at_ca(world) else worker(world))


class _Dying:
    """A database whose next write of a pending key is not committed."""

    def __init__(self, db: object) -> None:
        self._db = db

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)

    def write(self, fn: Callable[[Transaction], object]) -> object:
        def dying(tx: Transaction) -> object:
            result = fn(tx)
            if isinstance(result, StoredAccount) and result.pending_key is not None:
                raise Killed
            return result

        return self._db.write(dying)  # type: ignore[attr-defined]


def test_a_lost_answer_is_found_out(world: World) -> None:
    """The CA has done it, or has not: it is asked, and the command says which."""
    ours = worker(world)
    ours.default()
    world.ca.fail_next("POST", KEY_CHANGE, raises=lost(KEY_CHANGE))
    with pytest.raises(TransportFault):
        roll_over(world)
    assert_in_order(world, worker(world))
    assert audited(world) == []
    world.ca.fail_next("POST", KEY_CHANGE, raises=lost(KEY_CHANGE), after=True)

    roll_over(world)

    assert_in_order(world, ours)
    assert audited(world) == ["account.key_changed"]


def test_a_ca_that_is_gone_leaves_it_open(world: World) -> None:
    """Neither the answer nor a second one: told so; when the CA is there again, the next use settles it."""
    ours = worker(world)
    _, before = ours.default()
    world.ca.fail_next("POST", KEY_CHANGE, raises=lost(KEY_CHANGE), after=True)
    world.ca.fail_next("POST", "/new-account", raises=lost("/new-account"))

    with pytest.raises(CertworkerError, match=r"is not known yet: .*; repeat the command, or leave it to the service"):
        roll_over(world)

    assert stored(world).is_rolling(world.clock())
    world.clock.move(ROLLING)
    assert ours.default()[1].key != before.key
    assert_in_order(world, ours)


def test_one_that_arrives_late_loses_no_key(world: World) -> None:
    """Frozen before it was sent, given up by the service, sent all the same: the key that the CA gets is still here."""
    hooked = Hooked(world.ca.http)
    service = worker(world)
    account_id, before = service.default()

    def meanwhile() -> None:
        world.clock.move(ROLLING)
        assert service.default() == (account_id, before)
        assert not stored(world).is_overdue(world.clock())

    hooked.before[KEY_CHANGE] = meanwhile
    world.ca.fail_next("POST", KEY_CHANGE, raises=Killed(), after=True)  # type: ignore[arg-type]
    with pytest.raises(Killed):
        roll_over(world, worker(world, hooked))

    assert key_at_ca(world) != before.key
    assert service.recover(account_id, before, "malformed")
    assert_in_order(world, service)


def test_a_change_between_two_questions_is_seen(world: World) -> None:
    """The CA is asked for the new key, then the old: neither is there, but nobody makes another account."""
    world.registration = replace(world.registration, private_ca=True)
    hooked = Hooked(world.ca.http)
    service = worker(world, hooked)
    account_id, before = service.default()
    kill(world, after=False)
    with pytest.raises(Killed):
        roll_over(world)
    row, asked = stored(world), []

    def change() -> None:
        asked.append(1)
        if len(asked) == 2:
            ours = worker(world)
            ours.client.change_key(before, ours.read_key(row, row.pending_key))

    hooked.before["/new-account"] = change

    assert service.recover(account_id, before, "malformed")

    assert len(asked) == 3
    assert audited(world) == ["account.key_changed"]
    assert_in_order(world, service)


def test_a_key_of_another_account_is_forgotten(world: World) -> None:
    """409 (RFC 8555 §7.3.5): it cannot become ours, so the next try makes another one."""
    ours = worker(world)
    _, before = ours.default()
    kill(world, after=False)
    with pytest.raises(Killed):
        roll_over(world)
    row = stored(world)
    theirs = Client(world.ca.directory_url, world.ca.http, world.clock).new_account(
        ours.read_key(row, row.pending_key), [], True, None
    )

    with pytest.raises(ProblemReported):
        roll_over(world)

    assert stored(world).pending_key is None
    assert ours.default()[1] == before
    world.ca.accounts.pop(theirs.url)
    roll_over(world)
    assert_in_order(world, ours)


def test_a_refusal_of_the_ca_changes_nothing(world: World) -> None:
    """The old key stays, key authorizations are published again, and the CA's words are told."""
    ours = worker(world)
    account_id, before = ours.default()
    world.ca.fail_next("POST", KEY_CHANGE, problem="badPublicKey")

    with pytest.raises(ProblemReported, match="badPublicKey"):
        roll_over(world)

    assert ours.default()[1] == before
    assert world.db.write(lambda tx: ours.publishing_key(tx, account_id)) == before.key
    roll_over(world)
    assert_in_order(world, ours)


def test_two_commands_at_once_make_one_change(world: World) -> None:
    """Both send the same key; one is told no, asks, and finds that it is done."""
    ours, both = worker(world), threading.Barrier(2)
    _, before = ours.default()
    hooked = Hooked(world.ca.http)

    def wait() -> None:
        hooked.before.clear() if both.wait(20) == 0 else None

    hooked.before[KEY_CHANGE] = wait
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(roll_over, world, worker(world, hooked)) for _ in range(2)]
        rows = [run.result(30) for run in runs]

    assert rows[0] == rows[1]
    assert ours.default()[1].key != before.key
    assert_in_order(world, ours)
    assert audited(world) == ["account.key_changed"]


# -- beside issuances ---------------------------------------------------------------------------------


def publish(world: World, *names: str) -> None:
    """Take issuances as far as `published`."""
    world.add_policy(*names)
    world.take_over()
    bench = world.bench()
    for session in world.claim():
        while session.issuance.state != State.VALIDATING:
            advance(bench, session)
    world.crash()


def test_what_is_being_validated_is_waited_for(world: World) -> None:
    """The CA compares with the key that the account has when it looks: it looks first, then the key is changed."""
    publish(world, "a.test", "b.test")
    paused = []

    def pause(by: timedelta) -> None:
        paused.append(by)
        assert world.ca.count("POST", KEY_CHANGE) == 0
        world.clock.move(by)
        if len(paused) == 3:
            world.work()

    roll_over(world, pause=pause)

    assert len(paused) == 3
    assert {world.lineage(name).status for name in ("a.test", "b.test")} == {"active"}
    assert world.count("issuances") == 2
    assert_in_order(world, worker(world))


def test_patience_ends(world: World) -> None:
    """Nothing was changed, publishing goes on at once, and the message says how to go on."""
    publish(world, "a.test")

    with pytest.raises(CertworkerError, match=r"still validating 1 certificate.*--timeout"):
        roll_over(world)

    assert world.ca.count("POST", KEY_CHANGE) == 0
    row = stored(world)
    assert not row.is_rolling(world.clock())
    assert not row.is_overdue(world.clock())
    world.work()
    assert world.lineage("a.test").status == "active"
    roll_over(world)
    assert_in_order(world, worker(world))


def test_an_interrupted_wait_holds_nobody_up(world: World) -> None:
    """Ctrl-C: what waits to be published goes on at once, not when the time of the command is over."""
    publish(world, "a.test")

    def interrupt(by: timedelta) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_over(world, pause=interrupt)
    assert not stored(world).is_rolling(world.clock())


# -- accounts that have no key to change --------------------------------------------------------------


def test_what_cannot_be_rolled_over_is_told(world: World) -> None:
    """No account, one that is given up, one that the CA refuses or has forgotten: nothing stays pending for long."""
    with pytest.raises(InputError, match="certworker account register"):
        roll_over(world)
    with pytest.raises(InputError, match="certworker account register"):
        deactivate(worker(world))
    _, account = worker(world).default()
    at_ca(world).status = "deactivated"
    with pytest.raises(AccountDeactivated):
        roll_over(world)
    at_ca(world).status = "valid"
    reset_ca(world)
    with pytest.raises(AccountForgotten):
        roll_over(world)
    assert not stored(world).is_rolling(world.clock())
    register(worker(world))
    deactivate(worker(world))
    with pytest.raises(AccountDeactivated):
        roll_over(world)
    assert world.ca.accounts[str(stored(world).account_url)].jwk == account.key.public_jwk


def test_a_garbled_answer_is_asked_about(world: World) -> None:
    """Any answer that cannot be used is like a lost one."""
    ours = worker(world)
    ours.default()
    garbled = AnswerFault("https://ca.test/key-change", "it redirects to nowhere")
    world.ca.fail_next("POST", KEY_CHANGE, raises=garbled, after=True)

    roll_over(world)

    assert_in_order(world, ours)


def test_an_account_is_worth_nothing_with_its_old_key(world: World) -> None:
    """What the whole is about: the CA refuses it from keyChange on."""
    _, before = worker(world).default()
    roll_over(world)

    with pytest.raises(ProblemReported) as caught:
        Client(world.ca.directory_url, world.ca.http, world.clock).new_order(
            Account(before.url, before.key), ["a.test"]
        )
    assert caught.value.problem.code == "malformed"
    assert world.db.read(lambda tx: accounts.find_default(tx, world.ca.directory_url)) == stored(world)


def test_requests_under_way_during_a_change_are_sent_again(world: World) -> None:
    """Two were signed with the old key; the second hears its refusal when the first has found out already."""
    hooked = Hooked(world.ca.http)
    world.registration = replace(world.registration, private_ca=True)
    bench = world.bench()
    client = Client(world.ca.directory_url, hooked, world.clock)
    bench = replace(bench, client=client, accounts=worker(world, hooked))
    world.add_policy("a.test", "b.test")
    world.take_over()
    first, second = world.claim()
    for session in (first, second):
        while session.issuance.state != State.ORDER_INTENT:
            advance(bench, session)
    roll_over(world)

    def meanwhile() -> None:
        hooked.before.clear()
        while first.issuance.state == State.ORDER_INTENT:
            advance(bench, first)

    hooked.before["/new-order"] = meanwhile
    while second.issuance.state == State.ORDER_INTENT:
        advance(bench, second)

    assert (first.issuance.state, second.issuance.state) == (State.ORDERED, State.ORDERED)
