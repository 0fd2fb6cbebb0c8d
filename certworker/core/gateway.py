"""The gateway's rows, and how they become a snapshot.

The five tables are written by people and by other programs, so any value may be anything. `build`
leaves out what breaks a rule, with all that hangs on it, and says so; whether to publish in spite
of a fault is decided by the publish step (ON_BAD_ROW).
"""

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field, ValidationError

from certworker.core.addresses import Reserved, split_address
from certworker.core.gateway_rows import Defaults, GatewayRows, ListenerRow, PolicyRow, PoolRow, RouteRow, TargetRow
from certworker.core.snapshot import (
    MAX_INTERVAL,
    UUID,
    HealthCheck,
    Listener,
    Match,
    Model,
    Policy,
    Pool,
    Responder,
    Route,
    Snapshot,
    Target,
)
from certworker.errors import InputError

__all__ = [
    "Built", "Defaults", "Fault", "GatewayRows", "HealthCheckExpr", "ListenerRow", "PolicyRow", "PoolRow", "RouteRow",
    "TargetRow", "build", "read_responders", "show",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that is left out, and why."""

    table: str
    row_id: str
    field: str
    rule: str
    value: str = ""
    """The offending value as a short `repr`, which holds no control characters."""

    def __str__(self) -> str:
        value = f" {self.value}" if self.value else ""
        return f"{self.table} {self.row_id}: {self.field}{value}: {self.rule}"


@dataclass(frozen=True, slots=True)
class Built:
    """What the rows amount to."""

    snapshot: Snapshot
    faults: tuple[Fault, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and probably not meant, a line each."""
        swallowing = (one for one in self.snapshot.listeners if one.passes_bytes and one.port == 80)
        return tuple(
            f"listeners {one.id}: its port route passes on all of port 80, so no HTTP-01 challenge is answered there"
            for one in swallowing
        )


class HealthCheckExpr(Model):
    """The form of `upstream_pools.health_check`. Some programs say `kind`, some `type`."""

    kind: Literal["tcp"] = "tcp"
    type: Literal["tcp"] = "tcp"
    interval_secs: Annotated[int, Field(ge=1, le=int(MAX_INTERVAL.total_seconds()))] | None = None
    timeout_ms: Annotated[int, Field(ge=1)] | None = None

    def health_check(self, defaults: Defaults) -> HealthCheck:
        """Return the check; a default time limit gives way to a shorter interval."""
        interval = timedelta(seconds=self.interval_secs) if self.interval_secs else defaults.health_interval
        timeout = min(defaults.health_timeout, interval)
        if self.timeout_ms is not None:
            timeout = timedelta(milliseconds=self.timeout_ms)
        return HealthCheck(interval=interval, timeout=timeout)


class _Row(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Row)
M = TypeVar("M", bound=BaseModel)


class _Faults:
    """Reads rows one by one and collects what is wrong with them."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    def identify(self, table: str, rows: Iterable[R]) -> list[R]:
        """Return the rows that can be told apart, by id; everything else looks rows up by it."""
        sound = []
        rows = tuple(rows)
        uses = Counter(row.id for row in rows if isinstance(row.id, str))
        for row in rows:
            if not isinstance(row.id, str) or not re.fullmatch(UUID, row.id):
                self.add(table, row, "id", _RULES["string_pattern_mismatch"])
            elif uses[row.id] > 1:
                self.add(table, row, "id", "is there twice")
            else:
                sound.append(row)
        return sorted(sound, key=lambda row: row.id)

    def add(self, table: str, row: _Row, field: str, rule: str, value: object = None) -> None:
        self.found.append(Fault(table, show(row.id).strip("'"), field, rule, "" if value is None else show(value)))

    def read(self, table: str, rows: Iterable[R], make: Callable[[R], M]) -> list[M]:
        """Return what `make` makes of each row, without those that break a rule."""
        made = []
        for row in rows:
            try:
                made.append(make(row))
            except ValidationError as refused:
                self._add_refusal(table, row, refused)
            except _FieldFault as refused:
                self.add(table, row, refused.field, refused.rule, refused.value)
        return made

    def _add_refusal(self, table: str, row: _Row, refused: ValidationError) -> None:
        for error in refused.errors(include_url=False):
            field = _field(refused.title, ".".join(map(_show_key, error["loc"])))
            rule = _RULES.get(error["type"], error["msg"].removeprefix("Value error, "))
            whole = error["type"] == "value_error" and not error["loc"]
            self.add(table, row, field, rule, None if whole else error["input"])


def _field(title: str, place: str) -> str:
    """Name the column, and the place in its JSON, that a model's field was read from."""
    if column := _COLUMN_OF.get(title):
        return f"{column}.{place}" if place else column
    return _COLUMN_OF.get(f"{title}.{place}", place)


_COLUMN_OF = {
    "Match": "match_expr",
    "HealthCheckExpr": "health_check",
    "HealthCheck": "health_check",
    "Route.": "match_expr",
    "Listener.": "routes",
    "Target.host": "address",
    "Target.port": "address",
}
_RULES = {
    "extra_forbidden": "unknown key",
    "model_type": "a JSON object is needed",
    "string_pattern_mismatch": "an id is a lower-case UUID",
}


class _FieldFault(Exception):
    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(rule)
        self.field, self.rule, self.value = field, rule, value


def show(value: object) -> str:
    """Return a short text for any value, safe in a log line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"<{type(value).__name__}>"


def _show_key(key: int | str) -> str:
    return str(key) if str(key).isidentifier() else show(key)


def build(rows: GatewayRows, defaults: Defaults) -> Built:
    """Make the snapshot of `rows`, and name every row that had to be left out.

    Whatever the rows hold, this raises nothing; a wrong responder or reserved address is no row's fault
    but the settings', and raises `InputError`.
    """
    faults = _Faults()
    reserved = _read_reserved(defaults)
    rows = GatewayRows(
        listeners=tuple(faults.identify("listeners", rows.listeners)),
        routes=tuple(faults.identify("routes", rows.routes)),
        pools=tuple(faults.identify("upstream_pools", rows.pools)),
        targets=tuple(faults.identify("upstream_targets", rows.targets)),
        policies=tuple(faults.identify("tls_policies", rows.policies)),
    )
    policies = _read_policies(rows, faults)
    pools = _read_pools(rows, defaults, reserved, faults)
    routes = _read_routes(rows, {pool.id for pool in pools}, faults)
    listeners = _read_listeners(rows, routes, {policy.id for policy in policies}, faults)
    snapshot = Snapshot(
        listeners=tuple(sorted(listeners, key=lambda listener: listener.port)),
        pools=tuple(pools),
        policies=tuple(policies),
        responders=read_responders(defaults),
    )
    return Built(snapshot, tuple(faults.found))


def _is_one_of(value: object, known: Collection[str]) -> bool:
    """Say whether `value` names one of `known`; what is no text names nothing."""
    return isinstance(value, str) and value in known


def _read_policies(rows: GatewayRows, faults: _Faults) -> list[Policy]:
    ending_tls = (row for row in rows.listeners if row.enabled and row.protocol == "https")
    named = {row.tls_policy_id for row in ending_tls if isinstance(row.tls_policy_id, str)}
    wanted = [row for row in rows.policies if row.id in named]
    return faults.read("tls_policies", wanted, lambda row: Policy.model_validate({"id": row.id, "mode": row.mode}))


def _read_pools(rows: GatewayRows, defaults: Defaults, reserved: Reserved, faults: _Faults) -> list[Pool]:
    known = {row.id for row in rows.pools}
    targets: dict[str, list[Target]] = {}
    for row in rows.targets:
        if row.enabled and not _is_one_of(row.pool_id, known):
            faults.add("upstream_targets", row, "pool_id", "names no pool", row.pool_id)
        elif row.enabled:
            own = faults.read("upstream_targets", [row], lambda row: _read_target(row, reserved))
            targets.setdefault(row.pool_id, []).extend(own)

    def read(row: PoolRow) -> Pool:
        check = None if row.health_check is None else _read_check(row.health_check, defaults)
        own = tuple(targets.get(row.id, ()))
        return Pool.model_validate({"id": row.id, "policy": row.policy, "check": check, "targets": own})

    return faults.read("upstream_pools", rows.pools, read)


def _read_target(row: TargetRow, reserved: Reserved) -> Target:
    try:
        host, port = split_address(row.address)
    except ValueError as refused:
        raise _FieldFault("address", str(refused), row.address) from None
    target = Target.model_validate({"id": row.id, "host": host, "port": port, "weight": row.weight})
    if reserved.holds(target.host, target.port):
        raise _FieldFault("address", "is certworker's own (its API or a responder), no upstream", row.address)
    return target


def _read_reserved(defaults: Defaults) -> Reserved:
    try:
        return Reserved(defaults.reserved)
    except ValueError as refused:
        raise InputError(f"reserved addresses {show(defaults.reserved)}: {refused}") from None


def _read_check(expr: object, defaults: Defaults) -> HealthCheck:
    return HealthCheckExpr.model_validate(expr).health_check(defaults)


def _read_routes(rows: GatewayRows, pool_ids: set[str], faults: _Faults) -> dict[str, list[Route]]:
    known = {row.id for row in rows.listeners}
    listener_of = {row.id: row.listener_id for row in rows.routes}

    def read(row: RouteRow) -> Route:
        if not _is_one_of(row.listener_id, known):
            raise _FieldFault("listener_id", "names no listener", row.listener_id)
        if not _is_one_of(row.upstream_pool_id, pool_ids):
            raise _FieldFault("upstream_pool_id", "names no pool that can be used", row.upstream_pool_id)
        values = {"id": row.id, "type": row.type, "priority": row.priority, "pool_id": row.upstream_pool_id}
        return Route.model_validate(values | {"match": Match.model_validate(row.match_expr)})

    routes: dict[str, list[Route]] = {}
    for route in faults.read("routes", (row for row in rows.routes if row.enabled), read):
        routes.setdefault(listener_of[route.id], []).append(route)
    return {listener: sorted(own, key=lambda route: (route.priority, route.id)) for listener, own in routes.items()}


def _read_listeners(
    rows: GatewayRows, routes: dict[str, list[Route]], policy_ids: set[str], faults: _Faults
) -> list[Listener]:
    def read(row: ListenerRow) -> Listener:
        policy_id = row.tls_policy_id if row.protocol == "https" else None
        if policy_id is not None and not _is_one_of(policy_id, policy_ids):
            raise _FieldFault("tls_policy_id", "names no TLS policy that can be used", policy_id)
        challenge = "forward" if row.challenge is None else row.challenge
        values = {"id": row.id, "port": row.port, "protocol": row.protocol, "tls_policy_id": policy_id}
        return Listener.model_validate(values | {"challenge": challenge, "routes": tuple(routes.get(row.id, ()))})

    enabled = [row for row in rows.listeners if row.enabled]
    # Counted among those that could be served: a row that cannot takes no port from one that can.
    sound = {listener.id: listener for listener in faults.read("listeners", enabled, read)}
    users = Counter(listener.port for listener in sound.values())

    def read_alone(row: ListenerRow) -> Listener:
        if users[row.port] > 1:
            raise _FieldFault("port", "is used by another listener too", row.port)
        return sound[row.id]

    return faults.read("listeners", (row for row in enabled if row.id in sound), read_alone)


def read_responders(defaults: Defaults) -> tuple[Responder, ...]:
    """Return where challenges are answered, or raise `InputError` for an address that is none."""
    try:
        addresses = [split_address(address) for address in defaults.responders]
        return tuple(Responder(host=host, port=port) for host, port in addresses)
    except ValueError as refused:  # a ValidationError is one
        rule = refused.errors()[0]["msg"] if isinstance(refused, ValidationError) else str(refused)
        raise InputError(f"responder addresses {show(defaults.responders)}: {rule}") from None
