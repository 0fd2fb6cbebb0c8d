"""The gateway's rows as they are read, before anybody has looked whether they are right; `core.gateway` does.

Apart from it, because whoever only issues certificates needs these few values, and none of pydantic.
"""

from dataclasses import dataclass
from datetime import timedelta

STATELESS = "stateless"
"""How a listener answers challenges by itself."""


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
    reserved: tuple[str, ...] = ()
    """`host:port` of what is certworker's own and no upstream of anybody; an unspecified host is every loopback one."""
