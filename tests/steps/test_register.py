"""The account: made once, found again, and what happens when the CA has lost, moved or refused it."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

import pytest

from certworker.ca.client import Account, Client, ExternalAccount
from certworker.ca.keys import AccountKey
from certworker.ca.problems import Endpoint, classify
from certworker.ca.transport import ANSWER_LIMIT, Http, Response
from certworker.core.budget import Limit, Limits
from certworker.core.retry import ErrorClass
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    AccountGone,
    CaError,
    InputError,
    OverBudget,
    ProblemReported,
    TransportFault,
)
from certworker.steps.account import Registered, deactivate, register
from certworker.steps.register import Accounts
from certworker.store import accounts, audit
from certworker.store.accounts import StoredAccount
from certworker.store.database import Database
from tests.ca.fake_state import FakeAccount

from .world import World

UNKNOWN = "accountDoesNotExist"
EAB_SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"


class Hooked:
    """The fake CA, with something done before each request for a path."""

    def __init__(self, ca: Http) -> None:
        self._ca = ca
        self.before: dict[str, Callable[[], object]] = {}

    def request(
        self, method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        max_bytes: int = ANSWER_LIMIT, repeatable: bool = False,
    ) -> Response:  # fmt: skip
        for path, act in list(self.before.items()):
            if method == "POST" and fnmatchcase(urlsplit(url).path, path):
                act()
        return self._ca.request(method, url, body, headers, max_bytes=max_bytes, repeatable=repeatable)


def worker(world: World, http: Http | None = None) -> Accounts:
    """Return the accounts as a process of its own has them: nothing remembered."""
    client = Client(world.ca.directory_url, http or world.ca.http, world.clock)
    return Accounts(world.db, client, world.sealer, world.clock, world.registration)


def stored(world: World) -> StoredAccount:
    found = world.db.read(lambda tx: accounts.find_default(tx, world.ca.directory_url))
    assert found is not None
    return found


def at_ca(world: World) -> FakeAccount:
    (only,) = world.ca.accounts.values()
    return only


def audited(world: World) -> list[str]:
    return [row["action"] for row in reversed(world.db.read(audit.newest))]


def reset_ca(world: World) -> None:
    """Restart the CA, and let somebody else have the first account: URLs are given out in order."""
    world.ca.restart()
    somebody = Client(world.ca.directory_url, world.ca.http, world.clock)
    somebody.new_account(AccountKey.generate(), [], True, None)


def lost(path: str) -> TransportFault:
    return TransportFault("reset", f"https://ca.test{path}", "the connection was reset")


def in_threads(acts: list[Callable[[], object]]) -> list[object]:
    """Run them all at once; an error is a result."""
    ready = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> object:
        ready.wait(20)
        try:
            return act()
        except CaError as error:
            return error

    with ThreadPoolExecutor(len(acts)) as threads:
        return list(threads.map(run, acts))


# -- registration -------------------------------------------------------------------------------------


def test_the_key_is_committed_before_the_ca_hears_of_it(world: World) -> None:
    """Whoever comes after a crash sends the same one."""
    hooked = Hooked(world.ca.http)
    keys = []
    hooked.before["/new-account"] = lambda: keys.append(stored(world).open(stored(world).key, world.sealer))
    world.ca.fail_next("POST", "/new-account", raises=lost("/new-account"), after=True, times=2)
    for _ in range(2):
        with pytest.raises(TransportFault):
            worker(world, hooked).default()
        assert stored(world).account_url is None

    account_id, account = worker(world, hooked).default()

    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert account == Account(at_ca(world).url, AccountKey.from_pem(keys[0]))
    assert stored(world).account_url == account.url
    assert (stored(world).id, world.count("acme_accounts")) == (account_id, 1)
    assert audited(world) == []


@pytest.mark.parametrize("after", [False, True], ids=["never-arrived", "answer-lost"])
def test_racing_workers_end_with_one_account(world: World, after: bool) -> None:
    """Four workers with four threads each, and lost answers: one row, one account, one key."""
    world.ca.fail_next("POST", "/new-account", raises=lost("/new-account"), after=after, times=3)
    workers = [worker(world) for _ in range(4)]
    results = in_threads([one.default for one in workers for _ in range(4)])
    for _ in range(4):
        if any(isinstance(result, CaError) for result in results):
            results = in_threads([one.default for one in workers])

    assert len(set(map(str, results))) == 1, results
    assert world.count("acme_accounts") == 1
    assert at_ca(world).url == stored(world).account_url


def test_an_open_account_waits_for_nobody(world: World) -> None:
    """While newAccount hangs for another account; one thread asks, the others get what it got."""
    hooked = Hooked(world.ca.http)
    ours = worker(world, hooked)
    first, account = ours.default()
    world.execute("UPDATE acme_accounts SET is_default = false, directory_url = 'https://other.test/dir'")
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait(20)

    hooked.before["/new-account"] = hang

    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(ours.default) for _ in range(6)]
        assert hangs.wait(20)
        assert ours.get(first) is account
        assert not any(one.done() for one in waiting)
        goes_on.set()
        results = [one.result(20) for one in waiting]

    assert len({account_id for account_id, _ in results}) == 1
    assert world.ca.count("POST", "/new-account") == len(world.ca.accounts) == 2
    assert len(set(map(id, (account for _, account in results)))) == 1


def test_threads_that_wait_share_an_error(world: World) -> None:
    """A CA that refuses newAccount is asked by one of them; afterwards it is asked again, with the same key (A36)."""
    hooked = Hooked(world.ca.http)
    ours = worker(world, hooked)
    ours.add()

    def others_wait() -> None:
        give_up_at = time.monotonic() + 20
        while sum(len(vars(asking._condition)["_waiters"]) for asking in ours._asking.values()) < 7:
            assert time.monotonic() < give_up_at
            time.sleep(0.001)

    hooked.before["/new-account"] = others_wait
    world.ca.fail_next("POST", "/new-account", problem="rateLimited", status=429, headers={"Retry-After": "60"})

    results = in_threads([ours.default] * 8)

    assert {type(result) for result in results} == {ProblemReported}
    assert world.ca.count("POST", "/new-account") == 1
    key = stored(world).key
    hooked.before.clear()
    ours.default()
    assert stored(world).key == key
    assert world.count("acme_accounts") == len(world.ca.accounts) == 1


def test_our_own_limit_holds_new_accounts_back(world: World) -> None:
    """One token an hour: the second newAccount is not sent, and the wait is told."""
    limits = Limits(accounts=Limit(1, timedelta(hours=1)))
    world.registration = replace(world.registration, limits=limits)
    world.ca.fail_next("POST", "/new-account", raises=lost("/new-account"))
    with pytest.raises(TransportFault):
        worker(world).default()
    world.clock.move(timedelta(minutes=20))

    with pytest.raises(OverBudget) as caught:
        worker(world).default()

    failure = classify(caught.value, Endpoint.NEW_ACCOUNT)
    assert (failure.error_class, failure.retry_after) == (ErrorClass.RATE_LIMITED, timedelta(minutes=40))
    assert world.ca.count("POST", "/new-account") == 1
    world.clock.move(timedelta(minutes=40))
    worker(world).default()
    assert len(world.ca.accounts) == 1


def test_a_ca_that_is_not_there_costs_no_token(world: World) -> None:
    """A machine that starts before its network: the first newAccount is sent when it can be."""
    limits = Limits(accounts=Limit(1, timedelta(hours=1)))
    world.registration = replace(world.registration, limits=limits)
    worker(world).add()
    world.ca.fail_next("GET", "/directory", raises=lost("/directory"), times=3)
    for _ in range(3):
        with pytest.raises(TransportFault):
            worker(world).default()

    worker(world).default()

    assert len(world.ca.accounts) == 1


# -- recovery -----------------------------------------------------------------------------------------


def test_a_forgotten_account_is_made_again_at_a_private_ca(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A38: the same key, another URL, an audit row, and an alert that names CAA."""
    world.registration = replace(world.registration, private_ca=True)
    ours = worker(world)
    account_id, before = ours.default()
    reset_ca(world)

    assert ours.recover(account_id, before, UNKNOWN)

    after = ours.get(account_id)
    assert after.key == before.key
    assert after.url != before.url
    assert after.url in world.ca.accounts
    assert audited(world) == ["account.forgotten"]
    (alert,) = caplog.records
    assert (alert.levelname, alert.getMessage()) == ("ERROR", "account.forgotten")
    assert "accounturi" in alert.__dict__["hint"]


def test_a_forgotten_account_at_a_public_ca_is_a_persons(world: World) -> None:
    """Nothing is made, nothing is changed, the command is named; `register` then makes it again with the same key."""
    ours = worker(world)
    account_id, before = ours.default()
    row = stored(world)
    reset_ca(world)

    with pytest.raises(AccountForgotten) as caught:
        ours.recover(account_id, before, UNKNOWN)

    failure = classify(caught.value, Endpoint.NEW_ORDER)
    assert failure.error_class is ErrorClass.ACTION_REQUIRED
    assert "`certworker account register`" in failure.hint
    assert "accounturi" in failure.hint
    assert len(world.ca.accounts) == 1
    assert (stored(world), audited(world)) == (row, [])

    done = register(worker(world))
    assert done.outcome == "recovered"
    assert ours.recover(account_id, before, UNKNOWN)
    assert ours.get(account_id) == Account(str(done.account.account_url), before.key)
    assert audited(world) == ["account.forgotten"]


def test_an_account_that_moved_is_found_by_its_key(world: World) -> None:
    """Whatever kind of CA: it is the same account, elsewhere (RFC 8555 §7.3.1)."""
    ours = worker(world)
    account_id, before = ours.default()
    account = world.ca.accounts.pop(before.url)
    account.url = "https://ca.test/account/moved"
    world.ca.accounts[account.url] = account

    assert ours.recover(account_id, before, UNKNOWN)

    assert ours.get(account_id) == Account(account.url, before.key)
    assert audited(world) == ["account.moved"]


def test_many_recover_at_once_with_one_result(world: World) -> None:
    """Four workers with four threads each: one account, one audit row, and all of them may try again."""
    world.registration = replace(world.registration, private_ca=True)
    workers = [worker(world) for _ in range(4)]
    opened = [one.default() for one in workers]
    reset_ca(world)

    def recover(ours: Accounts, account_id: str, refused: Account) -> Callable[[], object]:
        return lambda: ours.recover(account_id, refused, UNKNOWN)

    pairs = zip(workers, opened, strict=True)
    results = in_threads([recover(ours, *one) for ours, one in pairs for _ in range(4)])

    assert results == [True] * 16
    assert len(world.ca.accounts) == 2
    assert len({ours.default() for ours in workers}) == 1
    # A worker that finds what another has just made, and says so first, takes it for moved.
    assert audited(world) in (["account.forgotten"], ["account.moved"])
    assert world.count("acme_accounts") == 1


def test_a_refusal_that_is_not_the_accounts_changes_nothing(world: World) -> None:
    """A malformed order costs no request more, an unauthorized one a single question; the account stays as it is."""
    ours = worker(world)
    account_id, account = ours.default()
    row, asked = stored(world), world.ca.count("POST", "/new-account")

    assert not ours.recover(account_id, account, "rejectedIdentifier")
    assert not ours.recover(account_id, account, "malformed")
    assert world.ca.count("POST", "/new-account") == asked
    assert not ours.recover(account_id, account, "unauthorized")
    assert world.ca.count("POST", "/new-account") == asked + 1
    assert stored(world) == row


def test_what_another_worker_has_found_out_is_taken_over(world: World) -> None:
    """Its row says so: nobody asks the CA twice, and it costs a look at the row."""
    ours, other = worker(world), worker(world)
    account_id, refused = ours.default()
    assert other.get(account_id) == refused
    reset_ca(world)
    register(other)
    asked = world.ca.count("POST", "/new-account")

    for code in ("accountDoesNotExist", "unauthorized", "malformed"):
        assert ours.recover(account_id, refused, code)

    assert world.ca.count("POST", "/new-account") == asked
    assert ours.get(account_id) == other.get(account_id)


def test_an_account_whose_row_is_gone_is_said_at_the_next_use(world: World) -> None:
    """Another program deleted it."""
    ours = worker(world)
    account_id, refused = ours.default()
    world.execute("DELETE FROM acme_accounts")

    assert ours.recover(account_id, refused, UNKNOWN)
    with pytest.raises(AccountGone):
        worker(world).get(account_id)
    with pytest.raises(AccountGone):
        world.db.write(lambda tx: ours.publishing_key(tx, account_id))


# -- deactivated accounts -----------------------------------------------------------------------------


def test_a_deactivated_account_never_gets_a_new_key_by_itself(world: World) -> None:
    """A40: also at a private CA; told with the command that makes another one, and that is a person's."""
    world.registration = replace(world.registration, private_ca=True)
    ours = worker(world)
    account_id, account = ours.default()
    at_ca(world).status = "deactivated"

    with pytest.raises(AccountDeactivated) as caught:
        ours.recover(account_id, account, "unauthorized")
    failure = classify(caught.value, Endpoint.ORDER)
    assert failure.error_class is ErrorClass.ACTION_REQUIRED
    assert "`certworker account register --new-key`" in failure.hint
    with pytest.raises(AccountDeactivated):
        register(worker(world))
    assert (world.count("acme_accounts"), len(world.ca.accounts)) == (1, 1)

    done = register(worker(world), new_key=True)

    assert done.outcome == "registered"
    assert done.account.id != account_id
    assert ours.default()[0] == done.account.id
    assert (world.count("acme_accounts"), len(world.ca.accounts)) == (2, 2)
    with pytest.raises(AccountGone):  # so that its orders are made anew with the other one
        ours.recover(account_id, account, "unauthorized")
    assert audited(world) == ["account.replaced", "account.registered"]


def test_deactivating_is_remembered(world: World) -> None:
    """The CA is asked no more; its lost answer is found out by repeating."""
    ours = worker(world)
    account_id, account = ours.default()
    world.ca.fail_next("POST", "/account/*", raises=lost("/account/1"), after=True)
    with pytest.raises(TransportFault):
        deactivate(worker(world))
    assert at_ca(world).status == "deactivated"

    done = deactivate(worker(world))

    assert done.deactivated_at == world.clock()
    assert deactivate(worker(world)) == done
    asked = len(world.ca.requests)
    for use in (ours.default, worker(world).default, lambda: worker(world).get(account_id),
                lambda: ours.recover(account_id, account, "unauthorized")):  # fmt: skip
        with pytest.raises(AccountDeactivated):
            use()
    assert len(world.ca.requests) == asked
    assert audited(world) == ["account.deactivated"]


def test_an_account_in_use_is_deactivated_by_force_only(world: World) -> None:
    """An open issuance would lose its order."""
    world.issue("a.test")
    world.add_policy("b.test")
    world.take_over()
    world.ca.fail_next("POST", "/new-order", status=503, problem="serverInternal")
    world.work()

    with pytest.raises(Exception, match=r"1 open issuance\(s\) use it; wait until they end, or give --force"):
        deactivate(worker(world))
    assert at_ca(world).status == "valid"
    assert deactivate(worker(world), force=True).deactivated_at is not None
    assert at_ca(world).status == "deactivated"


# -- registering by hand ------------------------------------------------------------------------------


def outcome(world: World, *, new_key: bool = False) -> Registered:
    return register(worker(world), new_key=new_key)


def test_registering_may_be_repeated(world: World) -> None:
    """The first time it registers, then there is nothing to do; new contacts are told to the CA."""
    assert outcome(world).outcome == "registered"
    assert at_ca(world).contact == ["mailto:ops@example.com"]
    assert outcome(world).outcome == "unchanged"
    world.registration = replace(world.registration, contacts=("mailto:new@example.com",))
    assert outcome(world).outcome == "updated"
    assert outcome(world).outcome == "unchanged"

    assert at_ca(world).contact == ["mailto:new@example.com"]
    assert stored(world).contact == ["mailto:new@example.com"]
    assert audited(world) == ["account.registered", "account.contact"]
    assert {row["actor"] for row in world.db.read(audit.newest)} == {"operator"}


def test_an_account_in_order_gets_no_successor(world: World) -> None:
    """--new-key is for one that cannot be used any more; the message says how a key is changed."""
    outcome(world)
    row = stored(world)
    with pytest.raises(InputError, match="certworker account rollover"):
        outcome(world, new_key=True)
    assert (stored(world), world.count("acme_accounts")) == (row, 1)


@pytest.mark.parametrize("case", ["forgotten", "unregistered", "no key", "not ours to open"])
def test_an_account_that_cannot_be_used_gets_a_successor(world: World, case: str) -> None:
    """Its row stays as it was, unmarked."""
    if case == "unregistered":
        worker(world).add()
    else:
        outcome(world)
    if case == "forgotten":
        reset_ca(world)
    before = stored(world)
    broken = {"no key": '{"account_url": "https://ca.test/account/1"}',
              "not ours to open": '{"key": "cw1.AAAA", "account_url": "https://ca.test/account/1"}'}  # fmt: skip
    if case in broken:
        world.execute("UPDATE acme_accounts SET credentials_json = :broken", broken=broken[case])
        before = stored(world)

    done = outcome(world, new_key=True)

    assert done.outcome == "registered"
    assert done.account.id != before.id
    assert done.account.account_url in world.ca.accounts
    assert worker(world).default()[0] == done.account.id
    assert world.db.read(lambda tx: accounts.find(tx, before.id)) == before


@pytest.mark.parametrize("problem", ["invalidContact", "unsupportedContact", "externalAccountRequired"])
def test_what_the_ca_refuses_is_told(world: World, problem: str) -> None:
    """A45, A46: with the setting to change; the key that was committed is used the next time."""
    world.ca.fail_next("POST", "/new-account", problem=problem)
    with pytest.raises(ProblemReported) as caught:
        outcome(world)
    failure = classify(caught.value, Endpoint.NEW_ACCOUNT)
    assert failure.error_class is ErrorClass.ACTION_REQUIRED
    assert "ACME_" in failure.hint
    key = stored(world).key

    assert outcome(world).outcome == "registered"
    assert stored(world).key == key


def test_external_credentials_are_neither_kept_nor_shown(world: World) -> None:
    """A46: the key id is in the row, the secret nowhere: not in the row, an error or a repr."""
    world.ca.eab_keys = {"kid-1": b"0123456789abcdef0123456789abcdef"}
    wrong = ExternalAccount("kid-1", EAB_SECRET[::-1])
    world.registration = replace(world.registration, external=wrong)
    with pytest.raises(ProblemReported) as caught:
        outcome(world)
    said = f"{caught.value!r} {classify(caught.value, Endpoint.NEW_ACCOUNT)} {world.registration!r} {stored(world)!r}"
    assert wrong.hmac_key not in said

    world.registration = replace(world.registration, external=ExternalAccount("kid-1", EAB_SECRET))
    outcome(world)
    ((document,),) = world.rows("SELECT CAST(credentials_json AS TEXT) FROM acme_accounts")
    assert EAB_SECRET not in document
    assert "kid-1" in document


def test_rows_of_another_program_are_used(db: Database) -> None:
    """Its plain key is sealed, and its account is found at the CA: none is made beside it."""
    world = World(db)
    theirs = AccountKey.generate()
    made = Client(world.ca.directory_url, world.ca.http, world.clock).new_account(theirs, [], True, None)
    world.execute(
        "INSERT INTO acme_accounts (id, directory_url, credentials_json, created_at) VALUES "
        "('7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c11', :url, :credentials, '2026-11-22T12:00:00.000000Z')",
        url=world.ca.directory_url, credentials=f'{{"key": {theirs.to_pem()!r}}}'.replace("'", '"'),
    )  # fmt: skip

    _, account = worker(world).default()

    assert account == made
    assert stored(world).sealed
    assert (world.count("acme_accounts"), len(world.ca.accounts)) == (1, 1)
