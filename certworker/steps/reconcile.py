"""Policies become lineages; what other programs wrote is taken over.

Works off the notes that the triggers left, in order: policies a page at a time, in a few statements however many
they are, certificates one by one. A page that cannot be taken is taken row by row, so that one strange row holds up
no other. A change of CA, profile or key type, and every SWEEP, notes all policies again, a page at a time.
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
"""Policies in one transaction."""
_NAMES = 2000
"""Names of theirs after which a page ends before, so that nobody waits long for what it locks."""
_AT_ONCE = 50
"""Certificates after which it is the policies' turn again."""
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
    which stateless listeners answer for (see `thumbprints.news`).
    """
    if not db.read(lambda tx: _is_anything_to_do(tx, clock(), wanted, thumbprint)):
        return 0
    db.write(lambda tx: _sweep(tx, clock(), wanted, thumbprint))
    policy = _Topic(changes.POLICY, lambda tx, one, now: _take_policies(tx, [one], wanted, now), _refuse_policy)
    certificate = _Topic(changes.CERTIFICATE, partial(_take_certificate, sealer), _refuse_row)
    looked_at = 0
    while going():
        some = _take_page(db, clock, policy, wanted, going)
        some += _one_by_one(db, clock, certificate, _AT_ONCE, going)
        if not some:
            break
        looked_at += some
        taken()
    return looked_at


def _is_anything_to_do(
    tx: Connection, now: datetime, wanted: Wanted, thumbprint: Callable[[Connection], str | None]
) -> bool:
    """Look without writing: mostly there is nothing."""
    if changes.pending(tx, changes.POLICY) or changes.pending(tx, changes.CERTIFICATE):
        return True
    known = settings_kv.find_all(tx, *_KNOWN)
    if _SWEEP_AFTER in known or _is_sweep_due(known, wanted, now):
        return True
    return thumbprints.news(tx, known.get(settings_kv.THUMBPRINT), thumbprint) is not None


@dataclass(frozen=True, slots=True)
class _Topic:
    """How the notes of one kind are taken, one by one."""

    name: str
    take: Callable[[Connection, str, datetime], None]
    refuse: Callable[[Connection, str, str, datetime], None]
    """What is done with a row that cannot be taken, whatever is the matter with it."""


def _take_page(db: Database, clock: Clock, topic: _Topic, wanted: Wanted, going: Callable[[], bool]) -> int:
    """Take the oldest notes of policies together, or one by one where that cannot be done."""
    try:
        return db.write(lambda tx: _take_noted(tx, wanted, clock()))
    except StoreRefused as error:
        said = str(error)
    except StoreError:
        raise  # the database is not there: no row is at fault
    except Exception as error:  # noqa: BLE001 - whichever row it is, more is said when its turn comes
        said = type(error).__name__
    _log.info("reconcile.one_by_one", extra={"error": said})
    return _one_by_one(db, clock, topic, _PAGE, going)


def _take_noted(tx: Connection, wanted: Wanted, now: datetime) -> int:
    notes = changes.lock_oldest(tx, changes.POLICY, _PAGE)
    if not notes:
        return 0
    page = _begin_with(notes, policies.count_names(tx, sorted(set(notes.values()))))
    changes.remove(tx, list(page))
    _take_policies(tx, sorted(set(page.values())), wanted, now)
    return len(page)


def _begin_with(notes: dict[int, str], names: dict[str, int]) -> dict[int, str]:
    """Return the first of these notes, as many as have _NAMES in all; one at least."""
    total = 0
    page: dict[int, str] = {}
    for note, policy_id in notes.items():
        total += names.get(policy_id, 0)
        if page and total > _NAMES:
            break
        page[note] = policy_id
    return page


def _one_by_one(db: Database, clock: Clock, topic: _Topic, limit: int, going: Callable[[], bool]) -> int:
    for taken in range(limit):
        if not going() or not _take_one(db, clock, topic):
            return taken
    return limit


def _take_one(db: Database, clock: Clock, topic: _Topic) -> int:
    """Take the oldest note in one transaction; a row that cannot be taken is set aside in another one."""
    try:
        return db.write(lambda tx: _take_oldest(tx, topic, lambda one: topic.take(tx, one, clock())))
    except StoreRefused as error:
        said = str(error)
    except StoreError:
        raise  # the database is not there: the row is not at fault
    except Exception as error:  # noqa: BLE001 - one strange row must not hold up the others
        _log.exception("reconcile.bug", extra={"topic": topic.name})
        said = f"this row cannot be read ({type(error).__name__})"
    return db.write(lambda tx: _take_oldest(tx, topic, lambda one: topic.refuse(tx, one, said, clock())))


def _take_oldest(tx: Connection, topic: _Topic, take: Callable[[str], None]) -> int:
    row_ids = changes.take(tx, topic.name, 1)
    for row_id in row_ids:
        take(row_id)
    return len(row_ids)


def _refuse_policy(tx: Connection, policy_id: str, said: str, now: datetime) -> None:
    policies.record_refused(tx, {policy_id: [{"value": "", "rule": said}]}, now)
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


@dataclass(frozen=True, slots=True)
class _Wish:
    """What becomes of one policy."""

    asks: tuple[object, ...] | None
    groups: list[list[str]]
    """Sets of names, each for one certificate."""
    refused: list[dict[str, str]]


def _read_wish(policy: Policy | None, wanted: Wanted) -> _Wish:
    if policy is None or policy.mode != "auto":
        return _Wish(_asks(policy), [], [])
    names, refused = refused_names(policy, wanted)
    groups = [names] if names and policy.shared else [[name] for name in names]
    return _Wish(_asks(policy), groups, refused)


def _take_policies(tx: Connection, policy_ids: list[str], wanted: Wanted, now: datetime) -> None:
    found = policies.find_all(tx, policy_ids)
    wishes = {one: _read_wish(found.get(one), wanted) for one in policy_ids}
    made = iter(lineages.find_or_add(tx, [g for wish in wishes.values() for g in wish.groups], wanted.issuer, now))
    shall = {one: {next(made) for _ in wish.groups} for one, wish in wishes.items()}
    # Lineages before policies, as whoever flips a status locks them.
    lineages.lock_all(tx, set().union(*shall.values(), *lineages.linked_ids(tx, policy_ids).values()))
    locked = policies.lock_all(tx, policy_ids)
    taken = {one: wish for one, wish in wishes.items() if wish.asks == _asks(locked.get(one))}
    changes.note(tx, changes.POLICY, sorted(wishes.keys() - taken))  # changed meanwhile: the next look takes them
    refused = {one: taken[one].refused for one in taken.keys() & locked if taken[one].refused != _refused(locked[one])}
    policies.record_refused(tx, refused, now)
    changed = lineages.link(tx, {one: shall[one] for one in taken})
    touched = sorted(changed.union(*(shall[one] for one in taken)))
    _settle(tx, touched, now)
    policies.refresh_statuses(tx, taken, now)
    certificates.touch(tx, sorted(changed))
    thumbprints.keep(tx, touched, now)


def _refused(policy: Policy) -> list[dict[str, str]]:
    return policy.refused_names or []


def _asks(policy: Policy | None) -> tuple[object, ...] | None:
    """Return what a policy wants, which is what its lineages are made of."""
    return None if policy is None else (policy.mode, policy.domains, policy.shared, policy.paused_at)


def _settle(tx: Connection, lineage_ids: list[str], now: datetime) -> None:
    """Give lineages their place in the scan, and let go of what was queued for those nobody wants any more."""
    for lineage_id in lineages.place(tx, lineage_ids, now):
        issuances.cancel_unclaimed(tx, lineage_id, now)


def _take_certificate(sealer: Sealer, tx: Connection, certificate_id: str, now: datetime) -> None:
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
    policies.refresh_statuses(tx, [policy.id for policy in policies.wanting(tx, certificate.domain)], now)


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


_KNOWN = (_SWEEP_AFTER, settings_kv.THUMBPRINT, settings_kv.LAST_SWEEP_AT, settings_kv.ISSUER)


def _sweep(tx: Connection, now: datetime, wanted: Wanted, thumbprint: Callable[[Connection], str | None]) -> None:
    """Note a page of policies again if a sweep is due or under way."""
    known = settings_kv.find_all(tx, *_KNOWN)
    after = known.get(_SWEEP_AFTER)
    news = thumbprints.news(tx, known.get(settings_kv.THUMBPRINT), thumbprint)
    if news is not None:
        settings_kv.put(tx, settings_kv.THUMBPRINT, news)
        after = ""  # from the start, also if one is under way
    elif after is None and _is_sweep_due(known, wanted, now):
        settings_kv.put(tx, settings_kv.ISSUER, wanted.fingerprint)
        settings_kv.put(tx, settings_kv.LAST_SWEEP_AT, now.isoformat())
        # Before the first look nothing that was noted has been taken: to note it again would double the work.
        after = "" if settings_kv.ISSUER in known else None
    if after is not None:
        _note_page(tx, after)


def _is_sweep_due(known: dict[str, str], wanted: Wanted, now: datetime) -> bool:
    last = known.get(settings_kv.LAST_SWEEP_AT)
    fresh = last is not None and now - datetime.fromisoformat(last) < SWEEP
    return not fresh or known.get(settings_kv.ISSUER) != wanted.fingerprint


def _note_page(tx: Connection, after: str) -> None:
    page = policies.list_ids(tx, after=after, limit=_PAGE)
    changes.note(tx, changes.POLICY, page)
    if len(page) == _PAGE:
        settings_kv.put(tx, _SWEEP_AFTER, page[-1])
    else:
        settings_kv.forget(tx, _SWEEP_AFTER)
