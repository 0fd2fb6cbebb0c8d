"""`acme_accounts`: the key before the account, so that an account is never registered twice.

`credentials_json` is `{"key": sealed or PEM, "account_url", "contact", "tos_agreed_at", "eab_kid"}`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, false, func, select, update

from certworker.errors import InputError
from certworker.store import audit
from certworker.store.rows import columns_of, insert_new, new_id, to_value
from certworker.store.seal import Sealer, is_sealed
from certworker.store.tables import acme_accounts


@dataclass(frozen=True, slots=True)
class StoredAccount:
    """A row of `acme_accounts`."""

    id: str
    directory_url: str
    credentials_json: dict[str, Any] = field(repr=False)

    @property
    def account_url(self) -> str | None:
        """None until the CA answered newAccount."""
        url = self.credentials_json.get("account_url") if isinstance(self.credentials_json, dict) else None
        return url if isinstance(url, str) else None

    @property
    def sealed(self) -> bool:
        """Whether the key is sealed; another program may have written plain PEM."""
        return is_sealed(self._key())

    def open_key(self, sealer: Sealer) -> str:
        """Return the account's private key as PEM; InputError if there is none, SealError if it does not open."""
        return sealer.open(self._key(), table="acme_accounts", column="credentials_json", row_id=self.id)

    def _key(self) -> str:
        key = self.credentials_json.get("key") if isinstance(self.credentials_json, dict) else None
        if not isinstance(key, str):
            raise InputError(f"acme_accounts {self.id}: credentials_json has no key")
        return key


def find_default(tx: Connection, directory_url: str) -> StoredAccount | None:
    """Return the account used for a CA: the one marked, else the oldest."""
    query = (
        select(*columns_of(StoredAccount, acme_accounts))
        .where(acme_accounts.c.directory_url == directory_url)
        .order_by(
            func.coalesce(acme_accounts.c.is_default, false()).desc(), acme_accounts.c.created_at, acme_accounts.c.id
        )
        .limit(1)
    )
    row = tx.execute(query).first()
    return None if row is None else to_value(StoredAccount, row)


def find(tx: Connection, account_id: str) -> StoredAccount | None:
    """Return one account."""
    query = select(*columns_of(StoredAccount, acme_accounts)).where(acme_accounts.c.id == account_id)
    row = tx.execute(query).first()
    return None if row is None else to_value(StoredAccount, row)


def add(
    tx: Connection, directory_url: str, key_pem: str, contact: list[str], eab_kid: str | None, sealer: Sealer,
    now: datetime,
) -> None:  # fmt: skip
    """Insert the default account of a CA, not registered yet, unless another worker just did."""
    if find_default(tx, directory_url) is not None:
        return
    account_id = new_id()
    sealed = sealer.seal(key_pem, table="acme_accounts", column="credentials_json", row_id=account_id)
    credentials = {"key": sealed, "account_url": None, "contact": contact, "tos_agreed_at": None, "eab_kid": eab_kid}
    insert_new(
        tx, acme_accounts, id=account_id, directory_url=directory_url, credentials_json=credentials, is_default=True,
        created_at=now,
    )  # fmt: skip


def record_registered(tx: Connection, account_id: str, account_url: str, tos_agreed_at: datetime | None) -> None:
    """Keep the account's URL (its `kid`, RFC 8555 §7.3)."""
    account = find(tx, account_id)
    if account is None:
        return
    agreed = tos_agreed_at.isoformat() if tos_agreed_at is not None else account.credentials_json.get("tos_agreed_at")
    credentials = {**account.credentials_json, "account_url": account_url, "tos_agreed_at": agreed}
    tx.execute(update(acme_accounts).where(acme_accounts.c.id == account_id).values(credentials_json=credentials))


def seal(tx: Connection, account: StoredAccount, sealer: Sealer) -> None:
    """Replace a plain key by a sealed one."""
    place = {"table": "acme_accounts", "column": "credentials_json", "row_id": account.id}
    credentials = {**account.credentials_json, "key": sealer.seal(account.open_key(sealer), **place)}
    tx.execute(update(acme_accounts).where(acme_accounts.c.id == account.id).values(credentials_json=credentials))


def record_moved(tx: Connection, account_id: str, account_url: str | None, now: datetime) -> None:
    """Keep an account's new URL, or None to have it registered again, with an audit row."""
    account = find(tx, account_id)
    if account is None:
        return
    before, after = {"account_url": account.account_url}, {"account_url": account_url}
    diff = {"table": "acme_accounts", "id": account_id, "before": before, "after": after}
    audit.record(tx, "account.forgotten" if account_url is None else "account.moved", diff, now)
    credentials = {**account.credentials_json, **after}
    tx.execute(update(acme_accounts).where(acme_accounts.c.id == account_id).values(credentials_json=credentials))
