"""Laws of who answers a name."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from certworker.core.rollout import assign_names, choose_served

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Leaf:
    id: str
    policy_ids: frozenset[str]
    dns_names: tuple[str, ...]
    expires_at: datetime
    wanted: bool = True


names = st.sampled_from(["a.test", "b.test", "*.a.test", "c.test"])
leaves = st.lists(
    st.builds(
        Leaf,
        id=st.uuids().map(str),
        policy_ids=st.frozensets(st.sampled_from(["p", "q"])),
        dns_names=st.lists(names, unique=True, max_size=4).map(tuple),
        expires_at=st.integers(0, 3).map(lambda days: NOW + timedelta(days=days)),
        wanted=st.booleans(),
    ),
    unique_by=lambda leaf: leaf.id,
    max_size=6,
)


@given(leaves)
def test_a_wanted_one_with_the_later_expiry_answers(certificates: list[Leaf]) -> None:
    """Each name has one certificate: a wanted one if there is any, the latest to expire, the smallest id."""
    chosen = choose_served(certificates)

    assert chosen.keys() == {name for leaf in certificates for name in leaf.dns_names}
    for name, leaf in chosen.items():
        rivals = [one for one in certificates if name in one.dns_names]
        assert leaf == min(rivals, key=lambda one: (not one.wanted, -one.expires_at.timestamp(), one.id))


@given(leaves, st.randoms(use_true_random=False), st.sampled_from([None, "p", "q"]))
def test_the_order_of_certificates_does_not_matter(
    certificates: list[Leaf], chance: object, policy: str | None
) -> None:
    """Two nodes that were told the same things in another order serve the same."""
    shuffled = list(certificates)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]

    assert assign_names(shuffled, policy) == assign_names(certificates, policy)


@given(leaves, st.sampled_from([None, "p", "q"]))
def test_a_name_is_assigned_once_and_within_the_policy(certificates: list[Leaf], policy: str | None) -> None:
    """A listener of one policy never answers with another's certificate."""
    assigned = assign_names(certificates, policy)
    by_id = {leaf.id: leaf for leaf in certificates}
    given_names = [name for own in assigned.values() for name in own]

    assert len(given_names) == len(set(given_names))
    assert all(own for own in assigned.values())
    assert all(policy is None or policy in by_id[name].policy_ids for name in assigned)
