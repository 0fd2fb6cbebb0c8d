"""The account used at a CA: found in the database, or made once.

The key is committed before newAccount. Whoever repeats newAccount with the same key gets the same
account (RFC 8555 §7.3.1), so a crash or a race in between costs nothing.
"""

import threading
from dataclasses import dataclass, field

from certworker.ca.client import Account, Client, ExternalAccount
from certworker.ca.keys import AccountKey
from certworker.clock import Clock
from certworker.errors import AccountGone, TermsNotAgreed
from certworker.store import accounts
from certworker.store.accounts import StoredAccount
from certworker.store.database import Database
from certworker.store.seal import Sealer


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


class Accounts:
    """Hands out the account to order with; opened once, then kept."""

    def __init__(self, db: Database, client: Client, sealer: Sealer, clock: Clock, registration: Registration) -> None:
        self._db = db
        self._client = client
        self._sealer = sealer
        self._clock = clock
        self._registration = registration
        self._lock = threading.Lock()
        self._opened: dict[str, Account] = {}

    @property
    def directory_url(self) -> str:
        """The CA that these accounts are at."""
        return self._registration.directory_url

    def default(self) -> tuple[str, Account]:
        """Return id and account for new orders, registering it if that has not been done.

        Raises TermsNotAgreed before a key is made, or what the CA says to newAccount.
        """
        with self._lock:
            stored = self._find()
            if stored is None:
                stored = self._add()
            self._seal(stored)
            if stored.account_url is None:
                stored = self._register(stored)
            return stored.id, self._open(stored)

    def get(self, account_id: str) -> Account:
        """Return the account that an order was made with, or raise AccountGone."""
        with self._lock:
            if account_id not in self._opened:
                stored = self._db.read(lambda tx: accounts.find(tx, account_id)) if account_id else None
                if stored is None:
                    raise AccountGone("the account of this order was deleted from acme_accounts")
                self._open(stored)
            return self._opened[account_id]

    def recover(self, account_id: str) -> bool:
        """The CA does not know the account's URL: find it by its key, or let it be made again with the same key.

        Made again only at a private or test CA, which may have been reset; at a public one a new URL
        would break CAA records that name the old one (RFC 8657 §3), so a person decides. Return whether
        it can go on.
        """
        with self._lock:
            stored = self._db.read(lambda tx: accounts.find(tx, account_id))
            if stored is None:
                return True  # there is nothing to recover: the next order takes another one
            self._opened.pop(account_id, None)
            found = self._client.find_account(AccountKey.from_pem(stored.open_key(self._sealer)))
            if found is None and not self._registration.private_ca:
                return False
            now, url = self._clock(), None if found is None else found.url
            self._db.write(lambda tx: accounts.record_moved(tx, account_id, url, now))
            return True

    def _seal(self, stored: StoredAccount) -> None:
        """Seal a key that another program wrote as plain PEM."""
        if self._sealer.sealing and not stored.sealed:
            self._db.write(lambda tx: accounts.seal(tx, stored, self._sealer))

    def _find(self) -> StoredAccount | None:
        return self._db.read(lambda tx: accounts.find_default(tx, self._registration.directory_url))

    def _add(self) -> StoredAccount:
        asked = self._registration
        terms = self._client.directory().terms_of_service
        if terms and not asked.terms_agreed:
            raise TermsNotAgreed(terms)
        key_pem, kid = AccountKey.generate().to_pem(), asked.external.kid if asked.external else None
        now = self._clock()
        self._db.write(
            lambda tx: accounts.add(tx, asked.directory_url, key_pem, list(asked.contacts), kid, self._sealer, now)
        )
        stored = self._find()
        assert stored is not None, "we or another worker have just added it"
        return stored

    def _register(self, stored: StoredAccount) -> StoredAccount:
        asked = self._registration
        key = AccountKey.from_pem(stored.open_key(self._sealer))
        made = self._client.new_account(key, asked.contacts, asked.terms_agreed, asked.external)
        agreed_at = self._clock() if asked.terms_agreed else None
        self._db.write(lambda tx: accounts.record_registered(tx, stored.id, made.url, agreed_at))
        found = self._db.read(lambda tx: accounts.find(tx, stored.id))
        assert found is not None, "nothing deletes accounts"
        return found

    def _open(self, stored: StoredAccount) -> Account:
        opened = self._opened.get(stored.id)
        if opened is None or opened.url != (stored.account_url or ""):
            key = AccountKey.from_pem(stored.open_key(self._sealer))
            self._opened[stored.id] = Account(stored.account_url or "", key)
        return self._opened[stored.id]
