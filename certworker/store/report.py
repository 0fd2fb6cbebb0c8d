"""Read-only views over several tables, for `status` and `/metrics`."""

from typing import Any

from sqlalchemy import Connection, func, literal, literal_column, select, text, union_all

from certworker.store.tables import (
    OPEN,
    certificates,
    issuances,
    lineage_names,
    lineages,
    policy_lineages,
    tls_policies,
)

_OPEN_BY_STATE = select(issuances.c.state, func.count()).where(text(f"issuances.{OPEN}")).group_by(issuances.c.state)
_POLICIES_BY_STATUS = select(tls_policies.c.status, func.count()).group_by(tls_policies.c.status)
_CERTIFICATES = select(func.count()).select_from(certificates)
_CERTIFICATES_NOT_ACTIVE = union_all(
    *(
        select(literal(status), func.count()).where(certificates.c.status == literal_column(f"'{status}'"))
        for status in ("expired", "error")
    )
)


def counts(tx: Connection) -> dict[str, dict[str, int]]:
    """Return how many certificates and policies there are in each status, and open issuances by state.

    Costs what exists: half a second for a million, so not to be asked at every turn.
    """
    return {
        "certificates": _certificates(tx),
        "policies": _pairs(tx, _POLICIES_BY_STATUS),
        "open_issuances": _pairs(tx, _OPEN_BY_STATE),
    }


def _certificates(tx: Connection) -> dict[str, int]:
    """Count them by their indexes: grouped by status, all would be read, and keys and chains are gigabytes."""
    others = _pairs(tx, _CERTIFICATES_NOT_ACTIVE)
    active = int(tx.execute(_CERTIFICATES).scalar_one()) - sum(others.values())
    return {"active": active, **others} if active else others


def lineage_rows(tx: Connection, dns_name: str | None = None, limit: int = 10_000) -> list[dict[str, Any]]:
    """Return the lineages that policies want, with their certificate, by names: of one name, or all."""
    wanted = select(policy_lineages.c.lineage_id).distinct()
    query = (
        select(
            lineages.c.id, lineages.c.dns_names, lineages.c.status, lineages.c.error, lineages.c.next_check_at,
            lineages.c.renew_at, lineages.c.window_start, lineages.c.window_end, lineages.c.window_url,
            lineages.c.ari_error, lineages.c.failures, lineages.c.served_at, certificates.c.serial,
            certificates.c.fingerprint, certificates.c.issuer, certificates.c.expires_at,
            certificates.c.status.label("certificate_status"), certificates.c.revision,
            certificates.c.id.label("certificate_id"),
            issuances.c.state, issuances.c.attempt_at,
        )
        .outerjoin(certificates, certificates.c.id == lineages.c.certificate_id)
        .outerjoin(issuances, (issuances.c.lineage_id == lineages.c.id) & issuances.c.closed_at.is_(None))
        .where(lineages.c.id.in_(wanted))
        .order_by(lineages.c.id)
        .limit(limit)
    )  # fmt: skip
    if dns_name is not None:
        from_names = select(lineage_names.c.lineage_id).where(lineage_names.c.dns_name == dns_name)
        query = query.where(lineages.c.id.in_(from_names))
    return [dict(row._mapping) for row in tx.execute(query)]


def _pairs(tx: Connection, query: Any) -> dict[str, int]:
    return {str(status): int(count) for status, count in tx.execute(query) if count}
