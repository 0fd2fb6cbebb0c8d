"""`challenges`: what the responder answers from. A token lives as long as its issuance is open."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, exists, select

from certworker.store.prepared import Prepared
from certworker.store.rows import among, new_id, put_rows
from certworker.store.tables import challenges, issuances


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered to a CA that fetches `token`."""

    issuance_id: str
    authorization_url: str
    dns_name: str
    token: str
    key_authorization: str


def publish_all(tx: Connection, answers: Sequence[Answer], now: datetime) -> None:
    """Make these tokens answerable; saying it again replaces them."""
    rows = [
        {
            "id": new_id(), "issuance_id": answer.issuance_id, "authorization_url": answer.authorization_url,
            "dns_name": answer.dns_name, "token": answer.token, "key_authorization": answer.key_authorization,
            "created_at": now,
        }
        for answer in answers
    ]  # fmt: skip
    if rows:
        put_rows(tx, challenges, rows, unique=("issuance_id", "authorization_url"))


def find_key_authorization(tx: Connection, token: str) -> str | None:
    """Return what to answer for a live token (RFC 8555 §8.3)."""
    return tx.execute(_FIND, {"asked": token}).scalar()


_FIND = select(challenges.c.key_authorization).where(challenges.c.token == bindparam("asked")).limit(1)


def withdraw(tx: Connection, issuance_ids: Sequence[str]) -> None:
    """Let these issuances' tokens be answered no more; another one's with the same token stay."""
    _DELETE.run(tx, [{"issuances": issuance_ids}])


_DELETE = Prepared(delete(challenges).where(among(challenges.c.issuance_id, "issuances")))


def withdraw_stale(tx: Connection, before: datetime) -> int:
    """Delete tokens of closed issuances that are older than `before`; return how many."""
    # Asked of each token's own issuance: a list of all that are closed would be a million long.
    own = (issuances.c.id == challenges.c.issuance_id, issuances.c.closed_at.is_not(None))
    stale = delete(challenges).where(challenges.c.created_at < before, exists(select(1).where(*own)))
    return tx.execute(stale).rowcount
