"""Laws of the snapshot: which rows it takes, that it round-trips, and what hostile values come to."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from certworker.core.gateway import (
    Built,
    Defaults,
    GatewayRows,
    ListenerRow,
    PolicyRow,
    PoolRow,
    RouteRow,
    TargetRow,
    build,
)
from certworker.core.patterns import check_regex
from certworker.core.snapshot import PathMatch, Snapshot, check_host, check_path, read_snapshot
from certworker.errors import InputError

DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


LISTENER, ROUTE, POOL, TARGET, POLICY = (uuid(number) for number in range(1, 6))


def gateway(
    listener: dict[str, Any] | None = None,
    route: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    more: GatewayRows | None = None,
) -> Built:
    """Build one listener, route, pool, target and policy, with the given columns changed."""
    more = more or GatewayRows()
    listener_row: dict[str, Any] = {"id": LISTENER, "name": None, "port": 80, "protocol": "http"}
    listener_row |= {"tls_policy_id": None, "enabled": True}
    route_row: dict[str, Any] = {"id": ROUTE, "listener_id": LISTENER, "type": "path", "match_expr": {}}
    route_row |= {"priority": 10, "upstream_pool_id": POOL, "enabled": True}
    pool_row: dict[str, Any] = {"id": POOL, "name": "web", "policy": "round_robin", "health_check": None}
    target_row: dict[str, Any] = {"id": TARGET, "pool_id": POOL, "address": "10.0.0.1:80", "weight": 1, "enabled": True}
    rows = GatewayRows(
        (ListenerRow(**{**listener_row, **(listener or {})}), *more.listeners),
        (RouteRow(**{**route_row, **(route or {})}), *more.routes),
        (PoolRow(**{**pool_row, **(pool or {})}), *more.pools),
        (TargetRow(**{**target_row, **(target or {})}), *more.targets),
        (PolicyRow(POLICY, "auto"), *more.policies),
    )
    return build(rows, DEFAULTS)


def test_sound_rows_make_a_snapshot() -> None:
    """Every row is there, and nothing is reported."""
    built = gateway(listener={"port": 443, "protocol": "https", "tls_policy_id": POLICY})

    assert built.faults == ()
    (listener,) = built.snapshot.listeners
    assert (listener.port, listener.tls_policy_id, listener.routes[0].pool_id) == (443, POLICY, POOL)
    assert [target.host for pool in built.snapshot.pools for target in pool.targets] == ["10.0.0.1"]
    assert [policy.id for policy in built.snapshot.policies] == [POLICY]


@pytest.mark.parametrize(
    ("table", "field", "change"),
    [
        ("listeners", "port", {"listener": {"port": 0}}),
        ("listeners", "port", {"listener": {"port": 65536}}),
        ("listeners", "port", {"listener": {"port": "80"}}),
        ("listeners", "port", {"listener": {"port": True}}),
        ("listeners", "protocol", {"listener": {"protocol": "tcp"}}),
        ("listeners", "tls_policy_id", {"listener": {"protocol": "https", "tls_policy_id": uuid(99)}}),
        ("listeners", "challenge", {"listener": {"challenge": "dns-01"}}),
        ("listeners", "challenge", {"listener": {"challenge": ""}}),
        ("listeners", "id", {"listener": {"id": "x\n"}, "route": {"listener_id": "x\n"}}),
        ("listeners", "routes", {"listener": {"protocol": "https"}, "route": {"type": "port"}}),
        ("routes", "type", {"route": {"type": "tcp"}}),
        ("routes", "priority", {"route": {"priority": 2**31}}),
        ("routes", "listener_id", {"route": {"listener_id": uuid(99)}}),
        ("routes", "upstream_pool_id", {"route": {"upstream_pool_id": uuid(99)}}),
        ("routes", "match_expr", {"route": {"match_expr": None}}),
        ("routes", "match_expr", {"route": {"match_expr": []}}),
        ("routes", "match_expr", {"route": {"type": "port", "match_expr": {"host": "a.test"}}}),
        ("routes", "match_expr.method", {"route": {"match_expr": {"method": "GET"}}}),
        ("routes", "match_expr.host", {"route": {"match_expr": {"host": ["a.test"]}}}),
        ("routes", "match_expr.path", {"route": {"match_expr": {"path": "/x"}}}),
        ("routes", "match_expr.path", {"route": {"match_expr": {"path": {}}}}),
        ("routes", "match_expr.path", {"route": {"match_expr": {"path": {"exact": "/", "prefix": "/"}}}}),
        ("routes", "match_expr.path.glob", {"route": {"match_expr": {"path": {"exact": "/", "glob": "/*"}}}}),
        ("upstream_pools", "policy", {"pool": {"policy": "random"}}),
        ("upstream_pools", "health_check", {"pool": {"health_check": "tcp"}}),
        ("upstream_pools", "health_check.kind", {"pool": {"health_check": {"kind": "http"}}}),
        ("upstream_pools", "health_check.type", {"pool": {"health_check": {"type": "http"}}}),
        ("upstream_pools", "health_check.path", {"pool": {"health_check": {"path": "/"}}}),
        ("upstream_pools", "health_check.interval_secs", {"pool": {"health_check": {"interval_secs": 0}}}),
        ("upstream_pools", "health_check.interval_secs", {"pool": {"health_check": {"interval_secs": 3601}}}),
        ("upstream_pools", "health_check.interval_secs", {"pool": {"health_check": {"interval_secs": 1.5}}}),
        ("upstream_pools", "health_check.timeout_ms", {"pool": {"health_check": {"timeout_ms": 0}}}),
        ("upstream_pools", "health_check", {"pool": {"health_check": {"interval_secs": 1, "timeout_ms": 1001}}}),
        ("upstream_targets", "address", {"target": {"address": "10.0.0.1"}}),
        ("upstream_targets", "address", {"target": {"address": "10.0.0.1:0"}}),
        ("upstream_targets", "address", {"target": {"address": "10.0.0.1:+1"}}),
        ("upstream_targets", "address", {"target": {"address": "169.254.169.254:80"}}),
        ("upstream_targets", "weight", {"target": {"weight": 257}}),
        ("upstream_targets", "weight", {"target": {"weight": -1}}),
        ("upstream_targets", "pool_id", {"target": {"pool_id": uuid(99)}}),
    ],
)
def test_a_fault_names_table_and_field(table: str, field: str, change: dict[str, Any]) -> None:
    """The row that breaks a rule is the first one reported, and is not in the snapshot."""
    built = gateway(**change)
    places = [(fault.table, fault.field) for fault in built.faults]
    snapshot = built.snapshot

    assert (table, field) in places
    left = {
        "listeners": [row.id for row in snapshot.listeners],
        "routes": [route.id for row in snapshot.listeners for route in row.routes],
        "upstream_pools": [pool.id for pool in snapshot.pools],
        "upstream_targets": [target.id for pool in snapshot.pools for target in pool.targets],
    }
    assert left[table] == []
    assert "\n" not in "".join(map(str, built.faults))


def test_a_missing_pool_takes_its_routes_along() -> None:
    """The route is reported besides the pool, and the listener stays."""
    built = gateway(pool={"policy": "random"})

    assert {fault.table for fault in built.faults} == {"upstream_pools", "routes"}
    assert [listener.routes for listener in built.snapshot.listeners] == [()]


def test_two_listeners_never_share_a_port() -> None:
    """Neither is taken: which one was meant is not ours to say."""
    other = ListenerRow(uuid(9), None, 80, "https", None, True)
    built = gateway(more=GatewayRows(listeners=(other,)))

    assert [fault.field for fault in built.faults if fault.table == "listeners"] == ["port", "port"]
    assert built.snapshot.listeners == ()


def test_a_listener_that_cannot_be_served_takes_no_port() -> None:
    """The sound one on that port stays."""
    other = ListenerRow(uuid(9), None, 80, "https", uuid(99), True)
    built = gateway(more=GatewayRows(listeners=(other,)))

    assert [(fault.row_id, fault.field) for fault in built.faults] == [(uuid(9), "tls_policy_id")]
    assert [listener.id for listener in built.snapshot.listeners] == [LISTENER]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8400", "localhost:8400", "[::ffff:127.0.0.1]:8400", "127.9.9.9:8401", "[::1]:8401", "10.0.0.9:8402",
     "WORKER.internal:8402"],
)  # fmt: skip
def test_certworker_s_own_addresses_are_no_upstreams(address: str) -> None:
    """However they are written; an API that listens everywhere is behind every loopback address."""
    own = ("127.0.0.1:8400", "0.0.0.0:8401", "10.0.0.9:8402", "worker.internal:8402")
    rows = GatewayRows(
        pools=(PoolRow(POOL, "web", "round_robin", None),), targets=(TargetRow(TARGET, POOL, address, 1, True),)
    )
    (fault,) = build(rows, replace(DEFAULTS, reserved=own)).faults

    assert (fault.table, fault.row_id, fault.field) == ("upstream_targets", TARGET, "address")
    assert "certworker's own" in fault.rule
    assert build(rows, DEFAULTS).faults == ()


def test_a_name_that_does_not_resolve_is_no_fault() -> None:
    """Nothing is resolved here: one dead name would keep everybody's changes from being published."""
    built = gateway(target={"address": "gone.invalid:80"})

    assert built.faults == ()
    assert built.snapshot.pools[0].targets[0].host == "gone.invalid"


def test_a_port_route_is_alone() -> None:
    """A second enabled route makes the listener faulty, a disabled one does not."""
    second = RouteRow(uuid(9), LISTENER, "path", {}, 1, POOL, True)
    off = RouteRow(uuid(9), LISTENER, "path", {}, 1, POOL, False)

    assert gateway(route={"type": "port"}, more=GatewayRows(routes=(second,))).faults[0].table == "listeners"
    assert gateway(route={"type": "port"}, more=GatewayRows(routes=(off,))).faults == ()


@pytest.mark.parametrize("change", [{"listener": {"enabled": False}}, {"route": {"enabled": False}}])
def test_disabled_rows_are_left_out_silently(change: dict[str, Any]) -> None:
    """Whatever is wrong with a row that is off does not matter."""
    built = gateway(**change)

    assert built.faults == ()
    assert [route for listener in built.snapshot.listeners for route in listener.routes] == []


def test_a_policy_on_http_is_ignored() -> None:
    """Even one that does not exist."""
    built = gateway(listener={"tls_policy_id": uuid(99)})

    assert built.faults == ()
    assert built.snapshot.listeners[0].tls_policy_id is None


def test_a_listener_answers_challenges_one_of_two_ways() -> None:
    """NULL is `forward`, which the document leaves out: a version from before the choice keeps its digest."""
    unset, forward, stateless = (
        gateway(listener={"challenge": value}).snapshot for value in (None, "forward", "stateless")
    )

    assert [snapshot.listeners[0].challenge for snapshot in (unset, forward, stateless)] == [
        "forward", "forward", "stateless",
    ]  # fmt: skip
    assert unset.digest() == forward.digest() != stateless.digest()
    assert "challenge" not in json.dumps(unset.document())
    assert read_snapshot(stateless.document()) == stateless


def test_only_named_policies_are_in_the_snapshot() -> None:
    """There may be a million others."""
    assert gateway().snapshot.policies == ()


@pytest.mark.parametrize(
    ("expr", "interval", "timeout"),
    [
        ({}, 10, 2),
        ({"kind": "tcp"}, 10, 2),
        ({"type": "tcp", "timeout_ms": None}, 10, 2),
        ({"interval_secs": 1}, 1, 1),
        ({"interval_secs": 30, "timeout_ms": 500}, 30, 0.5),
    ],
)
def test_defaults_fill_a_health_check(expr: object, interval: float, timeout: float) -> None:
    """A default time limit gives way to a shorter interval."""
    check = gateway(pool={"health_check": expr}).snapshot.pools[0].check

    assert check is not None
    assert (check.interval.total_seconds(), check.timeout.total_seconds()) == (interval, timeout)


def test_routes_go_by_priority_then_id() -> None:
    """The order of the rows does not matter, not even to the digest."""
    rows = [RouteRow(uuid(10 + n), LISTENER, "path", {}, priority, POOL, True) for n, priority in enumerate((5, 20, 5))]
    one = gateway(more=GatewayRows(routes=tuple(rows))).snapshot
    random.Random(1).shuffle(rows)
    other = gateway(more=GatewayRows(routes=tuple(rows))).snapshot

    assert [route.id for route in one.listeners[0].routes] == [uuid(10), uuid(12), ROUTE, uuid(11)]
    assert one.digest() == other.digest()


def test_a_wrong_address_of_our_own_is_the_settings_fault() -> None:
    """It is no row's fault either."""
    with pytest.raises(InputError, match="reserved addresses"):
        build(GatewayRows(), replace(DEFAULTS, reserved=("nowhere",)))


@pytest.mark.parametrize("addresses", [("nowhere",), ("0.0.0.0:80",), ("a.test:0",)])
def test_a_wrong_responder_is_the_settings_fault(addresses: tuple[str, ...]) -> None:
    """It is no row's fault."""
    with pytest.raises(InputError, match="responder"):
        build(GatewayRows(), Defaults(timedelta(seconds=10), timedelta(seconds=2), addresses))


@pytest.mark.parametrize("value", ["a.test", "*.a.test", "xn--bcher-kva.example", "localhost", "a" * 63 + ".test"])
def test_hosts_that_are_taken(value: str) -> None:
    assert check_host(value) == value


@pytest.mark.parametrize(
    "value",
    ["", ".", "a..b", "a.test.", "*", "*.", "*.*.a.test", "a.*.test", "-a.test", "a-.test", "a_b.test",
     "bücher.example",      "a.test\n",
     "a.test x", "a.test;", "[::1]", "a:80", "a" * 64 + ".test", "a." * 130 + "test", "*.a.test'", "\u212a.test"],
)  # fmt: skip
def test_hosts_that_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="host"):
        check_host(value)


@pytest.mark.parametrize(
    "value", ["/", "/a", "/a/", "/a'b", "/a-b_c.d~e", "/$HOME", "/-f", "/{", "/..a", "/" + "\\" * 511]
)
def test_paths_that_are_taken(value: str) -> None:
    assert check_path(value) == value


@pytest.mark.parametrize(
    "value",
    ["", "a", "/a b", "/a\n", "/a\x00", "/é", "//", "/a//b", "/..", "/a/../b", "/.", "/a/./b", "/%41", "/a?b", "/a#b",
     "/" + "a" * 1024, "/" + "\\" * 512],
)  # fmt: skip
def test_paths_that_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(value)


@pytest.mark.parametrize(
    "value",
    [
        r"/v[0-9]+/items",
        r"/(?:a|b)/c",
        r"/(a|b)?",
        r"/\d{2,4}\.html",
        r"/[^/]+",
        r"/.*",
        r"/.*?x",
        r"/(?:abc)+",
        r"/[]a]",
        r"^/x$",
    ],
)
def test_regexes_that_are_taken(value: str) -> None:
    assert PathMatch(regex=value).regex == value


@pytest.mark.parametrize(
    "value",
    ["", "(", ")", "[", "*", "a**", "a+*", r"(a)\1", "(?i)a", "(?=a)", "(?!a)", "(?<=a)b", "(?P<n>a)", "(?#x)", "(?>a)",
     "(a+)+", "(?:a*)*", "((a+))*", "(a|b)*", "(a?)*", "(a?b?)+", "(?:a{2})+", "(abc){9}", "(*UTF)a", r"\Qa\E", r"\bx",
     r"\pL", r"\x41", "[[:alpha:]]", "[a--b]", "a{,3}", "a{", "a++", "a\n", "é", "a" * 257, "x\\", "$" * 65],
)  # fmt: skip
def test_regexes_that_are_refused(value: str) -> None:
    """What proxies read differently, or match in exponential time."""
    with pytest.raises(ValidationError):
        PathMatch(regex=value)


@given(st.text(alphabet="ab(|)?:*+[]{}^$.-\\d1,=!<P/", max_size=20))
def test_a_taken_regex_compiles(value: str) -> None:
    """Taking one never ends in anything but an answer or a ValueError."""
    try:
        check_regex(value)
    except ValueError:
        return


HOSTILE = [
    "\n", "\r\n", "\0", "a\nb", "'", '"', "\\", "$HOME", "%[env(HOME)]", "#", ";", "}", "a } or { always_true",
    "-f /etc/passwd", "-i", "--", "/a /admin", "/a\n    use_backend x", "unix@/run/x.sock", "abns@x", "127.0.0.1:+1",
    "127.0.0.1:80 disabled", "127.0.0.1:80\n", "unix:/run/x.sock", "2130706433:80", "127.1:80", "169.254.169.254:80",
    "[::]:80", "[fe80::1%eth0]:80", "0.0.0.0:80", "default", "include", "~a", "*", "*.", "a.test; } server {", "\u202e",
    "\u212a.test", "\ud800", "TRUE", "P_1", "http\n", "x" * 5000, "127.0.0.1:8400", "[::ffff:127.0.0.1]:8402",
]  # fmt: skip
texts = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(HOSTILE)
numbers = st.integers() | st.floats()
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
matches = st.fixed_dictionaries(
    {},
    optional={
        "host": texts,
        "path": st.dictionaries(
            st.sampled_from(["exact", "prefix", "regex"]), texts | texts.map("/".__add__), max_size=2
        ),
    },
)
columns: st.SearchStrategy[Any] = st.none() | st.booleans() | numbers | texts | st.binary(max_size=3) | json_values
columns |= st.sampled_from(["http", "https", "path", "ws", "port", LISTENER, POOL, 80, "10.0.0.1:80"])


def some_of(names: str, **sound: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these columns, with anything in it, or with what comes close."""
    return st.fixed_dictionaries({}, optional={name: sound.get(name, st.nothing()) | columns for name in names.split()})


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text makes the table of all characters
@given(
    listener=some_of("id port protocol tls_policy_id enabled challenge"),
    route=some_of("id listener_id match_expr type priority upstream_pool_id", match_expr=matches),
    pool=some_of("id name policy health_check"),
    target=some_of("id pool_id address weight", address=texts.map("{}:80".format)),
)
def test_whatever_the_rows_hold_nothing_breaks_out(**change: Any) -> None:
    """There is an answer, it survives the way through JSON, and no proxy misreads a text in it."""
    built = gateway(**change)

    assert read_snapshot(json.loads(built.snapshot.canonical())) == built.snapshot
    assert all(str(fault).isprintable() for fault in built.faults)
    for place, value in leaves(built.snapshot.document()):
        assert isinstance(value, int) or re.fullmatch(FORMS.get(place, r"[a-z_0-9-]{1,36}"), value), (place, value)


FORMS = {
    "match.host": r"(\*\.)?[a-z0-9.-]{1,253}",
    "match.path.exact": r"/[!-~]{0,1023}",
    "match.path.prefix": r"/[!-~]{0,1023}",
    "match.path.regex": r"[ -~]{1,256}",
    "host": r"[0-9a-z.:-]{1,253}",
    "check.interval": r"P[0-9TDHMS.]+",
    "check.timeout": r"P[0-9TDHMS.]+",
}
"""What a text may be made of, by its place; all others are ids and words."""


def leaves(value: object, place: str = "") -> Iterator[tuple[str, Any]]:
    """Give every value in a document, with the place in its row."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}.{key}" if place in ("match", "match.path", "check") else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield place, value


@pytest.mark.parametrize("change", [{"listener": {"port": 10**5000}}, {"route": {"match_expr": {"x": 10**5000}}}])
def test_a_number_that_python_does_not_write_is_a_fault(change: dict[str, Any]) -> None:
    """JSON has no limit, `repr` has one."""
    built = gateway(**change)

    assert all(str(fault).isprintable() and len(str(fault)) < 200 for fault in built.faults)
    assert built.faults


@given(st.lists(st.sampled_from(["listeners", "routes", "pools", "targets"]), min_size=1, max_size=3))
def test_an_id_that_is_there_twice_is_a_fault(tables: list[str]) -> None:
    """Another program's rows may be of no database: both go, and nothing is raised."""
    rows = GatewayRows(
        (ListenerRow(LISTENER, None, 80, "http", None, True),),
        (RouteRow(ROUTE, LISTENER, "path", {}, 1, POOL, True),),
        (PoolRow(POOL, "web", "round_robin", None),),
        (TargetRow(TARGET, POOL, "10.0.0.1:80", 1, True),),
    )
    built = build(replace(rows, **{table: getattr(rows, table) * 2 for table in tables}), DEFAULTS)

    named = {"pools": "upstream_pools", "targets": "upstream_targets"}
    assert {(named.get(table, table), "id") for table in tables} <= {(x.table, x.field) for x in built.faults}


def test_a_snapshot_is_checked_when_it_is_read() -> None:
    """A document from elsewhere gets the same rules, and the answer names the place."""
    document = gateway().snapshot.document()
    document["listeners"][0]["port"] = 0  # type: ignore[index]
    with pytest.raises(InputError, match=r"listeners\.0\.port"):
        read_snapshot(document)


@pytest.mark.parametrize("document", [{"schema_version": 2}, {"keys": []}, [], None, "x"])
def test_what_is_no_snapshot_is_refused(document: object) -> None:
    """A form that this release does not know is not guessed at."""
    with pytest.raises(InputError):
        read_snapshot(document)


@pytest.mark.parametrize("change", ["pools", "policies"])
def test_a_snapshot_is_consistent(change: str) -> None:
    """Nothing in it names what is not there."""
    built = gateway(listener={"port": 443, "protocol": "https", "tls_policy_id": POLICY})
    with pytest.raises(ValidationError):
        Snapshot.model_validate({**dict(built.snapshot), change: ()})


@pytest.mark.parametrize(
    ("address", "parts"), [("a:1", ("a", 1)), ("[::1]:80", ("::1", 80)), ("10.0.0.1:65535", ("10.0.0.1", 65535))]
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    """Host and port are apart in the snapshot, so that nobody splits them again."""
    (target,) = gateway(target={"address": address}).snapshot.pools[0].targets

    assert (target.host, target.port) == parts


@pytest.mark.parametrize(("port", "warned"), [(80, True), (8080, False)])
def test_a_port_route_on_port_80_is_warned_about(port: int, warned: bool) -> None:
    """It is allowed, and swallows every HTTP-01 challenge."""
    built = gateway(listener={"port": port}, route={"type": "port"})

    assert built.faults == ()
    assert bool(built.warnings) is warned
    assert gateway(listener={"port": port}).warnings == ()
