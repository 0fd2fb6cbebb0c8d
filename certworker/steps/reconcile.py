"""Policies become lineages; what other programs wrote is taken over.

Works off the notes that the triggers left, in order, one row per transaction, so that one strange row
holds up no other. A change of CA, profile or key type, and every SWEEP, notes all policies again, a
page at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Connection

from certworker.clock import Clock
from certworker.core.certificate import CLOCK_TOLERANCE, Leaf, check_order, normalise_pair, read_leaf
from certworker.core.names import MAX_NAMES, check_name
from certworker.errors import ChainRefused, InputError, NameRefused, SealError, StoreError, StoreRefused
from certworker.steps import thumbprints
from certworker.store import certificates, changes, issuances, lineages, policies, settings_kv
from certworker.store.certificates import StoredCertificate
from certworker.store.database import Database
from certworker.store.lineages import Issuer
from certworker.store.policies import Policy
from certworker.store.seal import Sealer

_log = logging.getLogger(__name__)

SWEEP = timedelta(hours=1)
_PAGE = 200
_AT_ONCE = 50
"""Rows of a kind after which what they want is queued: thousands that are new do not wait for each other."""
_SWEEP_AFTER = "sweep_after"
"""settings_kv: the id after which a sweep goes on; absent while none is under way."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What certificates are made for: the issuer of new ones, and which names it may be asked for."""

    issuer: Issuer
    private_ca: bool

    @property
    def fingerprint(self) -> str:
        """What is remembered of it, to notice a change."""
        asked = self.issuer
        kind = "private" if self.private_ca else "public"
        return f"{asked.directory_url} (profile {asked.profile or 'default'}, {asked.key_type}, {kind} CA)"


def reconcile(
    db: Database,
    clock: Clock,
    wanted: Wanted,
    sealer: Sealer,
    going: Callable[[], bool] = lambda: True,
    taken: Callable[[], object] = lambda: None,
    thumbprint: Callable[[Connection], str | None] = lambda _: None,
) -> int:
    """Take over everything that was noted, while `going`; return how many rows were looked at.

    `taken` is called now and then when some have been, and in the end. `thumbprint` is that of the account
    which stateless listeners answer for (see `thumbprints.has_changed`).
    """
    _sweep(db, clock, wanted, thumbprint)
    topics = [
        _Topic(changes.POLICY, partial(_take_policy, wanted=wanted), _refuse_policy),
        _Topic(changes.CERTIFICATE, partial(_take_certificate, sealer=sealer), _refuse_row),
    ]
    looked_at = 0
    while some := _take_some(db, clock, topics, going):
        looked_at += some
        taken()
    return looked_at


@dataclass(frozen=True, slots=True)
class _Topic:
    """How the notes of one kind are taken."""

    name: str
    take: Callable[..., None]
    refuse: Callable[[Connection, str, str, datetime], None]
    """What is done with a row that cannot be taken, whatever is the matter with it."""


def _take_some(db: Database, clock: Clock, topics: list[_Topic], going: Callable[[], bool]) -> int:
    looked_at = 0
    for _ in range(_AT_ONCE):
        one_each = sum(_take_one(db, clock, topic) for topic in topics) if going() else 0
        if not one_each:
            break
        looked_at += one_each
    return looked_at


def _take_one(db: Database, clock: Clock, topic: _Topic) -> int:
    """Take the oldest note in one transaction; a row that cannot be taken is set aside in another one."""
    try:
        return db.write(lambda tx: _take_oldest(tx, topic, partial(topic.take, now=clock())))
    except StoreRefused as error:
        said = str(error)
    except StoreError:
        raise  # the database is not there: the row is not at fault
    except Exception as error:  # noqa: BLE001 - one strange row must not hold up the others
        _log.exception("reconcile.bug", extra={"topic": topic.name})
        said = f"this row cannot be read ({type(error).__name__})"
    return db.write(lambda tx: _take_oldest(tx, topic, lambda tx, row_id: topic.refuse(tx, row_id, said, clock())))


def _take_oldest(tx: Connection, topic: _Topic, take: Callable[[Connection, str], None]) -> int:
    row_ids = changes.take(tx, topic.name, 1)
    for row_id in row_ids:
        take(tx, row_id)
    return len(row_ids)


def _refuse_policy(tx: Connection, policy_id: str, said: str, now: datetime) -> None:
    policies.record_refused(tx, policy_id, [{"value": "", "rule": said}], now)
    policies.refresh_status(tx, policy_id, now)


def _refuse_row(tx: Connection, certificate_id: str, said: str, now: datetime) -> None:
    certificate = certificates.find(tx, certificate_id)
    if certificate is not None and certificate.status != "error":
        certificates.flip(tx, certificate, "error", said, now)


def refused_names(policy: Policy, wanted: Wanted) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of a policy that can be ordered, and the others with the rule they break."""
    accepted: dict[str, None] = {}
    refused = []
    for value in policy.domains:
        try:
            accepted[check_name(value, private_ca=wanted.private_ca)] = None
        except NameRefused as error:
            refused.append({"value": error.value, "rule": error.rule})
    if policy.shared and len(accepted) > MAX_NAMES:
        rule = f"one shared certificate has at most {MAX_NAMES} names"
        return [], [{"value": f"{len(accepted)} names", "rule": rule}, *refused]
    if not policy.domains:
        refused.append({"value": "", "rule": "the policy names no domains"})
    return list(accepted), refused


def _take_policy(tx: Connection, policy_id: str, *, wanted: Wanted, now: datetime) -> None:
    policy = policies.find(tx, policy_id)
    names: list[str] = []
    refused: list[dict[str, str]] = []
    if policy is not None and policy.mode == "auto":
        names, refused = refused_names(policy, wanted)
    groups = [names] if names and policy is not None and policy.shared else [[name] for name in names]
    wanted_ids = lineages.find_or_add(tx, groups, wanted.issuer, now)
    # Lineages before policies, as whoever flips a status locks them.
    lineages.lock_all(tx, sorted({*wanted_ids, *lineages.linked_ids(tx, policy_id)}))
    locked = policies.lock(tx, policy_id)
    if _asks(locked) != _asks(policy):
        changes.note(tx, changes.POLICY, [policy_id])  # it has changed meanwhile: the next look takes it
        return
    if locked is not None:
        policies.record_refused(tx, policy_id, refused, now)
    changed = lineages.link(tx, policy_id, wanted_ids)
    _settle(tx, sorted({*wanted_ids, *changed}), now)
    policies.refresh_status(tx, policy_id, now)
    certificates.touch(tx, changed)
    thumbprints.keep(tx, sorted({*wanted_ids, *changed}), now)


def _asks(policy: Policy | None) -> tuple[object, ...] | None:
    """Return what a policy wants, which is what its lineages are made of."""
    return None if policy is None else (policy.mode, policy.domains, policy.shared, policy.paused_at)


def _settle(tx: Connection, lineage_ids: list[str], now: datetime) -> None:
    """Give lineages their place in the scan, and let go of what was queued for those nobody wants any more."""
    for lineage_id in lineages.place(tx, lineage_ids, now):
        issuances.cancel_unclaimed(tx, lineage_id, now)


def _take_certificate(tx: Connection, certificate_id: str, *, sealer: Sealer, now: datetime) -> None:
    certificate = certificates.lock(tx, certificate_id)
    if certificate is None:
        _take_removal(tx, certificate_id, now)
        return
    status, reason = _take_pair(tx, certificate, sealer, now)
    if certificate.lineage_id is not None and status != "active":
        lineages.spoil(tx, certificate.lineage_id, now)
        _settle(tx, [certificate.lineage_id], now)
    if status != certificate.status:
        certificates.record_flip(tx, certificate, status, reason, now)
    for policy in policies.wanting(tx, certificate.domain):
        policies.refresh_status(tx, policy.id, now)


def _take_pair(tx: Connection, certificate: StoredCertificate, sealer: Sealer, now: datetime) -> tuple[str, str]:
    """Complete a row that another program wrote; return the status it has from now on, and why."""
    place = {"table": "certificates", "column": "key_pem", "row_id": certificate.id}
    try:
        _, key_pem = normalise_pair(certificate.cert_pem, sealer.open(certificate.key_pem, **place))
        leaf = read_leaf(certificate.cert_pem)
        check_order(certificate.cert_pem)
    except (InputError, ChainRefused, SealError) as error:
        certificates.set_status(tx, certificate.id, "error", now)
        return "error", str(error)
    status, reason = "active", "the pair can be served"
    if leaf.validity.not_after <= now:
        status, reason = "expired", f"valid until {leaf.validity.not_after.isoformat()}"
    elif certificate.lineage_id is None and leaf.validity.not_before > now + CLOCK_TOLERANCE:
        status, reason = "error", f"valid from {leaf.validity.not_before.isoformat()} only, and served from then on"
        _await_start(tx, leaf.validity.not_before)
    elif _is_called_bad(tx, certificate, leaf):
        status, reason = "error", "another program says so of this certificate"
    certificates.describe(tx, certificate.id, leaf, sealer.seal(key_pem, **place), now, status=status)
    return status, reason


def _is_called_bad(tx: Connection, certificate: StoredCertificate, leaf: Leaf) -> bool:
    said = certificate.status == "error" and certificate.fingerprint == leaf.fingerprint
    return said and not certificates.came_early(tx, certificate.id)  # else it was we who said so


def _await_start(tx: Connection, not_before: datetime) -> None:
    """See that `expire` looks again when an uploaded certificate becomes valid."""
    first = settings_kv.find(tx, settings_kv.NOT_YET_VALID)
    if first is None or not_before < datetime.fromisoformat(first):
        settings_kv.put(tx, settings_kv.NOT_YET_VALID, not_before.isoformat())


def _take_removal(tx: Connection, certificate_id: str, now: datetime) -> None:
    certificates.record_removed(tx, certificate_id, now)
    lineage_id = lineages.having_certificate(tx, certificate_id)
    if lineage_id is not None:
        lineages.forget_certificate(tx, lineage_id, now)
        _settle(tx, [lineage_id], now)
    else:
        # It was somebody's upload; the row that said for which name is gone.
        changes.note(tx, changes.POLICY, policies.manual_ids(tx))


def _sweep(db: Database, clock: Clock, wanted: Wanted, thumbprint: Callable[[Connection], str | None]) -> None:
    """Note a page of policies again if a sweep is due or under way."""

    def note_page(tx: Connection) -> None:
        now = clock()
        after = settings_kv.find(tx, _SWEEP_AFTER)
        if thumbprints.has_changed(tx, thumbprint):
            after = ""  # from the start, also if one is under way
        elif after is None and not _sweep_due(tx, wanted, now):
            return
        page = policies.list_all(tx, after=after or "", limit=_PAGE)
        changes.note(tx, changes.POLICY, [policy.id for policy in page])
        if len(page) == _PAGE:
            settings_kv.put(tx, _SWEEP_AFTER, page[-1].id)
        else:
            settings_kv.forget(tx, _SWEEP_AFTER)

    db.write(note_page)


def _sweep_due(tx: Connection, wanted: Wanted, now: datetime) -> bool:
    last, issuer = settings_kv.find(tx, settings_kv.LAST_SWEEP_AT), settings_kv.find(tx, settings_kv.ISSUER)
    fresh = last is not None and now - datetime.fromisoformat(last) < SWEEP
    if fresh and issuer == wanted.fingerprint:
        return False
    settings_kv.put(tx, settings_kv.ISSUER, wanted.fingerprint)
    settings_kv.put(tx, settings_kv.LAST_SWEEP_AT, now.isoformat())
    # Before the first look nothing that was noted has been taken: to note it again would double the work.
    return issuer is not None
