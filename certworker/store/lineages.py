"""`lineages`: a set of names that one certificate after another serves, and when to look at it next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)

from certworker.core.certificate import Leaf, Validity
from certworker.core.names import names_hash
from certworker.store import audit, policies
from certworker.store.audit import Flip
from certworker.store.prepared import Prepared
from certworker.store.rows import among, columns_of, insert_new_all, new_id, pages, to_value
from certworker.store.tables import certificates, issuances, lineage_names, lineages, policy_lineages, tls_policies
from certworker.store.types import UtcTime, UuidText


def policy_names(lineage_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that a policy names this lineage which is still there, paused or not."""
    return _has_policy(lineage_id, tls_policies.c.id.is_not(None))


def policy_wants(lineage_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that a policy wants certificates for it: `mode = auto` and not paused."""
    return _has_policy(lineage_id, and_(tls_policies.c.mode == "auto", tls_policies.c.paused_at.is_(None)))


def _has_policy(lineage_id: ColumnElement[str], that: ColumnElement[bool]) -> ColumnElement[bool]:
    # From the lineage to its links, and from each to its policy: neither a subquery for one value nor one with an
    # OFFSET is made a join, which PostgreSQL would begin with every policy when its statistics know of none.
    policy = select(that).where(tls_policies.c.id == policy_lineages.c.policy_id).scalar_subquery()
    return exists(select(1).where(policy_lineages.c.lineage_id == lineage_id, policy).offset(literal_column("0")))


@dataclass(frozen=True, slots=True)
class Issuer:
    """Where certificates come from and what they are like; part of what a lineage is."""

    directory_url: str
    profile: str
    """"" for the CA's default."""
    key_type: str


@dataclass(frozen=True, slots=True)
class Planned:
    """What the scan reads of a row of `lineages`: it may read hundreds of thousands."""

    id: str
    dns_names: list[str]
    """Sorted A-labels; never changes."""
    not_before: datetime | None
    not_after: datetime | None
    renew_at: datetime | None
    window_start: datetime | None
    """Of the CA's suggested window, that `renew_at` was drawn from; None: planned by lifetime."""

    @property
    def validity(self) -> Validity | None:
        if self.not_before is None or self.not_after is None:
            return None
        return Validity(self.not_before, self.not_after)


@dataclass(frozen=True, slots=True)
class Lineage(Planned):
    """A row of `lineages`."""

    window_end: datetime | None
    directory_url: str
    profile: str
    key_type: str
    status: str
    """`active` (a valid certificate is there), `error` (none, and the last attempt failed) or `pending`."""
    certificate_id: str | None
    issuance_id: str | None
    """The issuance that the certificate came from."""
    next_check_at: datetime | None
    """When the scan looks at it; None while no policy wants it."""
    failures: int
    error: dict[str, Any] | None
    """The last failure: class, type, detail, hint, at, retry_at."""
    served_at: datetime | None
    """When every live node had proved that it serves the certificate."""
    renewal_id: str | None
    """What the CA calls the certificate in renewal information (RFC 9773 §4.1)."""


def find(tx: Connection, lineage_id: str) -> Lineage | None:
    """Return one lineage."""
    row = tx.execute(select(*columns_of(Lineage, lineages)).where(lineages.c.id == lineage_id)).first()
    return None if row is None else to_value(Lineage, row)


def find_all(tx: Connection, ids: Sequence[str]) -> dict[str, Lineage]:
    """Return these lineages by id."""
    found = [to_value(Lineage, row) for row in _FIND_ALL.fetch(tx, ids=ids)]
    return {one.id: one for one in found}


_THESE = select(*columns_of(Lineage, lineages)).where(among(lineages.c.id, "ids"))
_FIND_ALL = Prepared(_THESE)


def lock(tx: Connection, lineage_id: str) -> Lineage | None:
    """Return one lineage, locked until the commit."""
    row = tx.execute(_LOCK, {"ids": [lineage_id]}).first()
    return None if row is None else to_value(Lineage, row)


_LOCK = _THESE.with_for_update()


def lock_all(tx: Connection, ids: Iterable[str]) -> dict[str, str]:
    """Lock these lineages until the commit, sorted as everybody does; return how they stand, by id."""
    return {row[0]: row[1] for page in pages(sorted(ids)) for row in _LOCK_ALL.fetch(tx, ids=page)}


_AMONG = among(lineages.c.id, "ids")
_LOCK_ALL = Prepared(select(lineages.c.id, lineages.c.status).where(_AMONG).order_by(lineages.c.id).with_for_update())


def linked_ids(tx: Connection, policy_ids: Iterable[str]) -> dict[str, set[str]]:
    """Return the ids of the lineages that policies are linked to, by policy."""
    found: dict[str, set[str]] = {policy_id: set() for policy_id in policy_ids}
    for page in pages(sorted(found)):
        for policy_id, lineage_id in tx.execute(_LINKED, {"ids": page}):
            found[policy_id].add(lineage_id)
    return found


_LINKED = select(policy_lineages.c.policy_id, policy_lineages.c.lineage_id).where(
    among(policy_lineages.c.policy_id, "ids")
)


def find_or_add(tx: Connection, groups: list[list[str]], issuer: Issuer, now: datetime) -> list[str]:
    """Return the ids of the lineages for exactly these sets of names, in their order; those missing are made."""
    hashes = [names_hash(names) for names in groups]
    by_hash = {key: sorted(set(names)) for key, names in zip(hashes, groups, strict=True)}
    found = _ids_by_hash(tx, list(by_hash), issuer)
    for page in pages(sorted(set(by_hash) - set(found))):
        found |= _add(tx, {key: by_hash[key] for key in page}, issuer, now)
    return [found[key] for key in hashes]


def _ids_by_hash(tx: Connection, hashes: list[str], issuer: Issuer) -> dict[str, str]:
    values = {"directory_url": issuer.directory_url, "profile": issuer.profile, "key_type": issuer.key_type}
    rows = [row for page in pages(hashes) for row in tx.execute(_BY_HASH, {"hashes": page, **values})]
    return {row[0]: row[1] for row in rows}


_BY_HASH = select(lineages.c.names_hash, lineages.c.id).where(
    among(lineages.c.names_hash, "hashes"),
    *(lineages.c[name] == bindparam(name) for name in ("directory_url", "profile", "key_type")),
)


def _add(tx: Connection, by_hash: dict[str, list[str]], issuer: Issuer, now: datetime) -> dict[str, str]:
    """Insert these, leaving out what another worker has just added; return the ids of all, by hash."""
    made_by = {"directory_url": issuer.directory_url, "profile": issuer.profile, "key_type": issuer.key_type}
    times = {"created_at": now, "updated_at": now}
    rows = [{"id": new_id(), "names_hash": key, "dns_names": names} for key, names in by_hash.items()]
    insert_new_all(tx, lineages, [{**row, **made_by, **times} for row in rows])
    there = _ids_by_hash(tx, list(by_hash), issuer)
    added = set(there.values())
    listed = [
        {"dns_name": name, "lineage_id": row["id"]} for row in rows if row["id"] in added for name in row["dns_names"]
    ]
    _ADD_NAMES.run(tx, listed)
    return there


_ADD_NAMES = Prepared(insert(lineage_names))


def naming(tx: Connection, dns_name: str) -> list[Lineage]:
    """Return the lineages that have this name, wanted or not."""
    query = (
        select(*columns_of(Lineage, lineages))
        .join(lineage_names, lineage_names.c.lineage_id == lineages.c.id)
        .where(lineage_names.c.dns_name == dns_name)
        .order_by(lineages.c.id)
    )
    return [to_value(Lineage, row) for row in tx.execute(query)]


def list_wanted(tx: Connection, *, after: str = "", limit: int = 1000) -> list[Planned]:
    """Return a page, by id, of the lineages that certificates are issued for."""
    query = (
        select(*columns_of(Planned, lineages)).where(policy_wants(lineages.c.id)).order_by(lineages.c.id).limit(limit)
    )
    if after:
        query = query.where(lineages.c.id > after)
    return [to_value(Planned, row) for row in tx.execute(query)]


def of_policy(tx: Connection, policy_id: str) -> list[Lineage]:
    """Return the lineages that a policy wants, by names."""
    query = (
        select(*columns_of(Lineage, lineages))
        .join(policy_lineages, policy_lineages.c.lineage_id == lineages.c.id)
        .where(policy_lineages.c.policy_id == policy_id)
        .order_by(lineages.c.id)
    )
    return [to_value(Lineage, row) for row in tx.execute(query)]


def link(tx: Connection, wanted: Mapping[str, Iterable[str]]) -> set[str]:
    """Make `wanted` the lineages of policies, by policy id; return those that were added to one or taken from one."""
    current = linked_ids(tx, wanted)
    shall = {policy_id: set(lineage_ids) for policy_id, lineage_ids in wanted.items()}
    gone = [(one, lineage_id) for one, linked in current.items() for lineage_id in sorted(linked - shall[one])]
    fresh = [(one, lineage_id) for one, ids in shall.items() for lineage_id in sorted(ids - current[one])]
    # Locked: a status that changes meanwhile would be copied as it was, and stay so. What is gone too: who lets
    # certificates serve writes all links of their lineages at once.
    statuses = lock_all(tx, {lineage_id for _, lineage_id in gone + fresh})
    if gone:
        tx.execute(_UNLINK, [{"policy": policy_id, "lineage": lineage_id} for policy_id, lineage_id in gone])
    _LINK.run(tx, [
        {"policy_id": policy_id, "lineage_id": lineage_id, "lineage_status": statuses[lineage_id]}
        for policy_id, lineage_id in fresh
    ])  # fmt: skip
    return {lineage_id for _, lineage_id in gone + fresh}


_LINK = Prepared(insert(policy_lineages))
_UNLINK = delete(policy_lineages).where(
    policy_lineages.c.policy_id == bindparam("policy"), policy_lineages.c.lineage_id == bindparam("lineage")
)


def wanted_among(tx: Connection, ids: Iterable[str]) -> set[str]:
    """Return those of these lineages that a policy wants certificates for: `mode = auto` and not paused."""
    return {row[0] for page in pages(sorted(ids)) for row in tx.execute(_WANTED_AMONG, {"ids": page})}


_WANTED_AMONG = select(lineages.c.id).where(_AMONG, policy_wants(lineages.c.id))


_OF_LINEAGES = among(policy_lineages.c.lineage_id, "ids")


def is_wanted(tx: Connection, lineage_id: str) -> bool:
    """Say whether a policy wants certificates for it: `mode = auto` and not paused."""
    return bool(wanted_among(tx, [lineage_id]))


def is_linked(tx: Connection, lineage_id: str) -> bool:
    """Say whether a policy names it that is still there, paused or not."""
    return bool(tx.execute(_IS_LINKED, {"lineage": lineage_id}).scalar())


_IS_LINKED = select(policy_names(bindparam("lineage", type_=UuidText())))


def policy_ids(tx: Connection, lineage_id: str) -> list[str]:
    """Return the policies that name it, whatever their mode."""
    query = select(policy_lineages.c.policy_id).where(policy_lineages.c.lineage_id == lineage_id)
    return sorted(tx.execute(query).scalars())


def policy_ids_of(tx: Connection, lineage_ids: Iterable[str]) -> dict[str | None, list[str]]:
    """Return the same for many lineages, by lineage id; those that no policy names are left out."""
    found: dict[str | None, list[str]] = {}
    for page in pages(sorted(lineage_ids)):
        query = select(policy_lineages.c.lineage_id, policy_lineages.c.policy_id)
        for lineage_id, policy_id in tx.execute(query.where(policy_lineages.c.lineage_id.in_(page))):
            found.setdefault(lineage_id, []).append(policy_id)
    return found


def due(tx: Connection, now: datetime, limit: int) -> list[Planned]:
    """Return what the scan has to look at by `now`, longest due first. Costs what is due, not what exists."""
    return [to_value(Planned, row) for row in _LOCK_DUE.fetch(tx, now=now, limit=limit)]


def peek_due(tx: Connection, now: datetime) -> list[Planned]:
    """Return what the scan would look at by `now`, changing and locking nothing."""
    return [to_value(Planned, row) for row in tx.execute(_DUE, {"now": now})]


_IS_DUE = lineages.c.next_check_at <= bindparam("now")
_DUE = select(*columns_of(Planned, lineages)).where(_IS_DUE).order_by(lineages.c.next_check_at)
_LOCK_DUE = Prepared(_DUE.limit(bindparam("limit")).with_for_update(skip_locked=True))


def place(tx: Connection, ids: Iterable[str], now: datetime) -> list[str]:
    """Give lineages their place in the scan: due now when newly wanted, out of it when not; return the unwanted."""
    # Locked before asking who wants them, so that of two reconciles the later one has the last word.
    there = lock_all(tx, ids)
    wanted = wanted_among(tx, there)
    gone = sorted(set(there) - wanted)
    for page in pages(sorted(wanted)):
        tx.execute(_ENTER, {"ids": page, "now": now})
    for page in pages(gone):
        tx.execute(_LEAVE, {"ids": page, "now": now})
    return gone


_ENTER = (
    update(lineages)
    .where(_AMONG, lineages.c.next_check_at.is_(None))
    .values(next_check_at=bindparam("now"), updated_at=bindparam("now"))
)
_LEAVE = (
    update(lineages)
    .where(_AMONG, lineages.c.next_check_at.is_not(None))
    .values(next_check_at=None, updated_at=bindparam("now"))
)


def set_next_check(tx: Connection, lineage_id: str, at: datetime | None, now: datetime) -> None:
    """Say when the scan looks at it next; None: not before a policy wants it again."""
    set_next_checks(tx, {lineage_id: at}, now)


def set_next_checks(tx: Connection, moments: Mapping[str, datetime | None], now: datetime) -> None:
    """Say the same of many lineages, by id."""
    if moments:
        tx.execute(_SET_NEXT_CHECK, [{"lineage": one, "at": at, "now": now} for one, at in moments.items()])


_SET_NEXT_CHECK = (
    update(lineages)
    .where(lineages.c.id == bindparam("lineage"))
    .values(next_check_at=bindparam("at"), updated_at=bindparam("now"))
)


@dataclass(frozen=True, slots=True)
class NewCertificate:
    """A certificate that serves from now on."""

    lineage: Lineage
    certificate_id: str
    issuance_id: str
    leaf: Leaf
    usable: Validity
    """From when it came: one that arrives half used is not renewed at once."""
    renew_at: datetime


def record_certificates(tx: Connection, news: Sequence[NewCertificate], now: datetime) -> list[Flip]:
    """Note the certificates that serve from now on; return what became of policies, for the caller's audit rows.

    Failures are forgotten, service is to be proved anew, and the CA is to be asked when to renew them. A name that
    was left out has no certificate: whoever wants it has to be told.
    """
    several = [new for new in news if len(new.lineage.dns_names) > 1]  # a single name cannot be left out
    for new in several:
        _take_in(tx, new.lineage.id, new.leaf.dns_names)
    missing = left_out_among(tx, [new.lineage.id for new in several])
    rows = [_with_certificate(new, missing.get(new.lineage.id, []), now) for new in news]
    _UPDATE.run(tx, rows)
    return _copy_statuses(tx, {row["of_id"]: row["status"] for row in rows}, now)


def _with_certificate(new: NewCertificate, missing: "list[LeftOut]", now: datetime) -> dict[str, Any]:
    return {
        "of_id": new.lineage.id, "status": "error" if missing else "active",
        "certificate_id": new.certificate_id, "issuance_id": new.issuance_id,
        "not_before": new.usable.not_before, "not_after": new.usable.not_after, "renew_at": new.renew_at,
        "next_check_at": min([new.renew_at, *(name.probe_at for name in missing)]),
        "failures": 0, "error": missing[0].error if missing else None, "served_at": None, "updated_at": now,
        "renewal_id": new.leaf.renewal_id, "ari_check_at": now if new.leaf.renewal_id else None, **_NO_WINDOW,
    }  # fmt: skip


_UPDATE = Prepared(update(lineages).where(lineages.c.id == bindparam("of_id")))


_NO_WINDOW = {"window_start": None, "window_end": None, "window_url": None, "ari_failures": 0, "ari_error": None}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A name of a lineage that the newest certificate does not have, because the CA refused it."""

    dns_name: str
    failures: int
    probe_at: datetime
    """From then on it is ordered again."""
    error: dict[str, Any]


def left_out(tx: Connection, lineage_id: str) -> list[LeftOut]:
    """Return the names that are wanted and were left out, by name (partial index)."""
    query = select(*columns_of(LeftOut, lineage_names)).where(
        lineage_names.c.lineage_id == lineage_id, lineage_names.c.left_out_at.is_not(None)
    )
    return [to_value(LeftOut, row) for row in tx.execute(query.order_by(lineage_names.c.dns_name))]


def left_out_among(tx: Connection, ids: list[str]) -> dict[str, list[LeftOut]]:
    """Return the same for many lineages, by id; those that lack nothing are not in it."""
    found: dict[str, list[LeftOut]] = {}
    for page in pages(ids):
        for row in tx.execute(_LEFT_OUT_AMONG, {"ids": page}):
            found.setdefault(row[0], []).append(LeftOut(*row[1:]))
    return found


_LEFT_OUT_AMONG = (
    select(lineage_names.c.lineage_id, *columns_of(LeftOut, lineage_names))
    .where(among(lineage_names.c.lineage_id, "ids"), lineage_names.c.left_out_at.is_not(None))
    .order_by(lineage_names.c.dns_name)
)


def leave_out(tx: Connection, lineage_id: str, names: list[LeftOut], now: datetime) -> None:
    """Remember names that the CA refused: ordered without them until `probe_at`."""
    for name in names:
        row = update(lineage_names).where(
            lineage_names.c.lineage_id == lineage_id, lineage_names.c.dns_name == name.dns_name
        )
        values = {"probe_at": name.probe_at, "failures": name.failures, "error": name.error}
        tx.execute(row.values(left_out_at=func.coalesce(lineage_names.c.left_out_at, literal(now, UtcTime)), **values))


def probe_now(tx: Connection, lineage_id: str, now: datetime) -> None:
    """Let the next order have every name that is wanted: a person asked."""
    left = update(lineage_names).where(
        lineage_names.c.lineage_id == lineage_id, lineage_names.c.left_out_at.is_not(None)
    )
    tx.execute(left.values(probe_at=now))


def _take_in(tx: Connection, lineage_id: str, names: Iterable[str]) -> None:
    there = update(lineage_names).where(
        lineage_names.c.lineage_id == lineage_id,
        lineage_names.c.left_out_at.is_not(None),
        lineage_names.c.dns_name.in_(list(names)),
    )
    tx.execute(there.values(left_out_at=None, probe_at=None, failures=0, error=None))


def record_error(
    tx: Connection,
    lineage_id: str,
    error: dict[str, Any],
    now: datetime,
) -> None:
    """Note what went wrong in an attempt that goes on; the status stays."""
    tx.execute(update(lineages).where(lineages.c.id == lineage_id).values(error=error, updated_at=now))


def try_refused_again(tx: Connection, directory_url: str, now: datetime) -> int:
    """Let what failed because of the account at this CA be tried now: somebody has acted; return how many.

    Reads all lineages of the CA: for a person's command, not for every pass.
    """
    refused = (lineages.c.directory_url == directory_url, lineages.c.error["scope"].as_string() == "account")
    waiting = update(lineages).where(*refused, lineages.c.next_check_at > now)
    return tx.execute(waiting.values(next_check_at=now, updated_at=now)).rowcount


def record_failure(
    tx: Connection, lineage_id: str, error: dict[str, Any], *, failures: int, next_check_at: datetime, now: datetime
) -> None:
    """Note why the last attempt failed for good; the status becomes `error` if nothing valid serves meanwhile."""
    row = update(lineages).where(lineages.c.id == lineage_id)
    tx.execute(row.values(error=error, failures=failures, next_check_at=next_check_at, updated_at=now))
    status = tx.execute(select(lineages.c.status).where(lineages.c.id == lineage_id)).scalar()
    record_status(tx, lineage_id, "active" if status == "active" else "error", now)


def forget_certificate(tx: Connection, lineage_id: str, now: datetime) -> None:
    """Note that the certificate is gone: a new one is due at once if a policy wants it."""
    _make_due(tx, lineage_id, now, certificate_id=None)
    record_status(tx, lineage_id, "pending", now)


def spoil(tx: Connection, lineage_id: str, now: datetime) -> None:
    """Note that the certificate cannot be served: a new one is due at once if a policy wants it."""
    _make_due(tx, lineage_id, now)
    record_status(tx, lineage_id, "error", now)


def _make_due(tx: Connection, lineage_id: str, now: datetime, **values: Any) -> None:
    gone: dict[str, Any] = {
        "issuance_id": None,
        "not_before": None,
        "not_after": None,
        "renew_at": None,
        "served_at": None,
    }
    gone |= {"renewal_id": None, "ari_check_at": None, **_NO_WINDOW}
    row = update(lineages).where(lineages.c.id == lineage_id)
    tx.execute(row.values(next_check_at=now, updated_at=now, **gone, **values))


def record_status(tx: Connection, lineage_id: str, status: str, now: datetime) -> None:
    """Set a lineage's status and bring the policies that want it up to date."""
    _UPDATE.run(tx, [{"of_id": lineage_id, "status": status, "updated_at": now}])
    audit.record_flips(tx, _copy_statuses(tx, {lineage_id: status}, now), now)


def _copy_statuses(tx: Connection, by_id: Mapping[str, str], now: datetime) -> list[Flip]:
    """Tell the policies that name these lineages how they stand; return what became of these."""
    naming_them: set[str] = set()
    for status in sorted(set(by_id.values())):
        ids = sorted(lineage_id for lineage_id, its in by_id.items() if its == status)
        naming_them.update(row[0] for row in _UPDATE_LINKS.fetch(tx, ids=ids, to=status))
    return policies.refresh(tx, naming_them, now).flips


_UPDATE_LINKS = Prepared(
    update(policy_lineages)
    .where(_OF_LINEAGES)
    .values(lineage_status=bindparam("to"))
    .returning(policy_lineages.c.policy_id)
)


def first_name(tx: Connection, lineage: Lineage) -> str:
    """Return the name its certificate is filed under: the first one of the policy that wants it."""
    if len(lineage.dns_names) == 1:
        return lineage.dns_names[0]
    wanted = (
        select(tls_policies.c.domains)
        .join(policy_lineages, policy_lineages.c.policy_id == tls_policies.c.id)
        .where(policy_lineages.c.lineage_id == lineage.id)
        .order_by(tls_policies.c.created_at, tls_policies.c.id)
    )
    listed = [str(name).lower() for domains in tx.execute(wanted).scalars() for name in domains]
    return next((name for name in listed if name in lineage.dns_names), lineage.dns_names[0])


def having_certificate(tx: Connection, certificate_id: str) -> str | None:
    """Return the lineage whose certificate this is, or was when the row was deleted by another program."""
    return tx.execute(select(lineages.c.id).where(lineages.c.certificate_id == certificate_id)).scalar()


@dataclass(frozen=True, slots=True)
class Unserved:
    """A certificate that is not proved to be served by every node."""

    lineage_id: str
    certificate_id: str
    revision: int
    fingerprint: str
    issuance_id: str | None


def unserved(tx: Connection, after: str, limit: int) -> list[Unserved]:
    """Return a page of them, by lineage id (partial index)."""
    query = _UNSERVED.order_by(lineages.c.id).limit(limit)
    if after:
        query = query.where(lineages.c.id > after)
    return [Unserved(*row) for row in tx.execute(query)]


def count_unserved(tx: Connection, came_before: datetime) -> int:
    """Return how many of them have waited since before this instant."""
    waiting = _UNSERVED.join(issuances, issuances.c.id == lineages.c.issuance_id)
    old = waiting.where(issuances.c.closed_at <= came_before).subquery()
    return int(tx.execute(select(func.count()).select_from(old)).scalar_one())


def unserved_among(tx: Connection, ids: list[str]) -> dict[str, Unserved]:
    """Return those of these lineages, by id."""
    found = [row for page in pages(ids) for row in tx.execute(_UNSERVED.where(lineages.c.id.in_(page)))]
    return {row[0]: Unserved(*row) for row in found}


def served_among(tx: Connection, ids: Iterable[str]) -> set[str]:
    """Return those of these lineages that every live node had proved to serve."""
    return {row[0] for page in pages(sorted(ids)) for row in tx.execute(_SERVED_AMONG, {"ids": page})}


_SERVED_AMONG = select(lineages.c.id).where(_AMONG, lineages.c.served_at.is_not(None))


_UNSERVED = (
    select(
        lineages.c.id,
        certificates.c.id,
        certificates.c.revision,
        certificates.c.fingerprint,
        lineages.c.issuance_id,
    )
    .join(certificates, certificates.c.id == lineages.c.certificate_id)
    .where(lineages.c.served_at.is_(None), lineages.c.certificate_id.is_not(None))
    .where(certificates.c.revision.is_not(None), certificates.c.status == "active")
)


def record_served(tx: Connection, proved: Iterable[Unserved], now: datetime) -> None:
    """Note that every live node serves these certificates, but for those that a newer one has come for meanwhile."""
    rows = [
        {"lineage": one.lineage_id, "issuance": one.issuance_id, "now": now}
        for one in sorted(proved, key=lambda one: one.lineage_id)  # as everybody locks them
    ]
    if rows:
        tx.execute(_SET_SERVED, rows)


# Compared in the row itself: a look at another table would be older than the wait for this row's lock.
_SET_SERVED = (
    update(lineages)
    .where(lineages.c.id == bindparam("lineage"), lineages.c.served_at.is_(None))
    .where(lineages.c.issuance_id == bindparam("issuance"))
    .values(served_at=bindparam("now"))
)
