"""Ids of rows."""

import uuid

from hypothesis import given
from hypothesis import strategies as st

from certworker.store import rows


def test_an_id_is_a_uuid_of_version_7() -> None:
    """In the form that the database checks, and never twice."""
    made = [rows.new_id() for _ in range(1000)]
    read = [uuid.UUID(one) for one in made]

    assert len(set(made)) == 1000
    assert [str(one) for one in read] == made
    assert {(one.version, one.variant) for one in read} == {(7, uuid.RFC_4122)}


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_ids_are_in_the_order_of_their_making(one: int, other: int, noise: bytes) -> None:
    """As texts and as UUIDs, to the millisecond, whatever is random of them."""
    first, second = sorted((one, other))

    assert uuid.UUID(rows.id_of(first, b"\xff" * 10)).int >> 80 == first
    if first < second:
        assert rows.id_of(first, b"\xff" * 10) < rows.id_of(second, noise)
