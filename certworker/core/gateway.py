"""The gateway's rows, and how they become a snapshot.

The five tables are written by people and by other programs, so any value may be anything. `build`
leaves out what breaks a rule, with all that hangs on it, and says so; whether to publish in spite
of a fault is decided by the publish step.
"""

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field, ValidationError

from certworker.core.snapshot import (
    MAX_INTERVAL,
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

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^\[\]:]*)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class ListenerRow:
    """A row of `listeners`."""

    id: str
    name: str | None
    port: int
    protocol: str
    tls_policy_id: str | None
    enabled: bool
    challenge: str | None = None
    """How HTTP-01 challenges are answered: `forward` (or None) or `stateless`."""


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A row of `routes`."""

    id: str
    listener_id: str
    type: str
    match_expr: object
    priority: int
    upstream_pool_id: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class PoolRow:
    """A row of `upstream_pools`."""

    id: str
    name: str
    policy: str
    health_check: object | None
    """None: the targets are not checked."""


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A row of `upstream_targets`."""

    id: str
    pool_id: str
    address: str
    """`host:port`, an IPv6 literal in brackets."""
    weight: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A row of `tls_policies`, as far as a gateway needs it."""

    id: str
    mode: str


@dataclass(frozen=True, slots=True)
class GatewayRows:
    """The gateway's tables at one moment. `policies` needs to hold only those that a listener names."""

    listeners: tuple[ListenerRow, ...] = ()
    routes: tuple[RouteRow, ...] = ()
    pools: tuple[PoolRow, ...] = ()
    targets: tuple[TargetRow, ...] = ()
    policies: tuple[PolicyRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the rows leave open."""

    health_interval: timedelta
    health_timeout: timedelta
    responders: tuple[str, ...]
    """`host:port` of everything that answers HTTP-01 challenges."""


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

    def add(self, table: str, row: _Row, field: str, rule: str, value: object = None) -> None:
        self.found.append(Fault(table, show(row.id).strip("'"), field, rule, "" if value is None else show(value)))

    def read(self, table: str, rows: Iterable[R], make: Callable[[R], M]) -> list[M]:
        """Return what `make` makes of each row, without those that break a rule."""
        made = []
        for row in sorted(rows, key=lambda row: str(row.id)):
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
    return short.repr(value)


def _show_key(key: int | str) -> str:
    return str(key) if str(key).isidentifier() else show(key)


def _split_address(address: object) -> tuple[str, int]:
    """Split `host:port` or `[IPv6]:port`, as it stands; the values are checked by who takes them."""
    found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if found is None or (found["v6"] is not None and ":" not in found["v6"]):
        raise _FieldFault("address", "an address is host:port, an IPv6 literal in brackets", address)
    return found["v6"] or found["host"], int(found["port"])


def build(rows: GatewayRows, defaults: Defaults) -> Built:
    """Make the snapshot of `rows`, and name every row that had to be left out.

    A wrong responder address is no row's fault but the settings': that raises `InputError`.
    """
    faults = _Faults()
    policies = _read_policies(rows, faults)
    pools = _read_pools(rows, defaults, faults)
    routes = _read_routes(rows, {pool.id for pool in pools}, faults)
    listeners = _read_listeners(rows, routes, {policy.id for policy in policies}, faults)
    snapshot = Snapshot(
        listeners=tuple(sorted(listeners, key=lambda listener: listener.port)),
        pools=tuple(pools),
        policies=tuple(policies),
        responders=_read_responders(defaults),
    )
    return Built(snapshot, tuple(faults.found))


def _read_policies(rows: GatewayRows, faults: _Faults) -> list[Policy]:
    named = {row.tls_policy_id for row in rows.listeners if row.enabled and row.protocol == "https"}
    wanted = [row for row in rows.policies if row.id in named]
    return faults.read("tls_policies", wanted, lambda row: Policy.model_validate({"id": row.id, "mode": row.mode}))


def _read_pools(rows: GatewayRows, defaults: Defaults, faults: _Faults) -> list[Pool]:
    known = {row.id for row in rows.pools}
    targets: dict[str, list[Target]] = {}
    for row in sorted(rows.targets, key=lambda row: str(row.id)):
        if row.enabled and row.pool_id not in known:
            faults.add("upstream_targets", row, "pool_id", "names no pool", row.pool_id)
        elif row.enabled:
            targets.setdefault(row.pool_id, []).extend(faults.read("upstream_targets", [row], _read_target))

    def read(row: PoolRow) -> Pool:
        check = None if row.health_check is None else _read_check(row.health_check, defaults)
        own = tuple(targets.get(row.id, ()))
        return Pool.model_validate({"id": row.id, "policy": row.policy, "check": check, "targets": own})

    return faults.read("upstream_pools", rows.pools, read)


def _read_target(row: TargetRow) -> Target:
    host, port = _split_address(row.address)
    return Target.model_validate({"id": row.id, "host": host, "port": port, "weight": row.weight})


def _read_check(expr: object, defaults: Defaults) -> HealthCheck:
    return HealthCheckExpr.model_validate(expr).health_check(defaults)


def _read_routes(rows: GatewayRows, pool_ids: set[str], faults: _Faults) -> dict[str, list[Route]]:
    known = {row.id for row in rows.listeners}
    listener_of = {row.id: row.listener_id for row in rows.routes}

    def read(row: RouteRow) -> Route:
        if row.listener_id not in known:
            raise _FieldFault("listener_id", "names no listener", row.listener_id)
        if row.upstream_pool_id not in pool_ids:
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
    enabled = [row for row in rows.listeners if row.enabled]
    users = Counter(show(row.port) for row in enabled)

    def read(row: ListenerRow) -> Listener:
        if users[show(row.port)] > 1:
            raise _FieldFault("port", "is used by another listener too", row.port)
        policy_id = row.tls_policy_id if row.protocol == "https" else None
        if policy_id is not None and policy_id not in policy_ids:
            raise _FieldFault("tls_policy_id", "names no TLS policy that can be used", policy_id)
        challenge = "forward" if row.challenge is None else row.challenge
        values = {"id": row.id, "port": row.port, "protocol": row.protocol, "tls_policy_id": policy_id}
        return Listener.model_validate(values | {"challenge": challenge, "routes": tuple(routes.get(row.id, ()))})

    return faults.read("listeners", enabled, read)


def _read_responders(defaults: Defaults) -> tuple[Responder, ...]:
    try:
        addresses = [_split_address(address) for address in defaults.responders]
        return tuple(Responder(host=host, port=port) for host, port in addresses)
    except (_FieldFault, ValidationError) as refused:
        raise InputError(f"responder addresses {show(defaults.responders)}: {_first_line(refused)}") from None


def _first_line(refused: _FieldFault | ValidationError) -> str:
    return refused.errors()[0]["msg"] if isinstance(refused, ValidationError) else refused.rule
