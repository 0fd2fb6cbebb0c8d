"""The account used at a CA: found in the database, made once, and found again when the CA has lost or moved it.

The key is committed before newAccount. Whoever repeats newAccount with the same key gets the same
account (RFC 8555 §7.3.1), so a crash or a race in between costs nothing. For the same reason the keys in the
row are all that is needed to find out what is true: the CA says which of them has an account, and where.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from certworker.ca.client import Account, Client, ExternalAccount
from certworker.ca.keys import AccountKey
from certworker.clock import Clock
from certworker.core.budget import Limits, charges_of_account
from certworker.errors import (
    AccountDeactivated,
    AccountForgotten,
    AccountGone,
    InputError,
    OverBudget,
    ProblemReported,
    SealError,
    TermsNotAgreed,
)
from certworker.store import accounts, audit, budget
from certworker.store.accounts import StoredAccount
from certworker.store.database import Database, Transaction
from certworker.store.seal import Sealer

_log = logging.getLogger(__name__)

_SIGNATURE_REFUSED = "malformed"
"""What Pebble and Boulder say of a request that is signed with the key that the account had before."""
_UNKNOWN = "accountDoesNotExist"
_UNAUTHORIZED = "unauthorized"
_REFUSALS = frozenset([_SIGNATURE_REFUSED, _UNKNOWN, _UNAUTHORIZED])
_DEFAULT = "default"
"""Stands for its id while that is asked for."""
_DELETED = "the account of this order was deleted from acme_accounts"
_PINS = "CAA records that name the old URL as accounturi (RFC 8657 §3) have to name the new one"
_EVENTS = {
    "account.forgotten": (logging.ERROR, f"the CA had forgotten it; it was made again with the same key; {_PINS}"),
    "account.moved": (logging.ERROR, f"the CA has it elsewhere now; {_PINS}"),
    "account.key_changed": (logging.INFO, "nothing to do"),
}


@dataclass(frozen=True, slots=True)
class Registration:
    """What an account is made with."""

    directory_url: str
    contacts: tuple[str, ...] = ()
    """`mailto:` URLs."""
    terms_agreed: bool = False
    external: ExternalAccount | None = field(default=None, repr=False)
    private_ca: bool = False
    """Whether an account that the CA has forgotten is registered again without asking a person."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Found:
    """Which key of a row has an account at the CA, and where."""

    stored_key: str
    account: Account


class Accounts:
    """Hands out the accounts to order with; opened once, then kept.

    Whoever needs an account that is open waits for nobody. Of those who need one that the CA has to be asked
    about, one thread asks, and the others get what it got.
    """

    def __init__(self, db: Database, client: Client, sealer: Sealer, clock: Clock, registration: Registration) -> None:
        self.db = db
        self.client = client
        self.sealer = sealer
        self.clock = clock
        self.registration = registration
        self._used: str | None = None
        self._opened: dict[str, tuple[str, Account]] = {}
        """By id, with the stored key that it was opened from."""
        self._asking: dict[str, Future[StoredAccount]] = {}
        self._lock = threading.Lock()
        """For `_asking`; nothing slow is done while it is held."""

    @property
    def directory_url(self) -> str:
        """The CA that these accounts are at."""
        return self.registration.directory_url

    # -- for issuances --------------------------------------------------------------------------------

    def default(self) -> tuple[str, Account]:
        """Return id and account for new orders, registering it if that has not been done.

        Raises TermsNotAgreed before a key is made, OverBudget before newAccount, AccountDeactivated, or what
        the CA says to newAccount.
        """
        stored = self._alone(_DEFAULT, lambda: self.find_default() or self.add())
        return stored.id, self._ready(stored)

    def used(self) -> str:
        """Return the id of the account that new orders were made with last, or what `default` says.

        Asks neither the database nor the CA again: whoever orders asks `is_default` in the transaction that intends it.
        """
        if self._used is None:
            self._used, _ = self.default()
        return self._used

    def is_default(self, tx: Transaction, account_id: str) -> bool:
        """Say whether new orders are still made with this account, as it was opened here."""
        stored = accounts.find_default(tx, self.directory_url)
        if stored is None or stored.id != account_id or stored.deactivated_at is not None:
            return False
        return not self._is_open_question(stored) and self._is_opened(stored)

    def look_again(self) -> None:
        """Let `used` ask: orders are made with another account by now, or it has another key."""
        self._used = None

    def get(self, account_id: str) -> Account:
        """Return the account that an order was made with, or raise AccountGone."""
        kept = self._opened.get(account_id)
        if kept is not None:
            return kept[1]
        stored = self._read(account_id)
        if stored is None:
            raise AccountGone(_DELETED)
        return self._ready(stored)

    def publishing_key(self, tx: Transaction, account_id: str) -> AccountKey | None:
        """Return the key to make key authorizations with, None while it is being changed: then publish nothing.

        Asked in the transaction that publishes, which holds the account's row until its commit: a change of
        the key sees what was published before, and waits for the CA to be done with it. Raises AccountGone.
        """
        stored = accounts.hold(tx, account_id)
        if stored is None:
            raise AccountGone(_DELETED)
        return None if stored.is_rolling(self.clock()) else self.open(stored).key

    def thumbprint(self, tx: Transaction) -> str | None:
        """Return the thumbprint of the key that new orders are made with, None while there is none for certain."""
        stored = accounts.find_default(tx, self.directory_url)
        if stored is None or stored.is_rolling(self.clock()):
            return None
        try:
            return self.open(stored).key.thumbprint
        except (InputError, SealError):
            return None  # every issuance says so

    def recover(self, account_id: str, refused: Account, code: str) -> bool:
        """The CA answered with the error `code` to what `refused` signed: say whether the account was why.

        True: it has another key or URL by now, or was made again, and the same request may be tried once
        more. An account that the CA has forgotten is made again only at a private or test CA, which may have
        been reset; at a public one a new URL would break CAA records that name the old one (RFC 8657 §3), so
        AccountForgotten leaves it to a person, as AccountDeactivated does. AccountGone: another account is
        used now.
        """
        if code not in _REFUSALS:
            return False
        stored = self._read(account_id)
        if stored is None:
            return True  # the next try says so
        self.refuse_deactivated(stored)
        if stored.account_url is not None and self.open(stored) != refused:
            return True
        if code == _SIGNATURE_REFUSED and stored.pending_key is None:
            return False
        try:
            now = self.open(self.settle(stored))
        except AccountDeactivated:
            self._refuse_replaced(stored)
            raise
        return code == _UNKNOWN or now != refused

    # -- rows and the CA ------------------------------------------------------------------------------

    def find_default(self) -> StoredAccount | None:
        """Return the account used for new orders, None if there is none yet."""
        return self.db.read(lambda tx: accounts.find_default(tx, self.directory_url))

    def add(self, in_place_of: StoredAccount | None = None, actor: str = audit.WORKER) -> StoredAccount:
        """Commit a key for the default account, the first one or `in_place_of` another; TermsNotAgreed before."""
        asked = self.registration
        self._check_terms()
        key_pem, kid = AccountKey.generate().to_pem(), asked.external.kid if asked.external else None
        contacts, now = list(asked.contacts), self.clock()

        def insert(tx: Transaction) -> None:
            if in_place_of is None:
                accounts.add(tx, asked.directory_url, key_pem, contacts, kid, self.sealer, now)
            else:
                accounts.add_in_place(tx, in_place_of, key_pem, contacts, kid, self.sealer, now, actor=actor)

        self.db.write(insert)
        stored = self.find_default()
        assert stored is not None, "we or another worker have just added it"
        return stored

    def open(self, stored: StoredAccount) -> Account:
        """Return a registered account as requests are signed with it."""
        if not self._is_opened(stored):
            account = Account(stored.account_url or "", self.read_key(stored, stored.key))
            self._opened[stored.id] = stored.key or "", account
        return self._opened[stored.id][1]

    def _is_opened(self, stored: StoredAccount) -> bool:
        kept = self._opened.get(stored.id)
        return kept is not None and kept[0] == stored.key and kept[1].url == (stored.account_url or "")

    def read_key(self, stored: StoredAccount, stored_key: str | None) -> AccountKey:
        """Return one of the row's keys; InputError or SealError when it cannot be used."""
        pem = stored.open(stored_key, self.sealer)
        try:
            return AccountKey.from_pem(pem)
        except InputError as error:
            raise InputError(f"acme_accounts {stored.id}: {error}") from None

    def settle(
        self, stored: StoredAccount, *, make_again: bool | None = None, actor: str = audit.WORKER
    ) -> StoredAccount:
        """Ask the CA about an account, record what is true, and return the row as it is then.

        One that never was registered is registered now. One that the CA has forgotten is made again with the
        same key if `make_again` (default: at a private CA), else AccountForgotten.
        """
        may_make = self.registration.private_ca if make_again is None else make_again
        return self._alone(stored.id, lambda: self._settle(stored.id, may_make, actor))

    def record(self, asked: StoredAccount, found: Found, actor: str, *, made_again: bool = False) -> None:
        """Keep what the CA said of an account; whoever watches the log is told what follows from it."""
        key, account, now = found.stored_key, found.account, self.clock()
        done = self.db.write(
            lambda tx: accounts.record_found(
                tx, asked, key, account.url, now, thumbprint=account.key.thumbprint, made_again=made_again, actor=actor
            )
        )
        for event in done:
            level, hint = _EVENTS[event]
            urls = {"before": asked.account_url, "after": account.url}
            _log.log(level, event, extra={"account": asked.id, **urls, "hint": hint})

    def refuse_deactivated(self, stored: StoredAccount) -> None:
        """Raise AccountDeactivated for an account that was given up, AccountGone if another one is used now."""
        if stored.deactivated_at is not None:
            self._refuse_replaced(stored)
            raise AccountDeactivated(f"account {stored.account_url} was deactivated")

    def _ready(self, stored: StoredAccount) -> Account:
        """Return the account, after what has to be done before it can be used."""
        self.refuse_deactivated(stored)
        if self.sealer.sealing and not stored.sealed:
            self.db.write(lambda tx: accounts.seal(tx, stored, self.sealer))
        if self._is_open_question(stored):
            stored = self._alone(stored.id, lambda: self._answer(stored))
        return self.open(stored)

    def _is_open_question(self, stored: StoredAccount) -> bool:
        return stored.account_url is None or stored.is_overdue(self.clock())

    def _answer(self, stored: StoredAccount) -> StoredAccount:
        now = self._read(stored.id)
        if now is not None and not self._is_open_question(now):
            return now  # by another thread or worker, since it was read
        return self._settle(stored.id, self.registration.private_ca, audit.WORKER)

    def _read(self, account_id: str) -> StoredAccount | None:
        return self.db.read(lambda tx: accounts.find(tx, account_id)) if account_id else None

    def _settle(self, account_id: str, may_make: bool, actor: str) -> StoredAccount:
        stored = self._read(account_id)
        if stored is None:
            raise AccountGone(_DELETED)
        first = stored.account_url is None
        found = None if first and stored.pending_key is None else self._look_up(stored)
        if found is not None:
            self.record(stored, found, actor)
        elif first:
            made = self._make(stored)
            url, now = made.account.url, self.clock()
            agreed_at = now if self.registration.terms_agreed else None
            asked = None if actor == audit.WORKER else (actor, now)
            self.db.write(lambda tx: accounts.record_registered(tx, account_id, url, agreed_at, asked))
            _log.info("account.registered", extra={"account": account_id, "url": url})
        elif may_make:
            self.record(stored, self._make(stored), actor, made_again=True)
        else:
            raise AccountForgotten(f"the CA knows neither account {stored.account_url} nor its key any more")
        after = self._read(account_id)
        if after is None:
            raise AccountGone(_DELETED)
        self.open(after)  # whoever asks next has it
        return after

    def _look_up(self, stored: StoredAccount) -> Found | None:
        """Return which key of the row has an account, the one that it is being changed to before the other."""
        if stored.pending_key is None:
            return self._find(stored, stored.key)
        new = self._find(stored, stored.pending_key)
        if new is not None and new.account.url == stored.account_url:
            return new
        # A new key with another account, while the old one still has ours, is not ours to take. And if neither has
        # one, a change under way may have come between the two questions.
        return self._find(stored, stored.key) or new or self._find(stored, stored.pending_key)

    def _find(self, stored: StoredAccount, stored_key: str | None) -> Found | None:
        key = self.read_key(stored, stored_key)
        try:
            found = self.client.find_account(key)
        except ProblemReported as error:
            if error.problem.code != _UNAUTHORIZED:
                raise
            raise AccountDeactivated(f"account {stored.account_url} is deactivated: {error}") from None
        return None if found is None else Found(stored_key or "", found)

    def _make(self, stored: StoredAccount) -> Found:
        """Send newAccount with the key of the row, if our own limits allow it."""
        asked, key = self.registration, self.read_key(stored, stored.key)
        self._check_terms()  # and with them that the CA is there: one that is not would cost tokens for nothing
        charges, now = charges_of_account(asked.limits), self.clock()
        refusal = self.db.write(lambda tx: budget.spend(tx, asked.directory_url, charges, stored.id, now))
        if refusal is not None:
            raise OverBudget(refusal.bucket, refusal.until - now)
        made = self.client.new_account(key, asked.contacts, asked.terms_agreed, asked.external)
        return Found(stored.key or "", made)

    def _check_terms(self) -> None:
        terms = self.client.directory().terms_of_service
        if terms and not self.registration.terms_agreed:
            raise TermsNotAgreed(terms)

    def _refuse_replaced(self, stored: StoredAccount) -> None:
        used = self.find_default()
        if used is not None and used.id != stored.id:
            raise AccountGone(f"account {stored.account_url} is deactivated, and another one is used now")

    def _alone(self, account_id: str, ask: Callable[[], StoredAccount]) -> StoredAccount:
        """Let one thread ask about an account; whoever comes meanwhile gets what it got, an error too."""
        with self._lock:
            running = self._asking.get(account_id)
            asking = self._asking.setdefault(account_id, Future())
        if running is None:
            try:
                asking.set_result(ask())
            except BaseException as error:  # noqa: BLE001 - raised below, here and for those who wait
                asking.set_exception(error)
            finally:
                with self._lock:
                    del self._asking[account_id]
        return asking.result()
