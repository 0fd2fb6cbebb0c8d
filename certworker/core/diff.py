"""What changed between two snapshots, row by row: what was added, removed, or is another value now.

Rows are named as in the gateway's tables (`routes`, `upstream_targets`, ...), their fields as the columns,
and places in a JSON column with dots (`match_expr.path.prefix`), so that a person finds what he wrote.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from certworker.core.snapshot import HealthCheck, Listener, Pool, Route, Snapshot, Target

TABLES = ("listeners", "routes", "upstream_pools", "upstream_targets", "tls_policies", "responders")
"""In the order in which changes are listed. `responders` is no table: they are settings, with an address for an id."""

Value = str | int | float | None
Fields = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Change:
    """One row that is not alike in two snapshots."""

    table: str
    row_id: str
    kind: Literal["added", "removed", "changed"]
    fields: Mapping[str, tuple[Value, Value]]
    """What is not alike: by field, the value before and the value after; None where there is none."""

    def document(self) -> dict[str, object]:
        """Return the change as JSON values."""
        fields = {name: {"from": before, "to": after} for name, (before, after) in self.fields.items()}
        return {"table": self.table, "id": self.row_id, "change": self.kind, "fields": fields}


def compare(before: Snapshot | None, after: Snapshot | None) -> tuple[Change, ...]:
    """Return how `after` differs from `before`, by table and id; None is a gateway without any row."""
    old, new = dict(_rows(before)), dict(_rows(after))
    places = sorted(old.keys() | new.keys(), key=lambda place: (TABLES.index(place[0]), place[1]))
    return tuple(_change(place, old.get(place), new.get(place)) for place in places if old.get(place) != new.get(place))


def _change(place: tuple[str, str], old: Fields | None, new: Fields | None) -> Change:
    before, after = old or {}, new or {}
    names = [*before, *(name for name in after if name not in before)]
    unlike = {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
    return Change(*place, "added" if old is None else "removed" if new is None else "changed", unlike)


def _rows(snapshot: Snapshot | None) -> Iterator[tuple[tuple[str, str], Fields]]:
    if snapshot is None:
        return
    for listener in snapshot.listeners:
        yield ("listeners", listener.id), _listener(listener)
        for route in listener.routes:
            yield ("routes", route.id), _route(listener, route)
    for pool in snapshot.pools:
        yield ("upstream_pools", pool.id), _pool(pool)
        for target in pool.targets:
            yield ("upstream_targets", target.id), _target(pool, target)
    for policy in snapshot.policies:
        yield ("tls_policies", policy.id), {"mode": policy.mode}
    for responder in snapshot.responders:
        yield ("responders", _address(responder.host, responder.port)), {}


def _listener(listener: Listener) -> Fields:
    return {
        "port": listener.port,
        "protocol": listener.protocol,
        "tls_policy_id": listener.tls_policy_id,
        "challenge": listener.challenge,
    }


def _route(listener: Listener, route: Route) -> Fields:
    path = route.match.path
    paths = {} if path is None else {f"match_expr.path.{kind}": value for kind, value in path if value is not None}
    return {
        "listener_id": listener.id,
        "type": route.type,
        "priority": route.priority,
        "upstream_pool_id": route.pool_id,
        "match_expr.host": route.match.host,
        **paths,
    }


def _pool(pool: Pool) -> Fields:
    return {"policy": pool.policy, **({} if pool.check is None else _check(pool.check))}


def _check(check: HealthCheck) -> Fields:
    return {
        "health_check.interval_secs": _whole(check.interval / timedelta(seconds=1)),
        "health_check.timeout_ms": _whole(check.timeout / timedelta(milliseconds=1)),
    }


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _target(pool: Pool, target: Target) -> Fields:
    return {"pool_id": pool.id, "address": _address(target.host, target.port), "weight": target.weight}


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
