"""Whether the proxies can answer the CA for a name, before the CA is told to look.

A CA looks from several places at once and at any address of the name, so every live node has to be able
to answer, or a validation is spent for nothing. One that serves its version passes a challenge on to the
responders; a listener that answers by itself (`stateless`) needs the host's thumbprint besides, and proves
that it answers with it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from certworker.core.gateway_rows import STATELESS
from certworker.store import enrolments, gateway, nodes, settings_kv, thumbprints, versions
from certworker.store.database import Database, Transaction
from certworker.store.nodes import NodeStatus
from certworker.store.thumbprints import Thumbprint

_KNOWN = 1.0
"""Seconds for which proxies that answer are believed to: issuances ask many times as often as nodes tell."""


@dataclass(frozen=True, slots=True)
class Proxies:
    """How the proxies stand, whatever the name."""

    idle: str | None
    """Why not all of them answer challenges."""
    stateless: tuple[NodeStatus, ...]
    """Those that have to know each host's thumbprint; none where all pass challenges on."""


class Barrier:
    """Asked by any number of threads."""

    def __init__(self, db: Database, silent: timedelta, stopwatch: Callable[[], float] = time.monotonic) -> None:
        """A node that was not heard of for `silent` is not waited for."""
        self._db = db
        self._silent = silent
        self._stopwatch = stopwatch
        self._known: tuple[float, Proxies] | None = None

    def why_not(self, dns_names: Sequence[str], thumbprint: str) -> str | None:
        """See `why_not`."""
        known = self._known
        if known is not None and self._stopwatch() < known[0]:
            proxies = known[1]
        else:
            until = self._stopwatch() + _KNOWN
            proxies = self._db.read(lambda tx: look(tx, self._silent))
            self._known = (until, proxies) if proxies.idle is None else None
        if proxies.idle is not None or not proxies.stateless:
            return proxies.idle
        return self._db.read(lambda tx: _lacking(tx, proxies, dns_names, thumbprint))


def why_not(tx: Transaction, dns_names: Sequence[str], thumbprint: str, silent: timedelta) -> str | None:
    """Return why not every live node answers for these names with this account's thumbprint; None if all do."""
    proxies = look(tx, silent)
    return proxies.idle or _lacking(tx, proxies, dns_names, thumbprint)


def look(tx: Transaction, silent: timedelta) -> Proxies:
    """Return how the proxies stand.

    A node that was not heard of for `silent` is not waited for: it may never come back. Where no node was
    enrolled and none is heard of, the proxies are not ours, and nobody knows. The first one is waited for as
    long: the worker with the proxy may start a moment after this one.
    """
    live = nodes.live(tx, silent)
    stateless = gateway.is_challenge_used(tx, STATELESS) or bool(settings_kv.find(tx, settings_kv.THUMBPRINT))
    return Proxies(_why_idle(tx, live, silent, stateless=stateless), tuple(live) if stateless else ())


def _why_idle(tx: Transaction, live: Sequence[NodeStatus], silent: timedelta, *, stateless: bool) -> str | None:
    if not live and (stateless or enrolments.list_present(tx)):
        return f"no node was heard of within {silent.total_seconds():.0f} s, so nothing answers on port 80"
    if _is_beginning(tx, silent):
        return "the first version was published a moment ago, and no node serves it yet"
    if idle := next((node for node in live if node.version is None), None):
        return f"{idle.node_id}: serves no version yet" + (f": {idle.error}" if idle.error else "")
    return None


def _lacking(tx: Transaction, proxies: Proxies, dns_names: Sequence[str], thumbprint: str) -> str | None:
    if not proxies.stateless:
        return None
    rows = thumbprints.of_hosts(tx, dns_names)
    for name in dns_names:
        row = rows.get(name)
        if row is None or row.thumbprint != thumbprint:
            return f"no thumbprint of the account is on its way to the proxies for {name} yet"
    return next((why for node in proxies.stateless for row in rows.values() if (why := _lacks(node, row))), None)


def _is_beginning(tx: Transaction, silent: timedelta) -> bool:
    return not nodes.is_any(tx) and gateway.has_http_listener(tx) and versions.is_first_within(tx, silent)


def _lacks(node: NodeStatus, row: Thumbprint) -> str | None:
    if (why := node.unanswered.get(row.host)) is not None:
        return f"{node.node_id}: {row.host}: {why}"
    if node.revision < row.revision or node.untold:
        return f"{node.node_id}: has not proved yet that it answers for {row.host}"
    return None
