"""One issuance, moved forward one action at a time: at most one act at the CA, then one commit.

What happens next is decided by `core.issuance.next_action` from what is committed and from what the
CA says of the order. Here each action is carried out and recorded. No transaction is open while we
wait for the CA.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Any

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
from certworker.steps.session import Bench, Session, Turn, account_of, cancel, cancel_unlinked, give_back, record
from certworker.store import budget, certificates, challenges, issuances, lineages, renewal_info
from certworker.store.budget import Refusal
from certworker.store.certificates import Activation
from certworker.store.issuances import Change, Issuance
from certworker.store.journal import Kind
from certworker.store.lineages import NewCertificate
from certworker.store.rows import new_id

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


def _intend_order(bench: Bench, session: Session) -> None:
    """Make the key, debit the rate ledger and fix everything that the order says."""
    account_id = bench.accounts.used()
    informs = bench.client.directory().renewal_info is not None
    intent = _Intent(bench, session, account_id, informs, bench.clock(), _make_key(bench, session))
    intended = bench.journal.write(_INTEND, intent)
    match intended:
        case Issuance():
            session.issuance, session.intended = intended, True
        case Refusal():
            trouble.await_budget(bench, session, intended)
        case _Not.OTHER_ACCOUNT:
            bench.accounts.look_again()
        case _Not.SAME_NAMES:
            trouble.await_same_names(bench, session)


def _make_key(bench: Bench, session: Session) -> dict[str, Any]:
    """Return the columns of a new key and its CSR."""
    names = session.issuance.dns_names or _names_to_order(bench, session)
    key = csr.make_key(session.lineage.key_type)
    sealed = bench.sealer.seal(csr.key_to_pem(key), table="issuances", column="key_pem", row_id=session.issuance.id)
    return {
        "key_pem": sealed, "csr_der": csr.make_csr(key, names), "spki_sha256": csr.spki_sha256(key.public_key()),
        "dns_names": names, "names_hash": names_hash(names),
    }  # fmt: skip


def _names_to_order(bench: Bench, session: Session) -> list[str]:
    """Return the names that are wanted, but for those that were refused and whose next try is later."""
    now, names = bench.clock(), session.lineage.dns_names
    if len(names) == 1:
        return names
    left_out = bench.db.read(lambda tx: lineages.left_out(tx, session.lineage.id))
    later = {name.dns_name for name in left_out if name.probe_at > now}
    return [name for name in names if name not in later]


class _Not(Enum):
    """Why an order is not intended now."""

    OTHER_ACCOUNT = auto()
    """Orders are made with another account by now, or with another key."""
    SAME_NAMES = auto()
    """Another issuance orders the same names."""


@dataclass(slots=True)
class _Intent:
    """An order that is to be intended."""

    bench: Bench
    session: Session
    account_id: str
    informs: bool
    """Whether the CA offers renewal information, so that it knows the word `replaces`."""
    now: datetime
    key: dict[str, Any]
    tried: bool = False
    """It was written before, in a transaction whose COMMIT may not have been answered."""

    @property
    def lineage_id(self) -> str:
        return self.session.lineage.id


def _intend(tx: Connection, intents: Sequence[_Intent]) -> list[Issuance | Refusal | _Not]:
    """Debit the rate ledger and fix everything that the orders say, in one transaction."""
    if (recorded := _find_recorded(tx, intents, State.ORDER_INTENT)) is not None:
        return [recorded]
    accounts = {intent.account_id for intent in intents}
    used = {account_id for account_id in accounts if intents[0].bench.accounts.is_default(tx, account_id)}
    answers: dict[str, Issuance | Refusal | _Not] = {}
    for account_id in sorted(used):
        ordering = [one for one in intents if one.account_id == account_id]
        answers |= _debit(tx, ordering, account_id, alone=len(intents) == 1)
    return [answers.get(intent.lineage_id, _Not.OTHER_ACCOUNT) for intent in intents]


def _debit(
    tx: Connection, intents: Sequence[_Intent], account_id: str, *, alone: bool
) -> dict[str, Issuance | Refusal | _Not]:  # fmt: skip
    """Do so with the account that orders are made with; return what became of each, by lineage."""
    bench, now = intents[0].bench, max(intent.now for intent in intents)
    replaced = [intent.lineage_id for intent in intents if intent.session.lineage.certificate_id is not None]
    present = certificates.of_lineages(tx, replaced)
    replaces = {intent.lineage_id: _find_replaceable(tx, intent, account_id) for intent in intents}
    charges = {
        intent.lineage_id: trouble.charges_of(
            bench.limits, intent.session.lineage, intent.key["dns_names"], present.get(intent.lineage_id),
            urgent=intent.session.is_urgent(now), replaces=replaces[intent.lineage_id],
        )
        for intent in intents
    }  # fmt: skip
    asked = [charge for of_one in charges.values() for charge in of_one]
    ledger = budget.Ledger(tx, bench.accounts.directory_url, asked, account_id, now)
    refused: dict[str, Refusal] = {}
    changes: dict[str, Change] = {}
    for intent in intents:
        lineage_id = intent.lineage_id
        if (refusal := ledger.spend(charges[lineage_id])) is not None:
            refused[lineage_id] = refusal
        else:
            changes[lineage_id] = issuances.change(
                intent.session.issuance, intent.now, state=State.ORDER_INTENT, account_id=account_id,
                replaces=replaces[lineage_id], urgent=intent.session.is_urgent(now), failures=0, error=None,
                **intent.key,
            )  # fmt: skip
    # Every order of these names waits for the same bucket's row: what is committed of the others is all there is.
    recorded = issuances.record_intents(tx, list(changes.values()), alone=alone)
    if recorded is None:
        return {intents[0].lineage_id: _why_not(tx, intents[0], changes[intents[0].lineage_id])}
    ledger.write()
    wanted = lineages.wanted_among(tx, refused)
    unwanted = [one for one in intents if one.lineage_id in refused and one.lineage_id not in wanted]
    cancelled = {one.lineage_id: cancel(tx, one.session, one.now) for one in unwanted}
    return {**refused, **cancelled, **dict(zip(changes, recorded, strict=True))}


def _why_not(tx: Connection, intent: _Intent, intended: Change) -> Issuance | _Not:
    """Say why an order was not written; one that nobody wants any more is closed before it costs anything."""
    if not lineages.is_wanted(tx, intent.lineage_id):
        return cancel(tx, intent.session, intent.now)
    claimed = intent.session.issuance
    if issuances.is_ordered(tx, intended) or issuances.is_claimed(tx, claimed):
        return _Not.SAME_NAMES  # if only until this moment
    raise issuances.lease_lost(claimed)


_INTEND = Kind(Turn.INTEND, _intend)


def _find_replaceable(tx: Connection, intent: _Intent, account_id: str) -> str | None:
    if not intent.informs or intent.session.lineage.renewal_id is None:
        return None
    return renewal_info.find_replaceable(tx, intent.lineage_id, account_id, intent.now)


def _place_order(bench: Bench, session: Session) -> None:
    asked_just_now, session.intended = session.intended, False  # for one try: the next may be much later
    if not asked_just_now and not _still_wanted(bench, session):
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
    session.looks += 1
    if session.order.status is OrderStatus.INVALID:
        session.authorizations = None  # one of them has changed


def _intend_finalize(bench: Bench, session: Session) -> None:
    if session.fetched:
        bench.paces.verdict.learn(session.looks, session.first_wait)
    session.looks, session.fetched, session.authorizations = 0, False, None
    session.issuance = bench.journal.write(_FINALIZE, (session, bench.clock()))


def _intend_finalizing(tx: Connection, asked: Sequence[tuple[Session, datetime]]) -> list[Issuance]:
    """Fix that these are to be finalized, if still wanted: they would be thrown away, and count all the same."""
    changes = [
        issuances.change(session.issuance, now, state=State.FINALIZING, failures=0, error=None)
        for session, now in asked
    ]
    intended = issuances.record_linked(tx, changes)
    if intended is not None:
        return intended
    ((session, now),) = asked
    if lineages.is_linked(tx, session.lineage.id):
        return issuances.record_all(tx, changes)  # linked again in this very moment; or its lease is lost, it says then
    return [cancel(tx, session, now)]


_FINALIZE = Kind(Turn.FINALIZE, _intend_finalizing)


def _finalize(bench: Bench, session: Session) -> None:
    row, order = session.issuance, session.order
    assert order is not None
    assert row.csr_der is not None
    finalize_url = row.finalize_url or order.finalize_url
    session.order = bench.client.finalize(account_of(bench, session), finalize_url, row.csr_der, order.url)
    if session.order.status is OrderStatus.READY:
        trouble.await_ca(bench, session)  # it took no notice; the next look says whether to finalize again


def _download(bench: Bench, session: Session) -> None:
    """Fetch the chain and let it serve; one that is not valid yet is kept until then."""
    assert session.order is not None
    url = session.order.certificate_url
    if url is None:
        raise AnswerFault(session.order.url, "the order is valid but names no certificate")
    if session.looks:
        bench.paces.certificate.learn(session.looks, session.first_wait)
    text, now = bench.client.fetch_chain(account_of(bench, session), url), bench.clock()
    try:
        chain = _check(bench, session, text, now)
    except ChainUnreadable as error:
        # Nobody knows what it is, so the order may be as good as any other: it is downloaded again while it lives.
        if session.order_has_expired(now):
            raise
        raise AnswerFault(url, f"{error}; {quote_damaged(text.encode())}") from error
    leaf = chain.leaf
    downloaded = {
        "certificate_url": url, "chain_pem": chain.pem, "serial": leaf.serial, "fingerprint": leaf.fingerprint,
        "not_before": leaf.validity.not_before, "not_after": leaf.validity.not_after,
    }  # fmt: skip
    if _takes_over_at(session, chain, now) > now:
        record(bench, session, State.DOWNLOADED, **downloaded)
    else:
        _switch(bench, session, chain, downloaded)


def _activate(bench: Bench, session: Session) -> None:
    """Let a chain serve that was kept."""
    assert session.issuance.chain_pem is not None
    now = bench.clock()
    chain = _check(bench, session, session.issuance.chain_pem, now)
    takes_over_at = _takes_over_at(session, chain, now)
    if takes_over_at > now:
        trouble.await_start(bench, session, chain.leaf.validity, takes_over_at)
    else:
        _switch(bench, session, chain, {})


def _takes_over_at(session: Session, chain: Chain, now: datetime) -> datetime:
    return takes_over_at(chain.leaf.validity, session.lineage.validity, now)


def _switch(bench: Bench, session: Session, chain: Chain, downloaded: Mapping[str, Any]) -> None:
    """Let the new certificate serve, and close the issuance with what was `downloaded` just now."""
    key_pem, now = session.issuance.key_pem, bench.clock()
    assert key_pem is not None
    plain = bench.sealer.open(key_pem, table="issuances", column="key_pem", row_id=session.issuance.id)
    session.issuance = bench.journal.write(_ACTIVATE, _Activation(bench, session, chain, plain, downloaded, now))
    bench.gate.issued()
    usable, present = chain.leaf.validity.usable_from(now), session.lineage.validity
    if session.issuance.state == State.DONE and is_odd_life(usable, present):
        life = {"life": str(usable.lifetime), "before": str(present.lifetime) if present else None}
        _log.warning("certificate.odd_life", extra={"names": session.dns_names, **life})


@dataclass(slots=True)
class _Activation:
    """A new certificate that is to serve."""

    bench: Bench
    session: Session
    chain: Chain
    key_pem: str = field(repr=False)
    downloaded: Mapping[str, Any]
    now: datetime
    tried: bool = False
    """As above."""


def _activate_all(tx: Connection, activations: Sequence[_Activation]) -> list[Issuance]:
    """Let the new certificates serve: certificates, lineages, policies, issuances and audit in one transaction."""
    if (recorded := _find_recorded(tx, activations, State.DONE)) is not None:
        return [recorded]
    lineages.lock_all(tx, [one.session.lineage.id for one in activations])
    closings = [
        issuances.closing(one.session.issuance, State.DONE, one.now, error=None, **one.downloaded)
        for one in activations
    ]
    closed = issuances.record_linked(tx, closings)
    if closed is None:
        (one,) = activations
        return [cancel_unlinked(tx, one.session, one.now, **one.downloaded)]
    challenges.withdraw(tx, [issuance.id for issuance in closed])
    _let_serve(tx, activations)
    return closed


_ACTIVATE = Kind(Turn.ACTIVATE, _activate_all)


def _let_serve(tx: Connection, activations: Sequence[_Activation]) -> None:
    now = max(one.now for one in activations)
    present = certificates.of_lineages(tx, [one.session.lineage.id for one in activations])
    news, serving = [], []
    for one in activations:
        lineage, leaf = one.session.lineage, one.chain.leaf
        before = present.get(lineage.id)
        certificate_id = before.id if before is not None else new_id()
        # Counted from now, or a certificate that arrives half used would be renewed at once, again and again.
        usable = leaf.validity.usable_from(one.now)
        renew_at = plan_renewal(usable, lineage.id)
        news.append(NewCertificate(lineage, certificate_id, one.session.issuance.id, leaf, usable, renew_at))
        sealed = one.bench.sealer.seal(one.key_pem, table="certificates", column="key_pem", row_id=certificate_id)
        domain = lineages.first_name(tx, lineage)
        serving.append(Activation(certificate_id, before, lineage.id, domain, one.chain.pem, sealed, leaf))
    flips = lineages.record_certificates(tx, news, now)
    certificates.activate_all(tx, serving, flips, now)


def _find_recorded(
    tx: Connection, asked: Sequence[_Intent] | Sequence[_Activation], state: State
) -> Issuance | None:  # fmt: skip
    """Return what is committed of one that is tried again; of several none is: their claims have moved on then."""
    again = [one for one in asked if one.tried]
    for one in asked:
        one.tried = True
    if not again or len(asked) > 1:
        return None
    return issuances.find_recorded(tx, asked[0].session.issuance, state)


_ACTS: dict[Action, Callable[[Bench, Session], None]] = {
    Action.INTEND_ORDER: _intend_order,
    Action.PLACE_ORDER: _place_order,
    Action.LOOK: _look,
    Action.PUBLISH_CHALLENGES: prove.publish_challenges,
    Action.ANSWER_CHALLENGES: prove.answer_challenges,
    Action.PROVE_AGAIN: prove.prove_again,
    Action.INTEND_FINALIZE: _intend_finalize,
    Action.FINALIZE: _finalize,
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
