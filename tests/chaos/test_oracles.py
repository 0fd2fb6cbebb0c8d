"""The oracles themselves: each sees what it is there for."""

import pytest
from cryptography.x509.verification import VerificationError

from tests.flow.box import until

from .oracles import (
    OneActive,
    assert_all_well,
    assert_audited,
    assert_nothing_stuck,
    assert_pairs,
    assert_quiet,
    keys_lost,
    leaks,
    secrets_of,
)
from .worker import Rig

pytestmark = pytest.mark.pebble

A, B = "a.oracle.test", "b.oracle.test"


@pytest.fixture
def done(rig: Rig) -> Rig:
    """A rig with two certificates, and a worker that has nothing to do."""
    rig.want(A)
    rig.want(B)
    rig.worker.start()
    until(lambda: rig.serial(A) and rig.serial(B))
    return rig


def test_all_is_well_and_then_it_is_not(done: Rig) -> None:
    """One thing after the other is broken, and the oracle that is meant for it says so."""
    assert_all_well(done, wanted=2)

    done.want_renewal()
    with pytest.raises(AssertionError):
        assert_quiet(done)
    until(lambda: len(done.ledger()) == 4 and done.issuance(A).closed_at and done.issuance(B).closed_at)
    done.worker.stop()

    canaries = {secret.name: max(secret.forms, key=len).decode() for secret in secrets_of(done)}
    for name, form in canaries.items():
        done.execute(f"INSERT INTO settings_kv VALUES ('{name}', '{form}')")
    assert {f"database: {name}" for name in canaries} <= set(leaks(done))

    done.execute("DELETE FROM audit_logs WHERE action = 'certificate.active'")
    with pytest.raises(AssertionError):
        assert_audited(done.db)

    done.execute(f"UPDATE issuances SET closed_at = NULL WHERE serial = '{done.serial(A)}'")
    with pytest.raises(AssertionError):
        assert_nothing_stuck(done.db)

    assert keys_lost(done) == []
    done.execute(f"DELETE FROM issuances WHERE serial = '{done.serial(A)}'")
    assert [int(serial, 16) for serial in keys_lost(done)] == [int(str(done.serial(A)), 16)]

    assert_pairs(done)
    done.execute(f"UPDATE certificates SET cert_pem = (SELECT cert_pem FROM certificates WHERE domain = '{B}')")
    with pytest.raises((AssertionError, VerificationError)):
        assert_pairs(done)


@pytest.mark.parametrize("rig", ["sqlite"], indirect=True)
def test_none_and_two_are_seen(done: Rig) -> None:
    """A lineage that has lost its active certificate, and one that has gained a second."""
    watch = OneActive(done.url)
    with pytest.raises(AssertionError, match="2 active certificates"), watch:
        take_two_for_one(done, watch)

    assert any("no active certificate any more" in fault for fault in watch.faults)


def take_two_for_one(done: Rig, watch: OneActive) -> None:
    """Let the second certificate be the first lineage's, too, once both have been seen."""
    until(lambda: watch.samples > 1)
    done.execute("DROP INDEX uq_certificates_lineage_id")
    first = f"(SELECT lineage_id FROM certificates WHERE domain = '{A}')"
    done.execute(f"UPDATE certificates SET lineage_id = {first} WHERE domain = '{B}'")
    seen = watch.samples
    until(lambda: watch.samples > seen + 1)
