"""What cannot be served is taken back: the version before it is published, the certificate before it serves.

A node that refuses something new goes on with what it had, so visitors notice nothing. But nodes would serve
different versions, one that starts anew would have nothing, and a certificate that nobody serves would be
renewed in its time as if all were well.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.certificate import normalise_pair, read_leaf
from certworker.core.gateway_rows import Defaults
from certworker.core.renewal import plan_renewal
from certworker.core.retry import ErrorClass, Failure, retry_at
from certworker.errors import ChainRefused, InputError, SealError
from certworker.steps.publish import Published, take_back
from certworker.steps.trouble import describe
from certworker.store import audit, certificates, enrolments, issuances, lineages, nodes, versions
from certworker.store.certificates import Activation
from certworker.store.database import Database
from certworker.store.lineages import NewCertificate
from certworker.store.nodes import NodeStatus
from certworker.store.seal import Sealer

_log = logging.getLogger(__name__)

SETTLES = timedelta(minutes=2)
"""What is not served so long after it came is no matter of time any more."""
_HINT = (
    "the certificate before it serves again, and a new one is made later; "
    "look what the proxy has against it (KEY_TYPE, the CA's chain), then `certworker renew --force NAME`"
)


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A certificate that was exchanged for the one before it."""

    domain: str
    serial: str
    """Of the one that serves again."""
    why: str


def take_back_version(db: Database, clock: Clock, defaults: Defaults, silent: timedelta) -> Published | None:
    """Publish the version before again if nobody who was given the published one serves it; None if all is well.

    Given it are the live canaries, or where there is none all live nodes; one that served nothing before has no
    say, and one that refuses what others serve has a trouble of its own. Nothing is published by itself from then
    on, until a person has looked (see `publish.Hold`).
    """
    refusal = db.read(lambda tx: _find_refusal(tx, silent))
    if refusal is None:
        return None
    version_id, why = refusal
    done = None
    with suppress(InputError):  # this release cannot read the one before: the nodes' errors are in `status`
        done = take_back(db, clock, defaults, version_id, why)
    if done is not None and done.version is not None:
        _log.error("version.taken_back", extra={"number": done.version.number, "reason": why})
    return done


def _find_refusal(tx: Connection, silent: timedelta) -> tuple[str, str] | None:
    """Return the published version and why it is refused, if everybody who was given it does."""
    published_id = versions.published_id(tx)
    live = [node for node in nodes.live(tx, silent) if node.version is not None]
    canaries = {node.name for node in enrolments.list_present(tx) if node.canary}
    given = [node for node in live if node.node_id in canaries] or live
    if published_id is None or not given or any(node.refused_version_id != published_id for node in given):
        return None
    return published_id, "; ".join(
        f"{node.node_id} refused it: {node.error or 'no reason given'}" for node in given[:3]
    )


def take_back_certificates(
    db: Database, clock: Clock, sealer: Sealer, draw: Callable[[], float], silent: timedelta
) -> list[TakenBack]:
    """Exchange what every live node refuses for what served before, where that has not ended.

    What some nodes serve and others do not stays: those have a trouble of their own, which `status` shows.
    """
    live = db.read(lambda tx: nodes.live(tx, silent))
    done = []
    for certificate_id, why in _refused_by_all(live).items():
        refusal = _Refusal(certificate_id, why, min(node.revision for node in live))
        taken = db.write(lambda tx: _take_back(tx, refusal, sealer, clock(), draw()))  # noqa: B023 - called at once
        if taken is not None:
            _log.error("certificate.taken_back", extra={"domain": taken.domain, "reason": why})
            done.append(taken)
    return done


@dataclass(frozen=True, slots=True)
class _Refusal:
    certificate_id: str
    why: str
    revision: int
    """What every node has looked at."""


def _refused_by_all(live: list[NodeStatus]) -> Mapping[str, str]:
    """Return, by certificate id, what the nodes have against it."""
    if not live:
        return {}
    first, *others = live
    by_all = set(first.refused).intersection(*(node.refused for node in others))
    return {certificate_id: f"{first.node_id}: {first.refused[certificate_id]}" for certificate_id in sorted(by_all)}


def _take_back(tx: Connection, refusal: _Refusal, sealer: Sealer, now: datetime, draw: float) -> TakenBack | None:
    certificate_id, why = refusal.certificate_id, refusal.why
    lineage_id = lineages.having_certificate(tx, certificate_id)
    lineage = None if lineage_id is None else lineages.lock(tx, lineage_id)
    unserved = {} if lineage is None else lineages.unserved_among(tx, [lineage.id])
    if lineage is None or lineage.id not in unserved or unserved[lineage.id].revision > refusal.revision:
        return None
    before = issuances.find_before(tx, lineage.id, now, came_before=now - SETTLES)
    if before is None or before.chain_pem is None or before.key_pem is None or before.closed_at is None:
        return None
    try:
        plain = sealer.open(before.key_pem, table="issuances", column="key_pem", row_id=before.id)
        chain_pem, key_pem = normalise_pair(before.chain_pem, plain)
        # Its CA has been told that it was replaced: it is not asked when to renew it.
        leaf = replace(read_leaf(chain_pem), renewal_id=None)
    except (InputError, SealError, ChainRefused):
        return None
    usable = leaf.validity.usable_from(before.closed_at)
    renew_at = plan_renewal(usable, lineage.id)
    new = NewCertificate(lineage, certificate_id, before.id, leaf, usable, renew_at)
    flips = lineages.record_certificates(tx, [new], now)
    failure = Failure(ErrorClass.PERMANENT, "certworker:not-servable", f"no node serves the new one: {why}", _HINT)
    next_at = retry_at(failure, 1, now, draw, usable)
    error = dict(describe(failure, now, next_at))
    lineages.record_failure(tx, lineage.id, error, failures=1, next_check_at=next_at, now=now)
    sealed = sealer.seal(key_pem, table="certificates", column="key_pem", row_id=certificate_id)
    domain = lineages.first_name(tx, lineage)
    diff = {"table": "certificates", "id": certificate_id, "after": {"serial": leaf.serial}, "reason": why}
    audit.record(tx, "certificate.taken_back", diff, now)
    present = certificates.of_lineages(tx, [lineage.id]).get(lineage.id)
    serving = Activation(certificate_id, present, lineage.id, domain, chain_pem, sealed, leaf)
    certificates.activate_all(tx, [serving], flips, now)
    return TakenBack(domain, leaf.serial, why)
