"""One issuance, moved forward one action at a time: at most one act at the CA, then one commit.

What happens next is decided by `core.issuance.next_action` from what is committed and from what the
CA says of the order. Here each action is carried out and recorded. No transaction is open while we
wait for the CA.
"""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.ca import csr
from certworker.ca.messages import quote_damaged
from certworker.ca.problems import classify
from certworker.core.certificate import Chain, check_chain, is_odd_life, takes_over_at
from certworker.core.issuance import (
    Action,
    State,
    next_action,
)
from certworker.core.names import names_hash
from certworker.core.order import OrderStatus
from certworker.core.renewal import plan_renewal
from certworker.core.retry import Endpoint
from certworker.errors import (
    AccountGone,
    AnswerFault,
    CaError,
    ChainRefused,
    ChainUnreadable,
    InputError,
    SealError,
)
from certworker.steps import prove, trouble
from certworker.steps.session import Bench, Session, account_of, cancel, give_back, record
from certworker.store import budget, certificates, challenges, issuances, lineages, renewal_info
from certworker.store.budget import Refusal
from certworker.store.issuances import Issuance

_log = logging.getLogger(__name__)

_ORDER_LIFE = timedelta(days=7)
"""When an order expires whose CA does not say so (RFC 8555 §7.1.3 has it optional)."""

_ENDPOINTS = {
    Action.INTEND_ORDER: Endpoint.NEW_ACCOUNT,
    Action.PLACE_ORDER: Endpoint.NEW_ORDER,
    Action.LOOK: Endpoint.ORDER,
    Action.PUBLISH_CHALLENGES: Endpoint.AUTHORIZATION,
    Action.ANSWER_CHALLENGES: Endpoint.CHALLENGE,
    Action.PROVE_AGAIN: Endpoint.AUTHORIZATION,
    Action.FINALIZE: Endpoint.FINALIZE,
    Action.DOWNLOAD: Endpoint.CERTIFICATE,
    Action.EXPLAIN_FAILURE: Endpoint.AUTHORIZATION,
}


def advance(bench: Bench, session: Session) -> None:
    """Take the next action of an open issuance; afterwards it is closed, waits, or has moved.

    Raises LeaseLost when another worker owns it, StoreError when the database cannot be written.
    """
    session.wait_until = None
    before = session.issuance
    action = next_action(State(before.state), session.order)
    doing = _ENDPOINTS.get(action)
    if doing is not None and bench.gate.closed_until() is not None:
        # Nothing is asked of this CA now; it is claimed again when it may be.
        give_back(bench, session, bench.clock())
        return
    try:
        _ACTS[action](bench, session)
    except prove.NotYet:
        pass
    except AccountGone as gone:
        trouble.give_up_account(bench, session, gone)
    except (InputError, SealError) as error:
        trouble.give_up_key(bench, session, error)
    except ChainRefused as error:
        trouble.refuse_chain(bench, session, classify(error, Endpoint.CERTIFICATE))
    except CaError as error:
        trouble.meet(bench, session, error, doing or Endpoint.ORDER)
    else:
        if doing is not None and action is not Action.INTEND_ORDER and session.issuance.is_open:
            bench.gate.succeeded()
    if session.issuance is not before:
        session.recovered = False
        bench.moved(session)


# -- actions, in the order of a life ------------------------------------------------------------------


def _make_key(bench: Bench, session: Session) -> None:
    names = session.issuance.dns_names or _names_to_order(bench, session)
    key = csr.make_key(session.lineage.key_type)
    sealed = bench.sealer.seal(csr.key_to_pem(key), table="issuances", column="key_pem", row_id=session.issuance.id)
    record(
        bench, session, State.KEY_READY, key_pem=sealed, csr_der=csr.make_csr(key, names),
        spki_sha256=csr.spki_sha256(key.public_key()), dns_names=names, names_hash=names_hash(names),
    )  # fmt: skip


def _names_to_order(bench: Bench, session: Session) -> list[str]:
    """Return the names that are wanted, but for those that were refused and whose next try is later."""
    now, names = bench.clock(), session.lineage.dns_names
    if len(names) == 1:
        return names
    left_out = bench.db.read(lambda tx: lineages.left_out(tx, session.lineage.id))
    later = {name.dns_name for name in left_out if name.probe_at > now}
    return [name for name in names if name not in later]


def _intend_order(bench: Bench, session: Session) -> None:
    if not _still_wanted(bench, session):
        return
    account_id, _ = bench.accounts.default()
    informs = bench.client.directory().renewal_info is not None
    try:
        intended = bench.db.write(lambda tx: _intend(tx, bench, session, account_id, informs))
    except _SameNames:
        trouble.await_same_names(bench, session)
        return
    if isinstance(intended, Refusal):
        trouble.await_budget(bench, session, intended)
    else:
        session.issuance = intended


class _SameNames(Exception):
    """Another issuance orders the same names: what was debited for this one is rolled back."""


def _intend(tx: Connection, bench: Bench, session: Session, account_id: str, informs: bool) -> Issuance | Refusal:
    """Debit the rate ledger and fix everything that the order says, in one transaction."""
    row, now = session.issuance, bench.clock()
    if (recorded := issuances.find_recorded(tx, row, State.ORDER_INTENT)) is not None:
        return recorded
    assert row.names_hash is not None
    replaces = renewal_info.find_replaceable(tx, session.lineage.id, account_id, now) if informs else None
    urgent = session.is_urgent(now)
    charges = trouble.charges_of(tx, bench, session, urgent=urgent, replaces=replaces)
    refusal = budget.spend(tx, session.lineage.directory_url, charges, account_id, now)
    if refusal is not None:
        return refusal
    # Every order of these names waits for the same bucket's row: what is committed is all there is.
    if issuances.is_ordering(tx, row.names_hash, account_id, row.id, now):
        raise _SameNames
    return issuances.record(
        tx, row, now, state=State.ORDER_INTENT, account_id=account_id, replaces=replaces, urgent=urgent,
        failures=0, error=None,
    )  # fmt: skip


def _place_order(bench: Bench, session: Session) -> None:
    if not _still_wanted(bench, session):
        return
    profile, replaces = session.lineage.profile or None, session.issuance.replaces
    order = bench.client.new_order(account_of(bench, session), session.dns_names, profile, replaces)
    record(
        bench, session, State.ORDERED, order_url=order.url, finalize_url=order.finalize_url,
        order_expires_at=order.expires_at or bench.clock() + _ORDER_LIFE,
    )  # fmt: skip
    session.order = order


def _look(bench: Bench, session: Session) -> None:
    assert session.issuance.order_url is not None
    session.order = bench.client.fetch_order(account_of(bench, session), session.issuance.order_url)
    if session.order.status is OrderStatus.INVALID:
        session.authorizations = None  # one of them has changed


def _intend_finalize(bench: Bench, session: Session) -> None:
    now = bench.clock()

    def intend(tx: Connection) -> Issuance:
        if not lineages.is_linked(tx, session.lineage.id):
            return cancel(tx, session, now)  # it would be thrown away, and counts against limits all the same
        return issuances.record(tx, session.issuance, now, state=State.FINALIZE_INTENT, failures=0, error=None)

    session.issuance = bench.db.write(intend)


def _finalize(bench: Bench, session: Session) -> None:
    row, order = session.issuance, session.order
    assert order is not None
    assert row.csr_der is not None
    finalize_url = row.finalize_url or order.finalize_url
    session.order = bench.client.finalize(account_of(bench, session), finalize_url, row.csr_der, order.url)
    if row.state == State.FINALIZE_INTENT:
        session.looks = 0
        record(bench, session, State.FINALIZING)
    if session.order.status is OrderStatus.READY:
        trouble.await_ca(bench, session)  # it took no notice; the next look says whether to finalize again


def _note_issued(bench: Bench, session: Session) -> None:
    assert session.order is not None
    if session.order.certificate_url is None:
        raise AnswerFault(session.order.url, "the order is valid but names no certificate")
    record(bench, session, State.ISSUED, certificate_url=session.order.certificate_url)


def _download(bench: Bench, session: Session) -> None:
    url = session.issuance.certificate_url
    assert url is not None
    text, now = bench.client.fetch_chain(account_of(bench, session), url), bench.clock()
    try:
        chain = _check(bench, session, text, now)
    except ChainUnreadable as error:
        # Nobody knows what it is, so the order may be as good as any other: it is downloaded again while it lives.
        if session.order_has_expired(now):
            raise
        raise AnswerFault(url, f"{error}; {quote_damaged(text.encode())}") from error
    leaf = chain.leaf
    record(
        bench, session, State.DOWNLOADED, chain_pem=chain.pem, serial=leaf.serial, fingerprint=leaf.fingerprint,
        not_before=leaf.validity.not_before, not_after=leaf.validity.not_after,
    )  # fmt: skip


def _activate(bench: Bench, session: Session) -> None:
    now = bench.clock()
    chain_pem, key_pem = session.issuance.chain_pem, session.issuance.key_pem
    assert chain_pem is not None
    assert key_pem is not None
    chain = _check(bench, session, chain_pem, now)
    usable, present = chain.leaf.validity.usable_from(now), session.lineage.validity
    takes_over = takes_over_at(chain.leaf.validity, present, now)
    if takes_over > now:
        trouble.await_start(bench, session, chain.leaf.validity, takes_over)
        return
    plain = bench.sealer.open(key_pem, table="issuances", column="key_pem", row_id=session.issuance.id)
    session.issuance = bench.db.write(lambda tx: _switch(tx, bench, session, chain, plain, now))
    bench.gate.issued()
    if session.issuance.state == State.DONE and is_odd_life(usable, present):
        life = {"life": str(usable.lifetime), "before": str(present.lifetime) if present else None}
        _log.warning("certificate.odd_life", extra={"names": session.dns_names, **life})


def _switch(tx: Connection, bench: Bench, session: Session, chain: Chain, key_pem: str, now: datetime) -> Issuance:
    """Let the new certificate serve: certificate, lineage, policies, issuance and audit in one transaction."""
    row, lineage = session.issuance, lineages.lock(tx, session.lineage.id)
    if (recorded := issuances.find_recorded(tx, row, State.DONE)) is not None:
        return recorded
    if lineage is None or not lineages.is_linked(tx, lineage.id):
        return cancel(tx, session, now)
    closed = issuances.close(tx, row, State.DONE, now, error=None)
    challenges.withdraw(tx, row.id)
    certificate_id = certificates.id_for_lineage(tx, lineage.id)
    # Counted from now, or a certificate that arrives half used would be renewed at once, again and again.
    usable = chain.leaf.validity.usable_from(now)
    lineages.record_certificate(
        tx, lineage.id, certificate_id=certificate_id, issuance_id=row.id, leaf=chain.leaf, usable=usable,
        renew_at=plan_renewal(usable, lineage.id), now=now,
    )  # fmt: skip
    sealed = bench.sealer.seal(key_pem, table="certificates", column="key_pem", row_id=certificate_id)
    domain = lineages.first_name(tx, lineage)
    certificates.activate(tx, certificate_id, lineage.id, domain, chain.pem, sealed, chain.leaf, now)
    return closed


_ACTS: dict[Action, Callable[[Bench, Session], None]] = {
    Action.MAKE_KEY: _make_key,
    Action.INTEND_ORDER: _intend_order,
    Action.PLACE_ORDER: _place_order,
    Action.LOOK: _look,
    Action.PUBLISH_CHALLENGES: prove.publish_challenges,
    Action.ANSWER_CHALLENGES: prove.answer_challenges,
    Action.NOTE_AUTHORIZED: prove.note_authorized,
    Action.PROVE_AGAIN: prove.prove_again,
    Action.INTEND_FINALIZE: _intend_finalize,
    Action.FINALIZE: _finalize,
    Action.NOTE_ISSUED: _note_issued,
    Action.DOWNLOAD: _download,
    Action.ACTIVATE: _activate,
    Action.WAIT: trouble.await_ca,
    Action.EXPLAIN_FAILURE: prove.explain_failure,
}


# -- what actions share -------------------------------------------------------------------------------


def _still_wanted(bench: Bench, session: Session) -> bool:
    """Say whether to order; what nobody wants any more is closed before it costs anything."""
    if bench.db.read(lambda tx: lineages.is_wanted(tx, session.lineage.id)):
        return True
    now = bench.clock()
    session.issuance = bench.db.write(lambda tx: cancel(tx, session, now))
    return False


def _check(bench: Bench, session: Session, chain_pem: str, now: datetime) -> Chain:
    spki, private_ca = session.issuance.spki_sha256, bench.accounts.registration.private_ca
    assert spki is not None
    return check_chain(chain_pem, spki_sha256=spki, dns_names=session.dns_names, now=now, private_ca=private_ca)
