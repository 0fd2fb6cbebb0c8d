"""What stateless listeners answer challenges with follows from the policies and the account.

One thumbprint for all hosts: that of the account new orders are made with. Another one (a changed key,
another account, the first stateless listener, the last one gone) has every policy noted again, so that
the rows follow a page at a time.
"""

from collections.abc import Callable, Sequence
from datetime import datetime

from certworker.core.gateway_rows import STATELESS
from certworker.store import gateway, settings_kv, thumbprints, versions
from certworker.store.database import Transaction

_NONE = ""
"""settings_kv: no listener is stateless any more, and rows are taken away."""


def news(tx: Transaction, known: str | None, of_account: Callable[[Transaction], str | None]) -> str | None:
    """Return what hosts are to answer with from now on, None if that is what is `known` of it in `settings_kv`.

    `of_account` returns the thumbprint of the account that orders are made with; None before there is one,
    and while its key is being changed: then what is known stands.
    """
    withdrawn = None if known is None else _NONE
    now = (of_account(tx) or known) if _is_stateless(tx, known) else withdrawn
    return None if now == known else now


def _is_stateless(tx: Transaction, known: str | None) -> bool:
    """Say whether proxies answer by themselves: as the rows say, or as the version still says that they serve."""
    if gateway.is_challenge_used(tx, STATELESS):
        return True
    return bool(known) and versions.published_mentions(tx, STATELESS)


def keep(tx: Transaction, lineage_ids: Sequence[str], now: datetime) -> None:
    """Bring the rows of these lineages' hosts up to date; costs nothing while no listener was ever stateless."""
    thumbprint = settings_kv.find(tx, settings_kv.THUMBPRINT)
    if thumbprint is not None:
        thumbprints.keep(tx, lineage_ids, thumbprint or None, now)
