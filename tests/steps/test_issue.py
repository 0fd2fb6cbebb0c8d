"""One policy's way to a certificate, on both databases, with a CA in memory."""

import json
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certworker.ca.client import ExternalAccount
from certworker.core.issuance import State
from certworker.core.order import OrderStatus
from certworker.errors import LeaseLost, TransportFault
from certworker.steps.issue import Session, advance
from certworker.steps.register import Registration
from certworker.store import accounts, certificates, issuances, lineages, policies

from .world import World


def reset(path: str) -> TransportFault:
    return TransportFault("reset", f"https://ca.test{path}", "the connection was reset")


def assert_pair_stored(world: World, dns_name: str) -> None:
    """The row that serves holds the leaf of the CA's ledger and the key that belongs to it."""
    lineage = world.lineage(dns_name)
    row = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    assert row is not None
    leaf = x509.load_pem_x509_certificate(row.cert_pem.encode())
    key_pem = world.sealer.open(row.key_pem, table="certificates", column="key_pem", row_id=row.id)
    key = load_pem_private_key(key_pem.encode(), None)
    assert row.key_pem.startswith("cw1.")
    assert leaf.public_key() == key.public_key()
    assert f"{leaf.serial_number:x}" == row.serial
    assert leaf.serial_number in [issued.serial for issued in world.ca.issued]


def test_a_policy_becomes_a_certificate(world: World) -> None:
    """One wanted name: one account, one order, one certificate, everything that hangs on it switched at once."""
    policy_id = world.add_policy("a.test")
    assert world.policy_status(policy_id) == "pending"
    world.take_over()

    world.work()

    assert world.moves[-1] == State.DONE
    assert len(world.ca.issued) == 1
    assert world.ca.count("POST", "/new-order") == 1
    assert world.policy_status(policy_id) == "active"
    lineage = world.lineage("a.test")
    assert lineage.status == "active"
    assert lineage.renew_at is not None
    assert lineage.next_check_at == lineage.renew_at
    assert world.count("challenges") == 0
    assert_pair_stored(world, "a.test")
    actions = [row[0] for row in world.rows("SELECT action FROM audit_logs ORDER BY created_at, action")]
    assert sorted(actions) == ["certificate.active", "policy.active"]


def test_states_are_committed_in_order(world: World) -> None:
    """Every state of a life is seen once, in the order of the state machine."""
    world.issue("a.test")

    seen = list(dict.fromkeys(world.moves))
    assert seen == [
        "order_intent", "ordered", "validating", "finalizing", "done",
    ]  # fmt: skip


def test_key_and_csr_are_committed_before_the_order(world: World) -> None:
    """What the order is for is on disk before the CA hears of it."""
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while world.ca.count("POST", "/new-order") == 0:
        before = session.issuance
        advance(bench, session)

    assert before.state == State.ORDER_INTENT
    assert before.key_pem is not None
    assert before.csr_der is not None
    assert before.account_id is not None


@pytest.mark.parametrize("validate_on", ["answer", "look"])
def test_stopped_between_any_two_moves(world: World, validate_on: str) -> None:
    """A worker that dies after every single move still makes one order and one certificate with one key."""
    world.ca.validate_on = validate_on  # type: ignore[assignment]
    world.add_policy("a.test", "b.test", shared=True)
    world.take_over()
    keys = set()
    for _ in range(100):
        sessions = world.claim()
        if not sessions:
            break
        move_once(world, sessions[0])
        keys |= {row[0] for row in world.rows("SELECT spki_sha256 FROM issuances WHERE spki_sha256 IS NOT NULL")}
        world.clock.move(timedelta(seconds=1))
        world.crash()

    assert world.last_issuance("a.test").state == State.DONE
    assert len(world.ca.issued) == 1
    assert len(keys) == 1
    assert world.ca.count("POST", "/new-order") == 1
    assert_pair_stored(world, "a.test")


def move_once(world: World, session: Session) -> None:
    """Let a new process take one action that leaves something behind; the look before it leaves nothing."""
    bench, before = world.bench(), session.issuance
    for _ in range(3):
        advance(bench, session)
        if session.issuance is not before or session.wait_until is not None:
            break


@pytest.mark.parametrize("after", [False, True], ids=["never-arrived", "answer-lost"])
@pytest.mark.parametrize(
    "path",
    ["/new-account", "/new-order", "/authorization/*", "/challenge/*", "/order/*", "/finalize/*", "/certificate/*"],
)
def test_one_lost_exchange_anywhere(world: World, path: str, after: bool) -> None:
    """A reset before or after the CA acted is repaired by asking the CA; the certificate is issued once."""
    world.ca.fail_next("POST", path, raises=reset(path), after=after)
    world.add_policy("a.test")
    world.take_over()

    for _ in range(5):
        world.work()
        world.clock.move(timedelta(minutes=1))

    assert world.last_issuance("a.test").state == State.DONE
    assert len(world.ca.issued) == 1
    assert len(world.ca.accounts) == 1
    assert world.ca.count("POST", "/new-order") <= 2
    assert_pair_stored(world, "a.test")


def test_transient_trouble_is_put_off_and_told(world: World) -> None:
    """The issuance stays open with its key; status can say what happened and when it goes on."""
    world.ca.fail_next("POST", "/new-order", status=503, problem="serverInternal")
    world.add_policy("a.test")
    world.take_over()

    world.work()

    row, lineage = world.last_issuance("a.test"), world.lineage("a.test")
    assert row.state == State.ORDER_INTENT
    assert row.attempt_at == world.clock() + timedelta(seconds=5)
    assert row.lease_owner is None
    assert lineage.status == "pending"
    assert lineage.error is not None
    assert lineage.error["class"] == "transient"
    assert lineage.error["retry_at"] == row.attempt_at.isoformat()


def test_retry_after_is_obeyed(world: World) -> None:
    """A 429 with Retry-After puts the order off by what the CA asked, and not a request is sent before."""
    world.ca.fail_next("POST", "/new-order", status=429, problem="rateLimited", headers={"retry-after": "3600"})
    world.add_policy("a.test")
    world.take_over()
    world.work()
    asked_at = world.clock()
    sent = len(world.ca.requests)

    world.clock.move(timedelta(seconds=3599))
    world.work()
    assert len(world.ca.requests) == sent
    assert world.last_issuance("a.test").attempt_at >= asked_at + timedelta(seconds=3600)

    world.clock.move(timedelta(minutes=10))
    world.work()
    assert world.last_issuance("a.test").state == State.DONE


def test_waiting_for_the_ca_obeys_its_retry_after(world: World) -> None:
    """While an order is processed the CA is asked when it said, not sooner."""
    world.ca.retry_after = "7"
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    waits = []
    while session.issuance.is_open:
        advance(bench, session)
        if session.wait_until is not None and session.issuance.state == State.FINALIZING:
            waits.append(session.wait_until - world.clock())
            world.clock.now = session.wait_until

    assert waits == [timedelta(seconds=7)]


def test_a_failed_validation_closes_the_issuance_and_is_retried_more_and_more_rarely(world: World) -> None:
    """1 min, 10 min, 100 min, a day: three failures in the first hours, then one a day."""
    world.closed_names.add("a.test")
    policy_id = world.add_policy("a.test")
    world.take_over()
    pauses = []
    for _ in range(5):
        world.work()
        lineage = world.lineage("a.test")
        assert lineage.next_check_at is not None
        pauses.append(lineage.next_check_at - world.clock())
        world.clock.now = lineage.next_check_at
        world.take_over()

    assert pauses == [timedelta(minutes=m) for m in (1, 10, 100, 24 * 60, 24 * 60)]
    assert world.policy_status(policy_id) == "error"
    error = world.lineage("a.test").error
    assert error is not None
    assert error["class"] == "validation"
    assert "A 127.0.0.1" in str(error["hint"])
    assert world.looked_up == ["a.test"] * 5
    assert world.count("challenges") == 0

    world.closed_names.clear()
    world.work()
    assert world.policy_status(policy_id) == "active"
    assert world.lineage("a.test").failures == 0
    assert world.lineage("a.test").error is None


def test_a_dead_name_does_not_hold_up_its_neighbours(world: World) -> None:
    """One name, one certificate: the others of the policy are issued."""
    world.closed_names.add("dead.test")
    policy_id = world.add_policy("a.test", "dead.test", "b.test")
    world.take_over()
    world.work()

    assert world.lineage("a.test").status == "active"
    assert world.lineage("b.test").status == "active"
    assert world.lineage("dead.test").status == "error"
    assert world.policy_status(policy_id) == "error"


def test_a_failed_renewal_changes_nothing_that_serves(world: World) -> None:
    """Certificate and policy stay active; the failure is there to be seen."""
    lineage = world.issue("a.test")
    serial = world.rows("SELECT serial FROM certificates")
    policy_id = world.rows("SELECT id FROM tls_policies")[0][0]
    world.closed_names.add("a.test")
    assert lineage.renew_at is not None
    world.clock.now = lineage.renew_at
    world.take_over()

    world.work()

    assert world.last_issuance("a.test").state == State.FAILED
    assert world.rows("SELECT serial FROM certificates") == serial
    assert world.policy_status(str(policy_id)) == "active"
    assert world.lineage("a.test").error is not None


def test_a_renewal_replaces_the_certificate_in_place(world: World) -> None:
    """Same row, new key, new leaf, a higher revision; the old pair stays in the history."""
    lineage = world.issue("a.test")
    before = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    assert lineage.renew_at is not None
    world.clock.now = lineage.renew_at
    world.take_over()
    world.work()

    after = world.db.read(lambda tx: certificates.find_of_lineage(tx, lineage.id))
    assert before is not None
    assert after is not None
    assert (after.id, after.domain) == (before.id, "a.test")
    assert after.fingerprint != before.fingerprint
    assert (after.revision or 0) > (before.revision or 0)
    assert len({row[0] for row in world.rows("SELECT spki_sha256 FROM issuances")}) == 2
    assert_pair_stored(world, "a.test")


def test_terms_are_agreed_by_setting_only(world: World) -> None:
    """Without it no key is made, the CA is not asked, and the hint names terms and setting."""
    world.ca.terms = "https://ca.test/terms"
    world.registration = Registration(world.ca.directory_url)
    world.add_policy("a.test")
    world.take_over()
    world.work()

    error = world.lineage("a.test").error
    assert error is not None
    assert error["class"] == "action_required"
    assert "https://ca.test/terms" in str(error["hint"])
    assert "ACME_TOS_AGREED" in str(error["hint"])
    assert world.count("acme_accounts") == 0
    assert world.ca.count("POST", "/new-account") == 0


def test_an_account_is_registered_once(world: World) -> None:
    """The answer to newAccount is lost twice; the same key finds the same account."""
    world.ca.fail_next("POST", "/new-account", raises=reset("/new-account"), after=True, times=2)
    world.add_policy("a.test", "b.test")
    world.take_over()
    for _ in range(4):
        world.work()
        world.clock.move(timedelta(minutes=1))

    assert len(world.ca.accounts) == 1
    assert world.count("acme_accounts") == 1
    assert len(world.ca.issued) == 2


def test_an_account_is_bound_to_external_credentials(world: World) -> None:
    """EAB (RFC 8555 §7.3.4): with the right key it is made, with the wrong one nothing is retried soon."""
    world.ca.eab_keys = {"kid-1": b"0123456789abcdef0123456789abcdef"}
    wrong = ExternalAccount("kid-1", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
    world.registration = Registration(world.ca.directory_url, terms_agreed=True, external=wrong)
    world.add_policy("a.test")
    world.take_over()
    world.work()
    error = world.lineage("a.test").error
    assert error is not None
    assert error["class"] == "action_required"

    right = ExternalAccount("kid-1", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY")
    world.registration = Registration(world.ca.directory_url, terms_agreed=True, external=right)
    world.clock.move(timedelta(days=2))
    world.take_over()
    world.work()
    assert world.lineage("a.test").status == "active"


def test_a_refused_name_waits_a_day(world: World) -> None:
    """rejectedIdentifier is permanent: one order, told with the CA's words, once a day."""
    world.ca.refused_names = frozenset({"bad.test"})
    policy_id = world.add_policy("bad.test")
    world.take_over()
    world.work()

    lineage = world.lineage("bad.test")
    assert lineage.error is not None
    assert lineage.error["class"] == "permanent"
    assert str(lineage.error["type"]).endswith(":rejectedIdentifier")
    assert lineage.next_check_at == world.clock() + timedelta(days=1)
    assert world.policy_status(policy_id) == "error"
    assert world.ca.count("POST", "/new-order") == 1


def test_a_chain_for_another_key_is_not_stored(world: World) -> None:
    """The CA serves somebody else's certificate twice: refused, nothing activated."""
    world.issue("a.test")
    world.ca.fail_next(
        "POST", "/certificate/*", status=200, body=world.ca.issued[0].chain_pem.encode(), times=2,
        headers={"content-type": "application/pem-certificate-chain"},
    )  # fmt: skip
    world.add_policy("b.test")
    world.take_over()
    world.work()
    world.clock.move(timedelta(minutes=1))
    world.work()

    row = world.last_issuance("b.test")
    assert row.state == State.FAILED
    assert row.chain_pem is None
    assert world.count("certificates") == 1
    error = world.lineage("b.test").error
    assert error is not None
    assert "another key" in str(error["detail"])


def test_a_key_in_the_chain_refuses_all_of_it(world: World) -> None:
    """RFC 8555 §11.4."""
    key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n"
    headers = {"content-type": "application/pem-certificate-chain"}
    world.ca.fail_next("POST", "/certificate/*", status=200, body=key.encode(), headers=headers, times=2)
    world.add_policy("a.test")
    world.take_over()
    for _ in range(2):
        world.work()
        world.clock.move(timedelta(minutes=1))

    assert world.count("certificates") == 0
    assert world.last_issuance("a.test").state == State.FAILED


def test_a_zombie_changes_nothing(world: World) -> None:
    """A worker that was thought dead and comes back writes nothing, and sends nothing more."""
    world.add_policy("a.test")
    world.take_over()
    (zombie,) = world.claim()
    world.crash()
    world.worker = "00000000-0000-4000-8000-000000000002"
    (session,) = world.claim()

    with pytest.raises(LeaseLost):
        advance(world.bench(), zombie)

    assert world.ca.count("POST", "/new-order") == 0
    finish(world, session)
    assert len(world.ca.issued) == 1


def finish(world: World, session: Session) -> None:
    bench = world.bench()
    while session.issuance.is_open:
        advance(bench, session)
        if session.wait_until is not None:
            world.clock.now = session.wait_until


def test_a_policy_removed_meanwhile_gets_no_certificate_activated(world: World) -> None:
    """The result of an order nobody wants any more is kept in the history and serves nowhere."""
    policy_id = world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while session.order is None or session.order.status is not OrderStatus.VALID:
        advance(bench, session)
        if session.wait_until is not None:
            world.clock.now = session.wait_until
    world.db.write(lambda tx: policies.remove(tx, policy_id))

    advance(bench, session)

    assert session.issuance.state == State.CANCELLED
    assert session.issuance.chain_pem is not None
    assert world.count("certificates") == 0
    assert world.count("challenges") == 0


def test_an_order_the_ca_forgot_is_made_anew(world: World) -> None:
    """404 on the order: this issuance ends, the next one orders again; nothing is guessed."""
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while session.issuance.state != State.ORDERED:
        advance(bench, session)
    world.ca.orders.clear()
    world.crash()
    world.work()
    assert world.last_issuance("a.test").state == State.FAILED

    world.clock.move(timedelta(minutes=1))
    world.take_over()
    world.work()
    assert world.lineage("a.test").status == "active"


def test_an_order_that_never_ends_is_given_up_when_it_expires(world: World) -> None:
    """`processing` for ever: polled rarely, dropped at the order's own expiry."""
    world.ca.processing_looks = 10**9
    world.add_policy("a.test")
    world.take_over()
    world.work(patience=40)
    polls = world.ca.count("POST", "/order/*")
    world.crash()
    world.clock.move(timedelta(days=8))
    world.work()

    assert polls < 25
    row = world.last_issuance("a.test")
    assert row.state == State.FAILED
    assert row.error is not None
    assert row.error["type"] == "certworker:order-expired"


def test_profile_is_sent_only_when_offered(world: World) -> None:
    """An offered profile is in the order; one that is not offered is told before any order."""
    world.ca.profiles = {"short": timedelta(days=6)}
    world.wanted = world.wanted.__class__(
        lineages.Issuer(world.ca.directory_url, "short", "ecdsa-p256"), private_ca=True
    )
    world.issue("a.test")
    assert world.ca.issued[0].profile == "short"

    world.wanted = world.wanted.__class__(
        lineages.Issuer(world.ca.directory_url, "gone", "ecdsa-p256"), private_ca=True
    )
    world.add_policy("b.test")
    orders = world.ca.count("POST", "/new-order")
    world.take_over()
    world.work()
    error = world.lineage("b.test").error
    assert error is not None
    assert error["class"] == "permanent"
    assert world.ca.count("POST", "/new-order") == orders


def test_one_open_issuance_per_lineage(world: World) -> None:
    """Whoever asks, a second one is not queued while one is open."""
    world.add_policy("a.test")
    world.take_over()
    lineage = world.lineage("a.test")

    again = world.db.write(lambda tx: issuances.queue(tx, lineage.id, "forced", world.clock()))

    assert again is None
    assert world.count("issuances") == 1


def test_a_shared_certificate_is_filed_under_the_policys_first_name(world: World) -> None:
    """`certificates.domain` of a shared certificate, whatever its place in the alphabet."""
    world.add_policy("www.b.test", "a.b.test", shared=True)
    world.take_over()
    world.work()

    assert world.rows("SELECT domain FROM certificates") == [("www.b.test",)]


def test_an_account_that_another_program_deleted_ends_the_order(world: World) -> None:
    """The order was made with it, so it cannot go on; the next issuance registers an account and succeeds."""
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while session.issuance.state != State.ORDERED:
        advance(bench, session)
    world.execute("DELETE FROM acme_accounts")
    world.crash()
    world.work()
    error = world.last_issuance("a.test").error
    assert error is not None
    assert error["type"] == "certworker:account-gone"

    world.clock.move(timedelta(minutes=1))
    world.take_over()
    world.work()
    assert world.lineage("a.test").status == "active"


def test_a_plain_account_key_is_sealed(world: World) -> None:
    """Another program stored it as PEM: it is used, and sealed where it is."""
    world.issue("a.test")
    stored = world.db.read(lambda tx: accounts.find_default(tx, world.ca.directory_url))
    assert stored is not None
    plain = {**stored.credentials_json, "key": stored.open(stored.key, world.sealer)}
    world.execute("UPDATE acme_accounts SET credentials_json = :plain", plain=json.dumps(plain))

    world.issue("b.test")

    again = world.db.read(lambda tx: accounts.find_default(tx, world.ca.directory_url))
    assert again is not None
    assert again.sealed
    assert len(world.ca.accounts) == 1


@pytest.mark.parametrize(
    "credentials", [{}, {"key": "garbage"}, {"key": "cw1.AAAA"}], ids=["no-key", "no-pem", "sealed"]
)
def test_an_account_row_that_cannot_be_used_is_told(world: World, credentials: dict[str, str]) -> None:
    """Another program wrote it: a person has to mend it, and is told which row."""
    world.execute(
        "INSERT INTO acme_accounts (id, directory_url, credentials_json, created_at) VALUES "
        "('7a0c0c5e-7a53-4f43-9f53-0a2b8d8f1c11', :url, :credentials, '2026-11-22T12:00:00.000000Z')",
        url=world.ca.directory_url, credentials=json.dumps(credentials),
    )  # fmt: skip
    policy_id = world.add_policy("a.test")
    world.take_over()
    world.work()

    error = world.lineage("a.test").error
    assert error is not None
    assert (error["class"], error["type"]) == ("action_required", "certworker:key")
    assert world.policy_status(policy_id) == "error"


def test_a_ca_that_is_busy_for_long_is_left_alone(world: World) -> None:
    """After ten minutes it is asked every five only, and the issuance holds no place meanwhile."""
    world.ca.processing_looks = 10**9
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench, waits = world.bench(), []
    while len(waits) < 60:
        advance(bench, session)
        if session.wait_until is not None:
            waits.append(session.wait_until - world.clock())
            world.clock.now = session.wait_until

    assert max(waits[:10]) <= timedelta(seconds=30)
    assert waits[-1] == timedelta(minutes=5)


def test_a_ca_that_ignores_finalize_is_not_hammered(world: World) -> None:
    """`ready` after finalize: asked again after a pause that grows, never in a loop."""
    world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench, waits = world.bench(), []
    for _ in range(200):
        advance(bench, session)
        for order in world.ca.orders.values():
            if order.status == "processing":
                order.status = "ready"
        if session.issuance.state == State.FINALIZING and session.wait_until is not None:
            waits.append(session.wait_until - world.clock())
            world.clock.now = session.wait_until

    assert world.ca.count("POST", "/finalize/*") <= 100
    assert waits[-1] >= timedelta(seconds=10)


def test_an_order_that_comes_back_is_used_again(world: World) -> None:
    """Boulder hands out a pending order again after its issuance was closed; that is no conflict of ours."""
    world.add_policy("a.test")
    world.take_over()
    world.work()
    url = world.last_issuance("a.test").order_url
    assert url is not None
    lineage, now = world.lineage("a.test"), world.clock()
    world.db.write(lambda tx: issuances.queue(tx, lineage.id, "forced", now))
    (session,) = world.claim()

    world.db.write(lambda tx: issuances.record(tx, session.issuance, now, order_url=url))

    assert world.rows("SELECT count(*) FROM issuances WHERE order_url = :url", url=url) == [(2,)]


def test_what_nobody_wants_any_more_is_not_ordered(world: World) -> None:
    """The CA was down at newOrder and the policy is gone when it is back: no order, no certificate thrown away."""
    world.ca.fail_next("POST", "/new-order", status=503, problem="serverInternal")
    policy_id = world.add_policy("a.test")
    world.take_over()
    world.work()
    world.db.write(lambda tx: policies.remove(tx, policy_id))
    world.clock.move(timedelta(minutes=1))

    world.work()

    assert world.last_issuance("a.test").state == State.CANCELLED
    assert world.ca.count("POST", "/new-order") == 1
    assert world.ca.issued == []


def test_what_nobody_wants_after_the_order_is_not_finalized(world: World) -> None:
    """No certificate is made to be thrown away, and its tokens are withdrawn."""
    policy_id = world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while session.order is None or session.order.status is not OrderStatus.READY:
        advance(bench, session)
        world.clock.now = max(world.clock.now, session.wait_until or world.clock.now)
    world.db.write(lambda tx: policies.remove(tx, policy_id))

    while session.issuance.is_open:
        advance(bench, session)

    assert session.issuance.state == State.CANCELLED
    assert world.ca.count("POST", "/finalize/*") == 0
    assert world.rows("SELECT count(*) FROM challenges") == [(0,)]


def test_a_certificate_that_is_finished_when_its_policy_is_paused_serves(world: World) -> None:
    """Pausing stops renewals; what the CA has made already is not thrown away."""
    policy_id = world.add_policy("a.test")
    world.take_over()
    (session,) = world.claim()
    bench = world.bench()
    while session.order is None or session.order.status is not OrderStatus.VALID:
        advance(bench, session)
        if session.wait_until is not None:
            world.clock.now = session.wait_until
    now = world.clock()
    world.db.write(lambda tx: policies.set_paused(tx, policy_id, now, now))

    advance(bench, session)

    assert session.issuance.state == State.DONE
    assert world.policy_status(policy_id) == "active"


def test_a_certificate_that_arrives_half_used_is_not_renewed_at_once(world: World) -> None:
    """Backdated by more than the usual point of renewal: its life counts from the day it came."""
    world.ca.lifetime = timedelta(hours=48)
    world.ca.now = lambda: world.clock() - timedelta(hours=26)
    world.issue("a.test")

    for _ in range(10):
        world.take_over()
        world.work()
        world.clock.move(timedelta(minutes=5))

    assert len(world.ca.issued) == 1
    renew_at = world.lineage("a.test").renew_at
    assert renew_at is not None
    assert renew_at - world.clock() > timedelta(hours=7)


@pytest.mark.parametrize("private_ca", [True, False])
def test_a_ca_that_was_reset(world: World, private_ca: bool) -> None:
    """It knows the account no more: a private one gets the same key again, at a public one a person decides."""
    world.registration = Registration(world.ca.directory_url, terms_agreed=True, private_ca=private_ca)
    world.issue("a.test")
    world.ca.restart()
    world.add_policy("b.test")
    world.take_over()
    world.work()
    world.clock.move(timedelta(minutes=1))
    world.take_over()
    world.work()

    assert world.count("acme_accounts") == 1
    if private_ca:
        assert world.lineage("b.test").status == "active"
        assert world.rows("SELECT count(*) FROM audit_logs WHERE action = 'account.forgotten'") == [(1,)]
    else:
        error = world.lineage("b.test").error
        assert error is not None
        assert error["class"] == "action_required"
        assert "account_url" in error["hint"]
        assert len(world.ca.accounts) == 0


def test_an_account_that_moved_is_found_by_its_key(world: World) -> None:
    """The CA knows the key under another URL (RFC 8555 §7.3.1): that one is used from then on."""
    world.issue("a.test")
    world.execute("UPDATE acme_accounts SET credentials_json = " + (
        "json_set(credentials_json, '$.account_url', 'https://ca.test/account/999')" if world.db.embedded else
        """jsonb_set(credentials_json, '{account_url}', '"https://ca.test/account/999"')"""))  # fmt: skip
    world.add_policy("b.test")
    world.take_over()
    world.work()
    world.clock.move(timedelta(minutes=1))
    world.take_over()
    world.work()

    assert world.lineage("b.test").status == "active"
    assert len(world.ca.accounts) == 1


def test_a_worker_takes_only_what_its_ca_is_to_issue(world: World) -> None:
    """An issuance for another CA waits for a worker that speaks with that one."""
    world.add_policy("a.test")
    world.take_over()
    now = world.clock()

    other = world.db.write(
        lambda tx: issuances.claim(tx, world.worker, now, 10, directory_url="https://other-ca.test/directory")
    )
    ours = world.db.write(lambda tx: issuances.claim(tx, world.worker, now, 10, directory_url=world.ca.directory_url))

    assert (len(other), len(ours)) == (0, 1)
