"""From what a person writes to complete rows; every fault names table, row, field, value and rule."""

import datetime as dt
import re
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.core.document import Tables, complete
from certworker.errors import InputError


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def new_ids() -> Callable[[], str]:
    numbers = count(1)
    return lambda: uuid(next(numbers))


def read(document: dict[Any, Any], held: Tables | None = None, *, private_ca: bool = True) -> Tables:
    return complete(document, held or {}, new_ids(), private_ca=private_ca)


POOL = {"name": "web"}
LISTENER = {"name": "front", "port": 443, "protocol": "https"}
TARGET = {"pool_id": "web", "address": "10.0.0.5:8080"}
ROUTE = {"listener_id": "front", "upstream_pool_id": "web", "match_expr": {"path": {"prefix": "/"}}}
POLICY = {"domains": ["Shop.Example.com"]}
WHOLE: dict[str, Any] = {
    "upstream_pools": [POOL],
    "upstream_targets": [TARGET],
    "tls_policies": [POLICY],
    "listeners": [LISTENER],
    "routes": [ROUTE],
}


def test_what_is_left_out_is_filled_in() -> None:
    """Every column, a new id each, names of other rows as their ids, DNS names as A-labels."""
    rows = read(WHOLE)

    assert rows["upstream_pools"] == [{"id": uuid(1), "name": "web", "policy": "round_robin", "health_check": None}]
    assert rows["upstream_targets"] == [
        {"id": uuid(2), "pool_id": uuid(1), "address": "10.0.0.5:8080", "weight": 1, "enabled": True}
    ]
    assert rows["tls_policies"] == [{"id": uuid(3), "mode": "auto", "domains": ["shop.example.com"], "shared": False}]
    assert rows["listeners"] == [
        {
            "id": uuid(4),
            "name": "front",
            "port": 443,
            "protocol": "https",
            "tls_policy_id": None,
            "enabled": True,
            "challenge": None,
        }
    ]
    assert rows["routes"] == [
        {"id": uuid(5), "listener_id": uuid(4), "type": "path", "match_expr": {"path": {"prefix": "/"}},
         "priority": 100, "upstream_pool_id": uuid(1), "enabled": True}
    ]  # fmt: skip


def test_order_in_the_document_does_not_matter() -> None:
    """A route may stand before the listener that it names."""
    assert read(dict(reversed(WHOLE.items()))) == read(WHOLE)


def test_applying_again_means_the_same_rows() -> None:
    """Rows without ids keep those of the rows they mean, whatever else changed in them."""
    held = read(WHOLE)
    ids = {table: [row["id"] for row in rows] for table, rows in held.items()}
    changed = {
        "upstream_pools": [{**POOL, "policy": "least_conn"}],
        "upstream_targets": [{**TARGET, "weight": 7}],
        "tls_policies": [{**POLICY, "shared": True}],
        "listeners": [{**LISTENER, "name": "other", "enabled": False}],
        "routes": [{**ROUTE, "listener_id": "other", "enabled": False}],
    }

    assert read(WHOLE, held) == held
    assert {table: [row["id"] for row in rows] for table, rows in read(changed, held).items()} == ids
    assert read({table: list(rows) for table, rows in held.items()}, {}) == held


def test_a_table_that_is_not_named_is_left_alone() -> None:
    """Its rows can still be named by others, by name or by id."""
    held = read(WHOLE)
    for pool in ("web", uuid(1)):
        rows = read({"upstream_targets": [{**TARGET, "pool_id": pool}]}, held)
        assert rows == {"upstream_targets": held["upstream_targets"]}


def test_a_reference_means_the_document_before_the_database() -> None:
    """A pool that the document replaces is not found by its old name."""
    held = read(WHOLE)
    with pytest.raises(InputError, match="upstream_targets 1: pool_id 'web': must name one of upstream_pools"):
        read({"upstream_pools": [{"name": "new"}], "upstream_targets": [TARGET]}, held)


def test_what_is_still_named_cannot_be_left_out() -> None:
    """Both tables are named, or the one that is named keeps what the other refers to."""
    held = read(WHOLE)
    with pytest.raises(InputError, match=rf"upstream_pools: {uuid(1)} is left out, but upstream_targets {uuid(2)}"):
        read({"upstream_pools": []}, held)
    with pytest.raises(InputError, match=rf"listeners: {uuid(4)} is left out, but routes {uuid(5)} still names it"):
        read({"listeners": []}, held)

    assert read({"listeners": [], "routes": []}, held) == {"listeners": [], "routes": []}


def test_rows_with_ids_may_look_the_same_where_the_database_allows_it() -> None:
    """Two targets with one address are what another program may have written; an export must be applicable."""
    rows = read({"upstream_pools": [POOL], "upstream_targets": [{**TARGET, "id": uuid(8)}, {**TARGET, "id": uuid(9)}]})

    assert [row["id"] for row in rows["upstream_targets"]] == [uuid(8), uuid(9)]


def doc(**tables: Any) -> dict[Any, Any]:
    return tables


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (doc(users=[]), "users: there is no such table; known are upstream_pools, "),
        ({5: []}, "'5': there is no such table"),
        ({"a\nb": []}, r"'a\nb': there is no such table"),
        (doc(routes={}), "routes: must be an array of tables"),
        (doc(routes=[1]), "routes 1: must be a table of columns"),
        (doc(listeners=[LISTENER, {"port": 80}]), "listeners 2: protocol: is missing"),
        (doc(listeners=[{**LISTENER, "host": "x"}]), "listeners 1: host: there is no such column; known are id, name,"),
        (doc(listeners=[{**LISTENER, 5: "x"}]), "listeners 1: '5': there is no such column"),
        (doc(listeners=[{**LISTENER, "port": "80\n"}]), r"listeners 1: port '80\n': must be a whole number"),
        (doc(listeners=[{**LISTENER, "port": True}]), "listeners 1: port True: must be a whole number"),
        (doc(listeners=[{**LISTENER, "port": 443.0}]), "listeners 1: port 443.0: must be a whole number"),
        (doc(listeners=[{**LISTENER, "port": 2**40}]), "listeners 1: port 1099511627776: is too large"),
        (doc(listeners=[{**LISTENER, "protocol": "ftp"}]), "listeners 1: protocol 'ftp': must be one of http, https"),
        (doc(listeners=[{**LISTENER, "challenge": "dns"}]), "challenge 'dns': must be one of forward, stateless"),
        (doc(listeners=[{**LISTENER, "protocol": ["http"]}]), "listeners 1: protocol ['http']: must be text"),
        (doc(listeners=[{**LISTENER, "name": 5}]), "listeners 1: name 5: must be text or nothing"),
        (doc(listeners=[{**LISTENER, "enabled": 1}]), "listeners 1: enabled 1: must be true or false"),
        (doc(listeners=[{**LISTENER, "name": "a\0"}]), r"listeners 1: name 'a\x00': holds a character"),
        (doc(listeners=[{**LISTENER, "name": "\ud800"}]), r"listeners 1: name '\ud800': holds a character"),
        (doc(listeners=[{**LISTENER, "id": "7"}]), "listeners 1: id '7': must be a UUID in lower case with dashes"),
        (doc(listeners=[{**LISTENER, "tls_policy_id": "a"}]), "listeners 1: tls_policy_id 'a': must be a UUID"),
        (doc(listeners=[{**LISTENER, "id": uuid(1).replace("-", "")}]), "must be a UUID in lower case with dashes"),
        (doc(listeners=[LISTENER, {**LISTENER, "name": "b"}]), "listeners 2: is the same row as listeners 1"),
        (
            doc(listeners=[{**LISTENER, "id": uuid(1)}, {**LISTENER, "id": uuid(2)}]),
            "listeners 2: is the same row as listeners 1",
        ),
        (doc(upstream_pools=[POOL, {"name": "b"}, POOL]), "upstream_pools 3: is the same row as upstream_pools 1"),
        (doc(upstream_pools=[POOL], upstream_targets=[TARGET, TARGET]), "upstream_targets 2: is the same row as"),
        (
            doc(upstream_pools=[{"id": uuid(1), "name": "a"}, {"id": uuid(1), "name": "b"}]),
            "upstream_pools 2: is the same row as upstream_pools 1",
        ),
        (doc(upstream_pools=[{**POOL, "policy": "random"}]), "upstream_pools 1: policy 'random': must be one of round"),
        (doc(upstream_pools=[{**POOL, "health_check": "tcp"}]), "health_check 'tcp': must be a table"),
        (doc(upstream_pools=[{**POOL, "health_check": {1: 2}}]), "health_check {1: 2}: key 1 must be text"),
        (doc(upstream_pools=[{**POOL, "health_check": {"a": float("nan")}}]), "nan is no number that JSON knows"),
        (doc(upstream_pools=[{**POOL, "health_check": {"a": [float("inf")]}}]), "inf is no number that JSON knows"),
        (
            doc(upstream_pools=[{**POOL, "health_check": {"a": dt.date(2026, 1, 1)}}]),
            "datetime.date(2026, 1, 1) is nothing that JSON knows",
        ),
        (doc(upstream_pools=[{**POOL, "health_check": {"a": "\0"}}]), "holds a character that no database stores"),
        (doc(upstream_targets=[TARGET]), "upstream_targets 1: pool_id 'web': must name one of upstream_pools; there"),
        (doc(upstream_pools=[POOL], routes=[ROUTE]), "routes 1: listener_id 'front': must name one of listeners"),
        (
            doc(upstream_pools=[POOL], listeners=[LISTENER, {**LISTENER, "port": 8443}], routes=[ROUTE]),
            "routes 1: listener_id 'front': must name one of listeners; 2 have this name, give an id",
        ),
        (doc(tls_policies=[{"domains": ["good.com", "a..b"]}]), "tls_policies 1: domains: name 'a..b': has an empty"),
        (doc(tls_policies=[{"domains": []}]), "tls_policies 1: domains: names: at least one is needed"),
        (doc(tls_policies=[{"domains": [5]}]), "tls_policies 1: domains: name '5': is not text"),
        (doc(tls_policies=[{"domains": [{}]}]), "tls_policies 1: domains: name '{}': is not text"),
        (doc(tls_policies=[{"domains": "a.com"}]), "tls_policies 1: domains 'a.com': must be an array"),
        (doc(tls_policies=[{"domains": ["*.a.com"]}]), "wildcard cannot be validated by HTTP-01"),
        (doc(tls_policies=[{"domains": ["a.com"], "mode": "off"}]), "mode 'off': must be one of auto, manual"),
        (
            doc(tls_policies=[{"domains": [f"n{n}.a.com" for n in range(101)], "shared": True}]),
            "tls_policies 1: domains: names: 101 in one shared certificate",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named(document: dict[Any, Any], fault: str) -> None:
    """One printable line: table, row from 1, field, value, rule."""
    with pytest.raises(InputError, match=re.escape(fault)) as refused:
        read(document)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


def test_a_long_value_is_cut() -> None:
    """A message stays readable whatever was written."""
    with pytest.raises(InputError) as refused:
        read(doc(upstream_pools=[{**POOL, "policy": "x" * 100_000}]))
    assert len(str(refused.value)) < 300


def test_a_deep_value_is_refused() -> None:
    """No document ends in a RecursionError."""
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    with pytest.raises(InputError, match="nested more than 10 levels deep"):
        read(doc(upstream_pools=[{**POOL, "health_check": deep}]))


@pytest.mark.parametrize(("names", "private_ca"), [(["app.test"], True), (["*.example.com"], True)])
def test_a_manual_policy_takes_any_name(names: list[str], private_ca: bool) -> None:
    """Its certificates are uploaded, so no CA of ours has to like them."""
    rows = read(doc(tls_policies=[{"domains": names, "mode": "manual"}]), private_ca=False)

    assert rows["tls_policies"][0]["domains"] == names
    with pytest.raises(InputError, match="tls_policies 1"):
        read(doc(tls_policies=[{"domains": names}]), private_ca=False)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)
columns = st.sampled_from(
    ["id", "name", "port", "protocol", "domains", "mode", "shared", "policy", "health_check", "pool_id", "address",
     "listener_id", "match_expr", "priority", "type", "upstream_pool_id", "enabled", "weight"]
)  # fmt: skip
documents = st.dictionaries(st.sampled_from(list(WHOLE)) | scalars, anything | st.lists(
    st.dictionaries(columns, anything, max_size=4), max_size=3), max_size=4)  # fmt: skip
mutations = st.tuples(st.sampled_from(list(WHOLE)), columns, anything)


@given(documents)
def test_any_document_is_read_or_refused(document: dict[Any, Any]) -> None:
    """InputError, one printable line, is all that is raised."""
    _read_or_refuse(document)


@given(mutations)
def test_any_value_is_read_or_refused(mutation: tuple[str, str, object]) -> None:
    """The same for a good document with one strange value."""
    table, column, value = mutation
    _read_or_refuse({**WHOLE, table: [{**WHOLE[table][0], column: value}]})


def _read_or_refuse(document: dict[Any, Any]) -> None:
    said = ""
    try:
        rows = read(document)
    except InputError as refused:
        said = str(refused)
    else:
        assert read({name: list(table) for name, table in rows.items()}, rows) == rows
    assert said.isprintable()
