"""One issuance, moved forward one action at a time: at most one act at the CA, then one commit.

What happens next is decided by `core.issuance.next_action` from what is committed and from what the
CA says of the order. Here each action is carried out and recorded. No transaction is open while we
wait for the CA.
"""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.ca import csr
from certworker.ca.client import Account
from certworker.ca.messages import quote_damaged
from certworker.ca.problems import classify
from certworker.core.certificate import Chain, check_chain, is_odd_life, takes_over_at
from certworker.core.issuance import (
    POLLING,
    REST,
    Action,
    State,
    next_action,
    still_validating,
    to_answer,
    unproved,
    wait_for,
)
from certworker.core.names import names_hash
from certworker.core.order import Authorization, OrderStatus
from certworker.core.renewal import plan_renewal
from certworker.core.retry import Endpoint, ErrorClass, Failure, classify_order, names_refused
from certworker.errors import (
    AccountGone,
    AnswerFault,
    CaError,
    ChainRefused,
    ChainUnreadable,
    InputError,
    ProblemReported,
    SealError,
)
from certworker.steps import trouble
from certworker.steps.session import Bench, Session, account_of, cancel, give_back, record
from certworker.store import budget, certificates, challenges, issuances, lineages, renewal_info
from certworker.store.budget import Refusal
from certworker.store.issuances import Issuance

_log = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,128}")

_ROLLOVER = timedelta(seconds=1)
"""How often an issuance looks whether its account's key change is done."""
_VERDICT, _VERDICTS = timedelta(seconds=5), timedelta(seconds=30)
"""How often, and for how long since it was told to look, a CA is asked that is done with some names only."""
_NOTHING_KNOWN: Mapping[str, Authorization] = {}
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


def _publish_challenges(bench: Bench, session: Session) -> None:
    _publish(bench, session, State.PUBLISHED)


def _publish(bench: Bench, session: Session, state: State) -> bool:
    """Read the authorizations and commit, with `state`, what proves the names; say whether that could be done."""
    if bench.db.read(lambda tx: bench.accounts.publishing_key(tx, session.issuance.account_id or "")) is None:
        # The account's key is being changed: the CA would compare with the new one.
        session.wait_until = bench.clock() + _ROLLOVER
        return False
    authorizations = _fetch_authorizations(bench, session, account_of(bench, session))
    offers = [(a, _token_of(a)) for a in unproved(authorizations)]
    now, account_id = bench.clock(), session.issuance.account_id or ""

    def publish(tx: Connection) -> Issuance | None:
        key = bench.accounts.publishing_key(tx, account_id)
        if key is None:
            return None
        for authorization, token in offers:
            challenges.publish(
                tx, session.issuance.id, authorization.url, authorization.dns_name, token,
                key.key_authorization(token), now,
            )  # fmt: skip
        return issuances.record(tx, session.issuance, now, state=state)

    published = bench.db.write(publish)
    if published is None:
        session.wait_until = now + _ROLLOVER
        return False
    session.issuance, session.authorizations = published, authorizations
    return True


def _answer_challenges(bench: Bench, session: Session) -> None:
    account = account_of(bench, session)
    if session.authorizations is None:
        session.authorizations = _fetch_authorizations(bench, session, account)
    _tell_to_look(bench, session, account)
    record(bench, session, State.VALIDATING)
    _wait(bench, session)


def _tell_to_look(bench: Bench, session: Session, account: Account) -> None:
    for authorization in to_answer(session.authorizations or ()):
        challenge = authorization.http01()
        assert challenge is not None
        try:
            bench.client.answer_challenge(account, challenge.url)
        except ProblemReported as refused:
            # It is not pending any more: another order that shares it (Boulder) was quicker. Or that was not why.
            if refused.problem.code != "malformed" or to_answer(
                [bench.client.fetch_authorization(account, authorization.url)]
            ):
                raise


def _note_authorized(bench: Bench, session: Session) -> None:
    session.looks, session.authorizations = 0, None
    record(bench, session, State.AUTHORIZED)


def _prove_again(bench: Bench, session: Session) -> None:
    """Prove what the CA wants proved, once with every claim; in between it is waited for as if it were busy."""
    if session.authorizations is None:
        if not _publish(bench, session, State(session.issuance.state)):
            return
        _tell_to_look(bench, session, account_of(bench, session))
    _wait(bench, session)


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
        _wait(bench, session)  # it took no notice; the next look says whether to finalize again


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
        if _has_expired(session, now):
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


def _wait(bench: Bench, session: Session) -> None:
    """The CA is busy; look again when it says, or soon and then ever more rarely (RFC 8555 §7.5.1)."""
    order = session.order
    retry_after = order.retry_after if order is not None else None
    now = bench.clock()
    if _has_expired(session, now):
        detail = "the CA never finished the order before it expired"
        hint = "a new order is made; ask the CA if this lasts"
        trouble.fail(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:order-expired", detail, hint))
        return
    wait = wait_for(retry_after, session.looks)
    session.wait_until = now + (wait if now - session.issuance.state_at < POLLING else max(wait, REST))
    session.looks += 1
    session.order = None


def _explain_failure(bench: Bench, session: Session) -> None:
    assert session.order is not None
    known = session.authorizations or ()
    verdicts = {a.url: a for a in known if a not in still_validating(known)}
    authorizations = _fetch_authorizations(bench, session, account_of(bench, session), verdicts)
    now = bench.clock()
    if still_validating(authorizations) and now - session.issuance.state_at < _VERDICTS:
        # What it finds of the others is worth an order each: those without their dead names, all at once.
        session.authorizations, session.wait_until = authorizations, now + _VERDICT
        return
    failure = classify_order(session.order, authorizations)
    refused = names_refused(session.dns_names, session.order, authorizations)
    trouble.fail(bench, session, *trouble.look_for_ourselves(bench, session, failure, refused))


_ACTS: dict[Action, Callable[[Bench, Session], None]] = {
    Action.MAKE_KEY: _make_key,
    Action.INTEND_ORDER: _intend_order,
    Action.PLACE_ORDER: _place_order,
    Action.LOOK: _look,
    Action.PUBLISH_CHALLENGES: _publish_challenges,
    Action.ANSWER_CHALLENGES: _answer_challenges,
    Action.NOTE_AUTHORIZED: _note_authorized,
    Action.PROVE_AGAIN: _prove_again,
    Action.INTEND_FINALIZE: _intend_finalize,
    Action.FINALIZE: _finalize,
    Action.NOTE_ISSUED: _note_issued,
    Action.DOWNLOAD: _download,
    Action.ACTIVATE: _activate,
    Action.WAIT: _wait,
    Action.EXPLAIN_FAILURE: _explain_failure,
}


# -- what actions share -------------------------------------------------------------------------------


def _still_wanted(bench: Bench, session: Session) -> bool:
    """Say whether to order; what nobody wants any more is closed before it costs anything."""
    if bench.db.read(lambda tx: lineages.is_wanted(tx, session.lineage.id)):
        return True
    now = bench.clock()
    session.issuance = bench.db.write(lambda tx: cancel(tx, session, now))
    return False


def _fetch_authorizations(
    bench: Bench, session: Session, account: Account, known: Mapping[str, Authorization] = _NOTHING_KNOWN
) -> tuple[Authorization, ...]:
    """Return the order's authorizations; the CA is asked for those that are not `known`, by URL."""
    assert session.order is not None
    urls = session.order.authorization_urls
    return tuple(known.get(url) or bench.client.fetch_authorization(account, url) for url in urls)


def _token_of(authorization: Authorization) -> str:
    """Return the token to publish; whatever else a CA sends must never reach the responder."""
    challenge = authorization.http01()
    if challenge is None:
        offered = ", ".join(sorted({c.type for c in authorization.challenges})) or "nothing"
        raise AnswerFault(authorization.url, f"{authorization.dns_name}: no http-01 challenge, the CA offers {offered}")
    if not _TOKEN.fullmatch(challenge.token):
        raise AnswerFault(authorization.url, "the challenge's token is not 22 to 128 base64url characters")
    return challenge.token


def _check(bench: Bench, session: Session, chain_pem: str, now: datetime) -> Chain:
    spki, private_ca = session.issuance.spki_sha256, bench.accounts.registration.private_ca
    assert spki is not None
    return check_chain(chain_pem, spki_sha256=spki, dns_names=session.dns_names, now=now, private_ca=private_ca)


def _has_expired(session: Session, now: datetime) -> bool:
    """Say whether the CA may forget the order by now."""
    expires_at = session.issuance.order_expires_at
    return expires_at is not None and expires_at <= now
