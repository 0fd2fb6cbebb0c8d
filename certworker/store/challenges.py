"""`challenges`: what the responder answers from. A token lives as long as its issuance is open."""

from datetime import datetime

from sqlalchemy import Connection, delete, insert, select

from certworker.store.rows import new_id
from certworker.store.tables import challenges, issuances


def publish(
    tx: Connection, issuance_id: str, authorization_url: str, dns_name: str, token: str, key_authorization: str,
    now: datetime,
) -> None:  # fmt: skip
    """Make one token answerable; saying it again replaces it."""
    tx.execute(
        delete(challenges).where(
            challenges.c.issuance_id == issuance_id, challenges.c.authorization_url == authorization_url
        )
    )
    tx.execute(
        insert(challenges).values(
            id=new_id(), issuance_id=issuance_id, authorization_url=authorization_url, dns_name=dns_name,
            token=token, key_authorization=key_authorization, created_at=now,
        )
    )  # fmt: skip


def find_key_authorization(tx: Connection, token: str) -> str | None:
    """Return what to answer for a live token (RFC 8555 §8.3)."""
    return tx.execute(select(challenges.c.key_authorization).where(challenges.c.token == token).limit(1)).scalar()


def withdraw(tx: Connection, issuance_id: str) -> None:
    """Let an issuance's tokens be answered no more; another one's with the same token stay."""
    tx.execute(delete(challenges).where(challenges.c.issuance_id == issuance_id))


def withdraw_stale(tx: Connection, before: datetime) -> int:
    """Delete tokens of closed issuances that are older than `before`; return how many."""
    closed = select(issuances.c.id).where(issuances.c.closed_at.is_not(None))
    stale = delete(challenges).where(challenges.c.created_at < before, challenges.c.issuance_id.in_(closed))
    return tx.execute(stale).rowcount
