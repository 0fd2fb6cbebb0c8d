"""`acme_accounts`: the key before the account, so that an account is never registered twice.

`credentials_json` is `{"key": sealed or PEM, "account_url", "contact", "tos_agreed_at", "eab_kid"}`, and of ours:
`deactivated_at` once the account was given up, and `pending_key`, `pending_until` while its key is changed (RFC 8555
§7.3.5). A pending key stays until the CA has it: a keyChange that arrives late then makes an account's key of one
that is here, not of one that is lost. `pending_until` is the part that ends by itself.

Every change locks its row first: the document is written as a whole.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, bindparam, false, func, select, text, update

from certworker.core.issuance import State
from certworker.errors import InputError
from certworker.store import audit
from certworker.store.prepared import Prepared
from certworker.store.rows import columns_of, insert_new, new_id, to_value
from certworker.store.seal import Sealer, is_sealed
from certworker.store.tables import OPEN, acme_accounts, issuances

_KEYS = ("key", "pending_key")
_OPEN = text(f"issuances.{OPEN}")
_PROVING = (State.VALIDATING,)
"""From key authorization to verdict: the CA compares with the key that the account has by then."""


@dataclass(frozen=True, slots=True)
class StoredAccount:
    """A row of `acme_accounts`; another program may have written anything as its document."""

    id: str
    directory_url: str
    credentials_json: dict[str, Any] = field(repr=False)

    @property
    def account_url(self) -> str | None:
        """None until the CA answered newAccount."""
        return self._text("account_url")

    @property
    def key(self) -> str | None:
        """The key as it is stored: sealed, or PEM; None if there is none."""
        return self._text("key")

    @property
    def pending_key(self) -> str | None:
        """The key that the account is to get, or has got already if the CA's answer was lost."""
        return self._text("pending_key")

    @property
    def contact(self) -> list[str]:
        """`mailto:` URLs."""
        contact = self._document.get("contact")
        return [str(one) for one in contact] if isinstance(contact, list) else []

    @property
    def tos_agreed_at(self) -> datetime | None:
        """When a person's consent to the CA's terms was sent."""
        return self._time("tos_agreed_at")

    @property
    def deactivated_at(self) -> datetime | None:
        """When it was given up for good."""
        return self._time("deactivated_at")

    @property
    def sealed(self) -> bool:
        """Whether every key is sealed; another program may have written plain PEM."""
        return all(is_sealed(key) for key in (self.key, self.pending_key) if key is not None)

    def is_rolling(self, now: datetime) -> bool:
        """Say whether somebody is changing the key right now."""
        until = self._time("pending_until")
        return until is not None and now < until

    def is_overdue(self, now: datetime) -> bool:
        """Say whether somebody began to change the key and did not end it: the CA knows which one it has."""
        until = self._time("pending_until")
        return until is not None and until <= now

    def open(self, key: str | None, sealer: Sealer) -> str:
        """Return one of the row's keys as PEM; InputError if there is none, SealError if it does not open."""
        if key is None:
            raise InputError(f"acme_accounts {self.id}: credentials_json has no key")
        return sealer.open(key, **_place(self.id))

    @property
    def _document(self) -> dict[str, Any]:
        return self.credentials_json if isinstance(self.credentials_json, dict) else {}

    def _text(self, name: str) -> str | None:
        value = self._document.get(name)
        return value if isinstance(value, str) else None

    def _time(self, name: str) -> datetime | None:
        try:
            value = datetime.fromisoformat(self._text(name) or "")
        except ValueError:
            return None
        return value if value.tzinfo is not None else None


@dataclass(frozen=True, slots=True)
class Listed:
    """An account as a person sees it."""

    account: StoredAccount
    created_at: datetime
    used: bool
    """Whether new orders at its CA are made with it."""


# -- looking ------------------------------------------------------------------------------------------


def find_default(tx: Connection, directory_url: str) -> StoredAccount | None:
    """Return the account used for a CA: the one marked, else the oldest."""
    return _first(tx, _DEFAULT, directory=directory_url)


def find(tx: Connection, account_id: str) -> StoredAccount | None:
    """Return one account."""
    return _first(tx, _FIND, account=account_id)


def hold(tx: Connection, account_id: str) -> StoredAccount | None:
    """Return one account, and let nobody change it until the commit; any number may hold it at once."""
    return _first(tx, _HOLD, account=account_id)


def list_all(tx: Connection) -> list[Listed]:
    """Return every account by CA, the one that is used first."""
    query = _accounts().add_columns(acme_accounts.c.created_at)
    listed: list[Listed] = []
    for *values, created_at in tx.execute(query.order_by(acme_accounts.c.directory_url, *_default_first())):
        account = StoredAccount(*values)
        used = not listed or listed[-1].account.directory_url != account.directory_url
        listed.append(Listed(account, created_at, used))
    return listed


def count_open(tx: Connection, account_id: str) -> int:
    """Return how many open issuances have an order with this account, or are about to."""
    return _count(tx, account_id, _OPEN)


def count_proving(tx: Connection, account_id: str) -> int:
    """Return how many have key authorizations out that the CA may compare with the account's key."""
    return _count(tx, account_id, _OPEN, issuances.c.state.in_(_PROVING))


# -- keys and registration ----------------------------------------------------------------------------


def add(
    tx: Connection, directory_url: str, key_pem: str, contact: list[str], eab_kid: str | None, sealer: Sealer,
    now: datetime,
) -> None:  # fmt: skip
    """Insert the default account of a CA, not registered yet, unless another worker just did."""
    if find_default(tx, directory_url) is None:
        _insert_default(tx, directory_url, key_pem, contact, eab_kid, sealer, now)


def add_in_place(
    tx: Connection, replaced: StoredAccount, key_pem: str, contact: list[str], eab_kid: str | None, sealer: Sealer,
    now: datetime, *, actor: str,
) -> None:  # fmt: skip
    """Insert a new default account, unless `replaced` is the default no more; it stays, for what it ordered."""
    _lock(tx, replaced.id)
    used = find_default(tx, replaced.directory_url)
    if used is None or used.id != replaced.id:
        return
    of_ca = acme_accounts.c.directory_url == replaced.directory_url
    tx.execute(update(acme_accounts).where(of_ca, acme_accounts.c.is_default).values(is_default=False))
    account_id = _insert_default(tx, replaced.directory_url, key_pem, contact, eab_kid, sealer, now)
    _audit(tx, "account.replaced", replaced.id, {"default": replaced.id}, {"default": account_id}, now, actor)


def record_registered(
    tx: Connection, account_id: str, account_url: str, tos_agreed_at: datetime | None,
    asked: tuple[str, datetime] | None = None,
) -> None:  # fmt: skip
    """Keep the account's URL (its `kid`, RFC 8555 §7.3); `asked` says which person wanted it, and when."""
    account = _lock(tx, account_id)
    if account is None:
        return
    agreed = {} if tos_agreed_at is None else {"tos_agreed_at": tos_agreed_at.isoformat()}
    if asked is not None:
        actor, now = asked
        before, after = {"account_url": account.account_url}, {"account_url": account_url}
        _audit(tx, "account.registered", account_id, before, after, now, actor)
    _change(tx, account, account_url=account_url, **agreed)


def record_found(
    tx: Connection, asked: StoredAccount, key: str, account_url: str, now: datetime, *, thumbprint: str,
    made_again: bool = False, actor: str = audit.WORKER,
) -> list[str]:  # fmt: skip
    """Keep what the CA said of the account `asked` about: which of its keys it has, and its URL.

    Return the actions that went to the audit log, `thumbprint` of the key with them. What another worker
    recorded meanwhile stands: both asked the same CA.
    """
    account, done = _lock(tx, asked.id), list[str]()
    if account is None or key not in (account.key, account.pending_key):
        return done
    if key == account.pending_key:
        done.append("account.key_changed")
        _audit(tx, done[-1], account.id, {}, {"thumbprint": thumbprint}, now, actor)
        account = _change(tx, account, key=key, pending_key=None, pending_until=None)
    elif account.is_overdue(now):
        account = _change(tx, account, pending_until=None)
    if account.account_url == asked.account_url and (made_again or account_url != asked.account_url):
        done.append("account.forgotten" if made_again else "account.moved")
        _audit(tx, done[-1], account.id, {"account_url": asked.account_url}, {"account_url": account_url}, now, actor)
        _change(tx, account, account_url=account_url)
    return done


def record_contact(tx: Connection, account_id: str, contact: list[str], now: datetime, *, actor: str) -> None:
    """Keep the contacts that the CA has been told."""
    account = _lock(tx, account_id)
    if account is not None:
        _audit(tx, "account.contact", account_id, {"contact": account.contact}, {"contact": contact}, now, actor)
        _change(tx, account, contact=contact)


def record_deactivated(tx: Connection, account_id: str, now: datetime, *, actor: str) -> None:
    """Mark an account that was given up; nothing is asked of the CA with it again."""
    account = _lock(tx, account_id)
    if account is not None:
        url = {"account_url": account.account_url}
        _audit(tx, "account.deactivated", account_id, {**url, "status": "valid"}, {**url, "status": "deactivated"},
               now, actor)  # fmt: skip
        _change(tx, account, deactivated_at=now.isoformat())


def seal(tx: Connection, account: StoredAccount, sealer: Sealer) -> None:
    """Replace plain keys by sealed ones."""
    found = _lock(tx, account.id)
    if found is not None:
        keys = {name: key for name in _KEYS if (key := found._text(name)) is not None and not is_sealed(key)}
        _change(tx, found, **{name: sealer.seal(key, **_place(found.id)) for name, key in keys.items()})


# -- a change of key ----------------------------------------------------------------------------------


def seal_key(account: StoredAccount, key_pem: str, sealer: Sealer) -> str:
    """Return a key as it is stored in the row of an account."""
    return sealer.seal(key_pem, **_place(account.id))


def begin_rollover(tx: Connection, account_id: str, pending_key: str, until: datetime) -> StoredAccount | None:
    """Say that the account's key is being changed, until then; return the row.

    A key that is pending already is used again: all that try send the same one.
    """
    account = _lock(tx, account_id)
    if account is None:
        return None
    return _change(tx, account, pending_key=account.pending_key or pending_key, pending_until=until.isoformat())


def extend_rollover(tx: Connection, begun: StoredAccount, until: datetime) -> bool:
    """Say that it is still being changed; False if somebody else has ended it."""
    account = _lock(tx, begun.id)
    if account is None or account.pending_key != begun.pending_key:
        return False
    _change(tx, account, pending_until=until.isoformat())
    return True


def stop_rollover(tx: Connection, begun: StoredAccount, *, drop: bool = False) -> None:
    """Let key authorizations be published again; `drop` forgets the key: another account has it."""
    account = _lock(tx, begun.id)
    if account is not None and account.pending_key == begun.pending_key:
        dropped = {"pending_key": None} if drop else {}
        _change(tx, account, pending_until=None, **dropped)


# -- rows ---------------------------------------------------------------------------------------------


def _accounts() -> Select[Any]:
    return select(*columns_of(StoredAccount, acme_accounts))


def _default_first() -> tuple[Any, ...]:
    marked = func.coalesce(acme_accounts.c.is_default, false())
    return marked.desc(), acme_accounts.c.created_at, acme_accounts.c.id


_DEFAULT = Prepared(
    _accounts().where(acme_accounts.c.directory_url == bindparam("directory")).order_by(*_default_first()).limit(1)
)
_THIS = _accounts().where(acme_accounts.c.id == bindparam("account"))
_FIND = Prepared(_THIS)
_HOLD = Prepared(_THIS.with_for_update(read=True))
# `key_share`: an issuance that names the account by its foreign key does not wait.
_LOCK = Prepared(_THIS.with_for_update(key_share=True))


def _first(tx: Connection, query: Prepared, **asked: str) -> StoredAccount | None:
    rows = query.fetch(tx, **asked)
    return to_value(StoredAccount, rows[0]) if rows else None


def _lock(tx: Connection, account_id: str) -> StoredAccount | None:
    """Return one account, and let nobody change or hold it until the commit."""
    return _first(tx, _LOCK, account=account_id)


def _change(tx: Connection, account: StoredAccount, **values: Any) -> StoredAccount:
    """Write `values` into the document of a locked row, None takes one out; whatever else is in it stays."""
    given = {name: value for name, value in values.items() if value is not None}
    document = {name: value for name, value in account._document.items() if name not in values} | given
    tx.execute(update(acme_accounts).where(acme_accounts.c.id == account.id).values(credentials_json=document))
    return StoredAccount(account.id, account.directory_url, document)


def _insert_default(
    tx: Connection, directory_url: str, key_pem: str, contact: list[str], eab_kid: str | None, sealer: Sealer,
    now: datetime,
) -> str:  # fmt: skip
    account_id = new_id()
    sealed = sealer.seal(key_pem, **_place(account_id))
    credentials = {"key": sealed, "account_url": None, "contact": contact, "tos_agreed_at": None, "eab_kid": eab_kid}
    insert_new(
        tx, acme_accounts, id=account_id, directory_url=directory_url, credentials_json=credentials, is_default=True,
        created_at=now,
    )  # fmt: skip
    return account_id


def _place(account_id: str) -> dict[str, str]:
    return {"table": "acme_accounts", "column": "credentials_json", "row_id": account_id}


def _count(tx: Connection, account_id: str, *where: Any) -> int:
    query = select(func.count()).select_from(issuances).where(issuances.c.account_id == account_id, *where)
    return tx.execute(query).scalar_one()


def _audit(
    tx: Connection, action: str, account_id: str, before: dict[str, Any], after: dict[str, Any], now: datetime,
    actor: str,
) -> None:  # fmt: skip
    diff = {"table": "acme_accounts", "id": account_id, "before": before, "after": after}
    audit.record(tx, action, diff, now, actor=actor)
