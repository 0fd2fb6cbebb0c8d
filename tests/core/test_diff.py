"""What changed between two snapshots: every difference, and nothing else."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.diff import Change, compare
from certworker.core.gateway import Defaults, GatewayRows, ListenerRow, PolicyRow, PoolRow, RouteRow, TargetRow, build
from certworker.core.snapshot import Snapshot

DEFAULTS = Defaults(timedelta(seconds=10), timedelta(seconds=2), ("127.0.0.1:8402",))


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


HTTP, HTTPS, ROUTE, WEB, API, TARGET, POLICY = (uuid(number) for number in range(1, 8))
ROWS = GatewayRows(
    (ListenerRow(HTTP, "http", 80, "http", None, True), ListenerRow(HTTPS, "https", 443, "https", POLICY, True)),
    (RouteRow(ROUTE, HTTPS, "path", {"host": "a.test", "path": {"prefix": "/a"}}, 10, WEB, True),),
    (PoolRow(WEB, "web", "round_robin", {"kind": "tcp"}), PoolRow(API, "api", "weighted", None)),
    (TargetRow(TARGET, WEB, "[2001:db8::1]:80", 1, True),),
    (PolicyRow(POLICY, "auto"),),
)


def snapshot(rows: GatewayRows = ROWS, defaults: Defaults = DEFAULTS) -> Snapshot:
    built = build(rows, defaults)
    assert built.faults == ()
    return built.snapshot


def changed(table: str, row_id: str, **fields: tuple[object, object]) -> Change:
    return Change(table, row_id, "changed", {name.replace("__", "."): pair for name, pair in fields.items()})  # type: ignore[misc]


def with_route(**columns: object) -> GatewayRows:
    return replace(ROWS, routes=(replace(ROWS.routes[0], **columns),))


def with_pool(**columns: object) -> GatewayRows:
    return replace(ROWS, pools=(replace(ROWS.pools[0], **columns), ROWS.pools[1]))


def with_target(**columns: object) -> GatewayRows:
    return replace(ROWS, targets=(replace(ROWS.targets[0], **columns),))


def with_listener(**columns: object) -> GatewayRows:
    return replace(ROWS, listeners=(ROWS.listeners[0], replace(ROWS.listeners[1], **columns)))


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (with_listener(port=8443), changed("listeners", HTTPS, port=(443, 8443))),
        (with_listener(challenge="stateless"), changed("listeners", HTTPS, challenge=("forward", "stateless"))),
        (with_route(priority=5), changed("routes", ROUTE, priority=(10, 5))),
        (with_route(type="ws"), changed("routes", ROUTE, type=("path", "ws"))),
        (with_route(listener_id=HTTP), changed("routes", ROUTE, listener_id=(HTTPS, HTTP))),
        (with_route(upstream_pool_id=API), changed("routes", ROUTE, upstream_pool_id=(WEB, API))),
        (
            with_route(match_expr={"path": {"exact": "/a"}}),
            changed(
                "routes", ROUTE, match_expr__host=("a.test", None), match_expr__path__prefix=("/a", None),
                match_expr__path__exact=(None, "/a"),
            ),
        ),
        (with_pool(policy="least_conn"), changed("upstream_pools", WEB, policy=("round_robin", "least_conn"))),
        (
            with_pool(health_check=None),
            changed(
                "upstream_pools", WEB, health_check__interval_secs=(10, None), health_check__timeout_ms=(2000, None),
            ),
        ),
        (with_target(weight=0), changed("upstream_targets", TARGET, weight=(1, 0))),
        (with_target(pool_id=API), changed("upstream_targets", TARGET, pool_id=(WEB, API))),
        (
            with_target(address="a.test:81"),
            changed("upstream_targets", TARGET, address=("[2001:db8::1]:80", "a.test:81")),
        ),
        (
            replace(ROWS, policies=(PolicyRow(POLICY, "manual"),)),
            changed("tls_policies", POLICY, mode=("auto", "manual")),
        ),
    ],
)  # fmt: skip
def test_a_changed_value(rows: GatewayRows, change: Change) -> None:
    """One row, its field, from what to what; the other way round it is the other way round."""
    (back,) = compare(snapshot(rows), snapshot())

    assert compare(snapshot(), snapshot(rows)) == (change,)
    assert back.fields == {name: (after, before) for name, (before, after) in change.fields.items()}


def test_what_is_there_on_one_side_only() -> None:
    """With all that it has: nothing else says what came or went."""
    without = replace(ROWS, targets=())

    (added,) = compare(snapshot(without), snapshot())
    assert added.document() == {
        "table": "upstream_targets", "id": TARGET, "change": "added",
        "fields": {
            "pool_id": {"from": None, "to": WEB},
            "address": {"from": None, "to": "[2001:db8::1]:80"},
            "weight": {"from": None, "to": 1},
        },
    }  # fmt: skip
    (removed,) = compare(snapshot(), snapshot(without))
    assert (removed.kind, removed.fields["weight"]) == ("removed", (1, None))


def test_against_nothing_everything_is_new() -> None:
    """In the order of the tables."""
    everything = compare(None, snapshot())

    assert [(change.table, change.kind) for change in everything] == [
        ("listeners", "added"), ("listeners", "added"), ("routes", "added"), ("upstream_pools", "added"),
        ("upstream_pools", "added"), ("upstream_targets", "added"), ("tls_policies", "added"), ("responders", "added"),
    ]  # fmt: skip
    assert [change.kind for change in compare(snapshot(), None)] == ["removed"] * 8
    assert compare(None, None) == ()


def test_a_responder_is_its_address() -> None:
    """One that moved is another one."""
    moved = snapshot(defaults=replace(DEFAULTS, responders=("10.0.0.1:8402",)))

    assert [(change.kind, change.row_id) for change in compare(snapshot(), moved)] == [
        ("added", "10.0.0.1:8402"), ("removed", "127.0.0.1:8402"),
    ]  # fmt: skip


weights = st.lists(st.integers(0, 256), max_size=4)


@given(weights, weights)
def test_there_is_a_difference_exactly_if_the_digests_differ(old: list[int], new: list[int]) -> None:
    """A version that is published changes something, and what changes is listed."""
    before, after = (
        snapshot(
            replace(ROWS, targets=tuple(TargetRow(uuid(100 + n), WEB, "a.test:80", w, True) for n, w in enumerate(x)))
        )
        for x in (old, new)
    )

    assert bool(compare(before, after)) is (before.digest() != after.digest())
