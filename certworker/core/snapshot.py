"""One gateway configuration, frozen and checked: what a config version holds and a node renders.

Every value keeps its rule in its type, so a `Snapshot` that exists can be rendered: the rules run
when `core.gateway` builds one from rows and again when a node reads one from the network. There is
no key and no certificate text in it, and of the TLS policies only those that a listener names.

Sources: RFC 9110 §7.2 (Host), RFC 3986 §3.3 (path), RFC 6761 §6.3 (localhost), HAProxy 2.6 and nginx
1.22 behaviour for what a value may not contain.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from certworker.core.addresses import LABELS, check_target_host
from certworker.core.patterns import check_regex
from certworker.errors import InputError

MAX_INTERVAL = timedelta(hours=1)
MAX_WEIGHT = 256
"""HAProxy's limit; nginx has none."""
MAX_PRIORITY = 2**31 - 1

UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
"""The form of every id."""
MAX_PATH = 1024
_PATH = re.compile(r"/[!-~]*")


def check_host(value: str) -> str:
    """Return `value` in lower case if a Host header can match it: a name, or `*.` and a name."""
    host = value.lower()
    # isascii before lower(): the Kelvin sign becomes a plain k.
    if not value.isascii() or len(host) > 253 or not LABELS.fullmatch(host.removeprefix("*.")):
        raise ValueError("a host is a name of A-labels, or *. and such a name")
    return host


def check_path(value: str) -> str:
    """Return `value` if a request path can equal it or start with it, once decoded."""
    if not _PATH.fullmatch(value):
        raise ValueError("a path starts with / and has printable ASCII characters only, no blanks")
    if len(value) + value.count("\\") > MAX_PATH:
        # nginx reads no word of more than 4,096 bytes, and a backslash is written as four.
        raise ValueError(f"a path has at most {MAX_PATH} characters, of which a backslash counts as two")
    if "//" in value or {".", ".."} & set(value.split("/")):
        raise ValueError("a path has neither an empty nor a . or .. segment: clients take them out")
    if found := set("%?#") & set(value):
        raise ValueError(f"a path is written decoded and ends before a query: no {min(found)!r}")
    return value


def _unique(items: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for item in items:
        if item in seen:
            raise ValueError(f"{what} {item} is there twice")
        seen.add(item)


Id = Annotated[str, Field(pattern=UUID)]
Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, AfterValidator(check_host)]
Path = Annotated[str, AfterValidator(check_path)]
Regex = Annotated[str, AfterValidator(check_regex)]
TargetHost = Annotated[str, AfterValidator(check_target_host)]


class Model(BaseModel):
    """A frozen value without unknown keys and without conversions: `"80"` is no port."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PathMatch(Model):
    """How a request's path is compared: exactly one of three."""

    exact: Path | None = None
    prefix: Path | None = None
    """Matches on a segment border: `/api` is met by `/api` and `/api/x`, not by `/apix`."""
    regex: Regex | None = None
    """Has to match the whole path."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len([value for value in (self.exact, self.prefix, self.regex) if value is not None]) != 1:
            raise ValueError("a path match has exactly one of exact, prefix, regex")
        return self


class Match(Model):
    """Which requests a route takes; `{}` takes all. The form of `routes.match_expr`."""

    host: Host | None = None
    path: PathMatch | None = None


class Route(Model):
    """What a listener does with a request, or with a whole connection (`port`)."""

    id: Id
    type: Literal["port", "path", "ws"]
    match: Match
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
    pool_id: Id

    @model_validator(mode="after")
    def _port_matches_all(self) -> Self:
        if self.type == "port" and self.match != Match():
            raise ValueError("a port route takes every connection: its match_expr is {}")
        return self


class Listener(Model):
    """A port that the proxy listens on, with its routes in the order in which they are tried."""

    id: Id
    port: Port
    protocol: Literal["http", "https"]
    tls_policy_id: Id | None = None
    """None on https: the certificates of all policies, by SNI."""
    # Left out of the document while it is the default: what a release wrote that did not know it keeps its digest.
    challenge: Annotated[Literal["forward", "stateless"], Field(exclude_if=lambda value: value == "forward")] = (
        "forward"
    )
    """Who answers HTTP-01 challenges: the responders, or the proxy itself with the account's thumbprint."""
    routes: tuple[Route, ...] = ()

    @property
    def passes_bytes(self) -> bool:
        """Say whether the listener forwards connections as they are, without reading HTTP."""
        return any(route.type == "port" for route in self.routes)

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.passes_bytes and len(self.routes) != 1:
            raise ValueError("a port route is the only route of its listener")
        if self.passes_bytes and self.protocol != "http":
            raise ValueError("a port route passes bytes on and ends no TLS: its listener has protocol http")
        if self.protocol == "http" and self.tls_policy_id is not None:
            raise ValueError("an http listener has no TLS policy")
        return self


class Target(Model):
    """One upstream server."""

    id: Id
    host: TargetHost
    """An IP literal without brackets, or a name that the proxy resolves."""
    port: Port
    weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT)] = 1
    """0 takes no traffic. Counts under `weighted` and `least_conn`."""


class HealthCheck(Model):
    """A TCP connect every `interval`, failed if it takes longer than `timeout`."""

    interval: Annotated[timedelta, Field(ge=timedelta(seconds=1), le=MAX_INTERVAL)]
    timeout: Annotated[timedelta, Field(ge=timedelta(milliseconds=1))]

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if self.timeout > self.interval:
            raise ValueError("the time limit of a check is at most its interval")
        return self


class Pool(Model):
    """Upstream servers that share their traffic."""

    id: Id
    policy: Literal["round_robin", "least_conn", "weighted"]
    check: HealthCheck | None = None
    targets: tuple[Target, ...] = ()


class Policy(Model):
    """A TLS policy that a listener names."""

    id: Id
    mode: Literal["auto", "manual"]


class Responder(Model):
    """Where HTTP-01 challenges are answered."""

    host: TargetHost
    port: Port


class Snapshot(Model):
    """A whole gateway configuration."""

    schema_version: Literal[1] = 1
    listeners: tuple[Listener, ...] = ()
    pools: tuple[Pool, ...] = ()
    policies: tuple[Policy, ...] = ()
    responders: tuple[Responder, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        routes = [route for listener in self.listeners for route in listener.routes]
        for kind, rows in (("listener", self.listeners), ("pool", self.pools), ("route", routes)):
            _unique((row.id for row in rows), kind)
        _unique((target.id for pool in self.pools for target in pool.targets), "target")
        _unique((str(listener.port) for listener in self.listeners), "port")
        if {route.pool_id for route in routes} - {pool.id for pool in self.pools}:
            raise ValueError("a route names a pool that is not there")
        if {row.tls_policy_id for row in self.listeners} - {policy.id for policy in self.policies} - {None}:
            raise ValueError("a listener names a policy that is not there")
        return self

    def document(self) -> dict[str, object]:
        """Return the snapshot as JSON values, for `config_versions.snapshot_json`."""
        return self.model_dump(mode="json", exclude_none=True)

    def canonical(self) -> bytes:
        """Return the one byte form: equal snapshots give equal bytes."""
        return json.dumps(self.document(), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        """Return the SHA-256 of the canonical bytes, 64 lower-case hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()


def read_snapshot(document: object) -> Snapshot:
    """Read what `Snapshot.document` gave, or raise `InputError` naming the field and the rule."""
    try:
        return Snapshot.model_validate_json(json.dumps(document))
    except ValidationError as refused:
        error = refused.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"])) or "snapshot"
        raise InputError(f"snapshot: {where}: {error['msg']}") from None
