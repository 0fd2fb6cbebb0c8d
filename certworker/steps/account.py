"""What a person does with the account that is used at a CA: registers it, changes its key, gives it up.

A change of key has two phases (RFC 8555 §7.3.5). The new key is committed as pending, and from then on no key
authorization is published, because the CA compares it with the key that the account has when it looks. When what
was published before has its verdict, keyChange goes out, and the new key takes the place of the old one in one
transaction. Killed anywhere in between, the row has both keys, and whoever uses the account next asks the CA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from certworker.ca.keys import AccountKey
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    CaError,
    CertworkerError,
    InputError,
    ProblemReported,
    SealError,
)
from certworker.steps.register import Accounts, Found
from certworker.store import accounts
from certworker.store.accounts import StoredAccount
from certworker.store.database import Transaction

OPERATOR = "operator"
ROLLING = timedelta(seconds=90)
"""How long nothing is published after the one who changes the key was last heard of: longer than a request takes."""
_LOOK = timedelta(seconds=1)
_CONFLICT = 409


@dataclass(frozen=True, slots=True)
class Registered:
    """What registering came to."""

    account: StoredAccount
    outcome: Literal["registered", "recovered", "updated", "unchanged"]
    """Recovered: it has another URL or key, or was made again. Updated: the CA was told new contacts."""


def register(used: Accounts, *, new_key: bool = False) -> Registered:
    """Register the default account, or see that the CA still has it and knows its contacts.

    One that the CA has forgotten is made again with the same key. With `new_key` one that cannot be used any
    more (deactivated, forgotten, never registered, its key unusable) gets a successor; its row stays.
    """
    before = used.find_default()
    if before is None or (before.account_url is None and not new_key):
        return Registered(used.settle(before or used.add(), actor=OPERATOR), "registered")
    if before.account_url is None:
        return _replace(used, before)
    try:
        used.refuse_deactivated(before)
        after = used.settle(before, make_again=False, actor=OPERATOR)
    except AccountForgotten:
        if new_key:
            return _replace(used, before)
        return Registered(_tell(used, used.settle(before, make_again=True, actor=OPERATOR)), "recovered")
    except (AccountDeactivated, InputError, SealError):
        if new_key:
            return _replace(used, before)
        raise
    if new_key:
        raise InputError(f"--new-key: account {after.account_url} is in order; `certworker account rollover` "
                         "changes its key")  # fmt: skip
    told = _tell(used, after)
    if (after.account_url, after.key) != (before.account_url, before.key):
        return Registered(told, "recovered")
    return Registered(told, "unchanged" if told is after else "updated")


def roll_over(
    used: Accounts, patience: timedelta, pause: Callable[[timedelta], object], told: Callable[[int], object]
) -> StoredAccount:
    """Give the default account a new key, or end what was begun before; return it as it is then.

    Waits as long as `patience` for the issuances that are being validated; `told` hears how many they are, and
    `pause` waits. May be repeated, and by several at once: all of them send the same new key.
    """
    before = _get_registered(used)
    used.refuse_deactivated(before)
    if before.pending_key is not None:
        after = used.settle(before, make_again=False, actor=OPERATOR)
        if after.key != before.key:
            return after
    sealed = accounts.seal_key(before, AccountKey.generate().to_pem(), used.sealer)
    until = used.clock() + ROLLING
    begun = used.db.write(lambda tx: accounts.begin_rollover(tx, before.id, sealed, until))
    assert begun is not None, "nothing of ours deletes accounts"
    try:
        mine = _await_verdicts(used, begun, patience, pause, told)
    except BaseException:
        used.db.write(lambda tx: accounts.stop_rollover(tx, begun))
        raise
    if mine:
        _change_key(used, begun)
    return used.find_default() or begun


def deactivate(used: Accounts, *, force: bool = False) -> StoredAccount:
    """Give the default account up for good; refused while open issuances use it, unless `force`."""
    before = _get_registered(used)
    if before.deactivated_at is not None:
        return before
    count = used.db.read(lambda tx: accounts.count_open(tx, before.id))
    if count and not force:
        raise CertworkerError(f"account {before.account_url} is not deactivated: {count} open issuance(s) use it; "
                              "wait until they end, or give --force")  # fmt: skip
    try:
        account = used.open(used.settle(before, make_again=False, actor=OPERATOR))
        used.client.deactivate_account(account)
    except AccountDeactivated:
        pass  # by another client, or by this command when its answer was lost
    now = used.clock()
    used.db.write(lambda tx: accounts.record_deactivated(tx, before.id, now, actor=OPERATOR))
    return used.find_default() or before


def _replace(used: Accounts, before: StoredAccount) -> Registered:
    return Registered(used.settle(used.add(in_place_of=before, actor=OPERATOR), actor=OPERATOR), "registered")


def _tell(used: Accounts, account: StoredAccount) -> StoredAccount:
    """Tell the CA the contacts of the settings, if it was told others (RFC 8555 §7.3.2)."""
    contacts = list(used.registration.contacts)
    if account.contact == contacts:
        return account
    used.client.update_contacts(used.open(account), contacts)
    now = used.clock()
    used.db.write(lambda tx: accounts.record_contact(tx, account.id, contacts, now, actor=OPERATOR))
    return used.find_default() or account


def _get_registered(used: Accounts) -> StoredAccount:
    found = used.find_default()
    if found is None or found.account_url is None:
        raise InputError(f"no account is registered at {used.directory_url}: run `certworker account register`, "
                         "or check ACME_DIRECTORY_URL")  # fmt: skip
    return found


def _await_verdicts(
    used: Accounts, begun: StoredAccount, patience: timedelta, pause: Callable[[timedelta], object],
    told: Callable[[int], object],
) -> bool:  # fmt: skip
    """Return when the CA looks at nothing of this account any more; False if somebody else has changed the key."""
    give_up_at = used.clock() + patience

    def look(tx: Transaction) -> int | None:
        mine = accounts.extend_rollover(tx, begun, used.clock() + ROLLING)
        return accounts.count_proving(tx, begun.id) if mine else None

    while proving := used.db.write(look):
        if used.clock() >= give_up_at:
            raise CertworkerError(f"the key of account {begun.account_url} is unchanged: the CA is still validating "
                                  f"{proving} certificate(s) with it; repeat the command later, or with a longer "
                                  "--timeout")  # fmt: skip
        told(proving)
        pause(_LOOK)
    return proving is not None


def _change_key(used: Accounts, begun: StoredAccount) -> None:
    """Send keyChange; if its answer was lost or says no, the CA is asked which key the account has."""
    account, new_key = used.open(begun), used.read_key(begun, begun.pending_key)
    try:
        changed = used.client.change_key(account, new_key)
        used.record(begun, Found(begun.pending_key or "", changed), OPERATOR)
    except CaError as error:
        if _ask_which(used, begun) != begun.pending_key:
            taken = isinstance(error, ProblemReported) and error.problem.status == _CONFLICT
            used.db.write(lambda tx: accounts.stop_rollover(tx, begun, drop=taken))
            raise


def _ask_which(used: Accounts, begun: StoredAccount) -> str | None:
    """Return the key that the account has at the CA, as it is stored."""
    try:
        return used.settle(begun, make_again=False, actor=OPERATOR).key
    except (AccountForgotten, AccountDeactivated):
        used.db.write(lambda tx: accounts.stop_rollover(tx, begun))
        raise
    except CaError as error:
        raise CertworkerError(f"whether account {begun.account_url} has its new key is not known yet: {error}; "
                              "repeat the command, or leave it to the service") from None  # fmt: skip
