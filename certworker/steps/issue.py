"""One issuance, moved forward one action at a time: at most one act at the CA, then one commit.

What happens next is decided by `core.issuance.next_action` from what is committed and from what the
CA says of the order. Here each action is carried out and recorded. No transaction is open while we
wait for the CA.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.ca import csr
from certworker.ca.client import Account, Client
from certworker.ca.problems import classify
from certworker.clock import Clock
from certworker.core.certificate import Chain, check_chain
from certworker.core.issuance import POLLING, REST, Action, State, next_action, to_answer, unproved, wait_for
from certworker.core.order import Authorization, AuthorizationStatus, Order, OrderStatus
from certworker.core.renewal import plan_renewal
from certworker.core.retry import Endpoint, ErrorClass, Failure, classify_order, retry_at
from certworker.errors import AccountGone, AnswerFault, CaError, ChainRefused, InputError, SealError
from certworker.steps.register import Accounts
from certworker.store import certificates, challenges, issuances, lineages
from certworker.store.database import Database
from certworker.store.issuances import Issuance
from certworker.store.lineages import Lineage
from certworker.store.seal import Sealer

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,128}")

_ENDPOINTS = {
    Action.INTEND_ORDER: Endpoint.NEW_ACCOUNT,
    Action.PLACE_ORDER: Endpoint.NEW_ORDER,
    Action.LOOK: Endpoint.ORDER,
    Action.PUBLISH_CHALLENGES: Endpoint.AUTHORIZATION,
    Action.ANSWER_CHALLENGES: Endpoint.CHALLENGE,
    Action.FINALIZE: Endpoint.FINALIZE,
    Action.DOWNLOAD: Endpoint.CERTIFICATE,
    Action.EXPLAIN_FAILURE: Endpoint.AUTHORIZATION,
}


@dataclass(frozen=True, slots=True)
class Bench:
    """What an issuance is made with."""

    db: Database
    client: Client
    accounts: Accounts
    sealer: Sealer
    clock: Clock
    draw: Callable[[], float]
    """Uniform in [0, 1): spreads retries."""
    look_up: Callable[[str], object]
    """What DNS says of a name, as text: for the hint after a failed validation."""
    moved: Callable[["Session"], None]
    """Told after every commit, for logs and progress; must not raise."""


@dataclass(slots=True)
class Session:
    """A claimed issuance in work: the committed row, and what the CA said since it was claimed."""

    issuance: Issuance
    lineage: Lineage
    order: Order | None = None
    """None: look first."""
    authorizations: tuple[Authorization, ...] | None = None
    looks: int = 0
    """How often the CA was busy in a row."""
    wait_until: datetime | None = None
    """Set by `advance`: nothing to do before."""

    @property
    def tokens(self) -> list[str]:
        """The tokens that the CA fetches while this issuance waits."""
        offered = (a.http01() for a in self.authorizations or ())
        return [challenge.token for challenge in offered if challenge is not None]


def advance(bench: Bench, session: Session) -> None:
    """Take the next action of an open issuance; afterwards it is closed, waits, or has moved.

    Raises LeaseLost when another worker owns it, StoreError when the database cannot be written.
    """
    session.wait_until = None
    before = session.issuance
    action = next_action(State(session.issuance.state), session.order)
    try:
        _ACTS[action](bench, session)
    except AccountGone as error:
        _fail(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:account-gone", str(error), _ACCOUNT_GONE))
    except (InputError, SealError) as error:
        _fail(bench, session, Failure(ErrorClass.ACTION_REQUIRED, "certworker:key", str(error), _KEY_UNUSABLE))
    except ChainRefused as error:
        _refuse_chain(bench, session, classify(error, Endpoint.CERTIFICATE))
    except CaError as error:
        _meet(bench, session, classify(error, _ENDPOINTS.get(action, Endpoint.ORDER)))
    if session.issuance is not before:
        bench.moved(session)


# -- actions, in the order of a life ------------------------------------------------------------------


def _make_key(bench: Bench, session: Session) -> None:
    key = csr.make_key(session.lineage.key_type)
    sealed = bench.sealer.seal(csr.key_to_pem(key), table="issuances", column="key_pem", row_id=session.issuance.id)
    _record(
        bench, session, State.KEY_READY, key_pem=sealed, csr_der=csr.make_csr(key, session.lineage.dns_names),
        spki_sha256=csr.spki_sha256(key.public_key()),
    )  # fmt: skip


def _intend_order(bench: Bench, session: Session) -> None:
    if not _still_wanted(bench, session):
        return
    account_id, _ = bench.accounts.default()
    _record(bench, session, State.ORDER_INTENT, account_id=account_id)


def _place_order(bench: Bench, session: Session) -> None:
    if not _still_wanted(bench, session):
        return
    profile = session.lineage.profile or None
    order = bench.client.new_order(_account(bench, session), session.lineage.dns_names, profile)
    _record(
        bench, session, State.ORDERED, order_url=order.url, finalize_url=order.finalize_url,
        order_expires_at=order.expires_at,
    )  # fmt: skip
    session.order = order


def _look(bench: Bench, session: Session) -> None:
    assert session.issuance.order_url is not None
    session.order = bench.client.fetch_order(_account(bench, session), session.issuance.order_url)


def _publish_challenges(bench: Bench, session: Session) -> None:
    account = _account(bench, session)
    session.authorizations = _fetch_authorizations(bench, session, account)
    offers = [(a, _token_of(a)) for a in unproved(session.authorizations)]
    now = bench.clock()

    def publish(tx: Connection) -> Issuance:
        for authorization, token in offers:
            challenges.publish(
                tx, session.issuance.id, authorization.url, authorization.dns_name, token,
                account.key.key_authorization(token), now,
            )  # fmt: skip
        return issuances.record(tx, session.issuance, now, state=State.PUBLISHED)

    session.issuance = bench.db.write(publish)


def _answer_challenges(bench: Bench, session: Session) -> None:
    account = _account(bench, session)
    if session.authorizations is None:
        session.authorizations = _fetch_authorizations(bench, session, account)
    for challenge in to_answer(session.authorizations):
        bench.client.answer_challenge(account, challenge.url)
    _record(bench, session, State.VALIDATING)
    _wait(bench, session)


def _note_authorized(bench: Bench, session: Session) -> None:
    session.looks = 0
    _record(bench, session, State.AUTHORIZED)


def _intend_finalize(bench: Bench, session: Session) -> None:
    _record(bench, session, State.FINALIZE_INTENT)


def _finalize(bench: Bench, session: Session) -> None:
    row, order = session.issuance, session.order
    assert order is not None
    assert row.csr_der is not None
    finalize_url = row.finalize_url or order.finalize_url
    session.order = bench.client.finalize(_account(bench, session), finalize_url, row.csr_der, order.url)
    if row.state == State.FINALIZE_INTENT:
        session.looks = 0
        _record(bench, session, State.FINALIZING)
    if session.order.status is OrderStatus.READY:
        _wait(bench, session)  # it took no notice; the next look says whether to finalize again


def _note_issued(bench: Bench, session: Session) -> None:
    assert session.order is not None
    if session.order.certificate_url is None:
        raise AnswerFault(session.order.url, "the order is valid but names no certificate")
    _record(bench, session, State.ISSUED, certificate_url=session.order.certificate_url)


def _download(bench: Bench, session: Session) -> None:
    url = session.issuance.certificate_url
    assert url is not None
    text = bench.client.fetch_chain(_account(bench, session), url)
    chain = _check(session, text, bench.clock())
    leaf = chain.leaf
    _record(
        bench, session, State.DOWNLOADED, chain_pem=chain.pem, serial=leaf.serial, fingerprint=leaf.fingerprint,
        not_before=leaf.validity.not_before, not_after=leaf.validity.not_after,
    )  # fmt: skip


def _activate(bench: Bench, session: Session) -> None:
    now = bench.clock()
    chain_pem, key_pem = session.issuance.chain_pem, session.issuance.key_pem
    assert chain_pem is not None
    assert key_pem is not None
    chain = _check(session, chain_pem, now)
    plain = bench.sealer.open(key_pem, table="issuances", column="key_pem", row_id=session.issuance.id)
    session.issuance = bench.db.write(lambda tx: _switch(tx, bench, session, chain, plain, now))


def _switch(tx: Connection, bench: Bench, session: Session, chain: Chain, key_pem: str, now: datetime) -> Issuance:
    """Let the new certificate serve: certificate, lineage, policies, issuance and audit in one transaction."""
    row, lineage = session.issuance, lineages.lock(tx, session.lineage.id)
    if lineage is None or not lineages.is_linked(tx, lineage.id):
        return _cancel(tx, session, now)
    closed = issuances.close(tx, row, State.DONE, now, error=None)
    challenges.withdraw(tx, row.id)
    certificate_id = certificates.id_for_lineage(tx, lineage.id)
    # Counted from now, or a certificate that arrives half used would be renewed at once, again and again.
    usable = chain.leaf.validity.usable_from(now)
    lineages.record_certificate(
        tx, lineage.id, certificate_id=certificate_id, issuance_id=row.id, validity=usable,
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
    expires_at = session.issuance.order_expires_at
    now = bench.clock()
    if expires_at is not None and expires_at <= now:
        _fail(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:order-expired", "the CA never finished the "
              "order before it expired", "a new order is made; ask the CA if this lasts"))  # fmt: skip
        return
    wait = wait_for(retry_after, session.looks)
    session.wait_until = now + (wait if now - session.issuance.state_at < POLLING else max(wait, REST))
    session.looks += 1
    session.order = None


def _explain_failure(bench: Bench, session: Session) -> None:
    assert session.order is not None
    authorizations = _fetch_authorizations(bench, session, _account(bench, session))
    failure = classify_order(session.order, authorizations)
    if failure.error_class is ErrorClass.VALIDATION:
        refused = next((a.dns_name for a in authorizations if a.status is AuthorizationStatus.INVALID), None)
        name = refused or session.lineage.dns_names[0]
        failure = replace(failure, hint=f"{failure.hint}; seen from here, {name}: {bench.look_up(name)}")
    _fail(bench, session, failure)


_ACTS: dict[Action, Callable[[Bench, Session], None]] = {
    Action.MAKE_KEY: _make_key,
    Action.INTEND_ORDER: _intend_order,
    Action.PLACE_ORDER: _place_order,
    Action.LOOK: _look,
    Action.PUBLISH_CHALLENGES: _publish_challenges,
    Action.ANSWER_CHALLENGES: _answer_challenges,
    Action.NOTE_AUTHORIZED: _note_authorized,
    Action.INTEND_FINALIZE: _intend_finalize,
    Action.FINALIZE: _finalize,
    Action.NOTE_ISSUED: _note_issued,
    Action.DOWNLOAD: _download,
    Action.ACTIVATE: _activate,
    Action.WAIT: _wait,
    Action.EXPLAIN_FAILURE: _explain_failure,
}


# -- what actions share -------------------------------------------------------------------------------


def _record(bench: Bench, session: Session, state: State, **values: object) -> None:
    now = bench.clock()
    session.issuance = bench.db.write(
        lambda tx: issuances.record(tx, session.issuance, now, state=state, failures=0, error=None, **values)
    )


def _still_wanted(bench: Bench, session: Session) -> bool:
    """Say whether to order; what nobody wants any more is closed before it costs anything."""
    if bench.db.read(lambda tx: lineages.is_wanted(tx, session.lineage.id)):
        return True
    now = bench.clock()
    session.issuance = bench.db.write(lambda tx: _cancel(tx, session, now))
    return False


def _cancel(tx: Connection, session: Session, now: datetime) -> Issuance:
    challenges.withdraw(tx, session.issuance.id)
    # The scan takes it out, or queues it anew if somebody wants it again.
    lineages.set_next_check(tx, session.lineage.id, now, now)
    return issuances.close(tx, session.issuance, State.CANCELLED, now)


def _account(bench: Bench, session: Session) -> Account:
    """Return the account the order is made with; AccountGone if another program has deleted it."""
    return bench.accounts.get(session.issuance.account_id or "")


def _fetch_authorizations(bench: Bench, session: Session, account: Account) -> tuple[Authorization, ...]:
    assert session.order is not None
    return tuple(bench.client.fetch_authorization(account, url) for url in session.order.authorization_urls)


def _token_of(authorization: Authorization) -> str:
    """Return the token to publish; whatever else a CA sends must never reach the responder."""
    challenge = authorization.http01()
    if challenge is None:
        offered = ", ".join(sorted({c.type for c in authorization.challenges})) or "nothing"
        raise AnswerFault(authorization.url, f"{authorization.dns_name}: no http-01 challenge, the CA offers {offered}")
    if not _TOKEN.fullmatch(challenge.token):
        raise AnswerFault(authorization.url, "the challenge's token is not 22 to 128 base64url characters")
    return challenge.token


def _check(session: Session, chain_pem: str, now: datetime) -> Chain:
    spki = session.issuance.spki_sha256
    assert spki is not None
    return check_chain(chain_pem, spki_sha256=spki, dns_names=session.lineage.dns_names, now=now)


# -- trouble ------------------------------------------------------------------------------------------

_GOES_ON = (ErrorClass.TRANSIENT, ErrorClass.RATE_LIMITED)
_KEY_UNUSABLE = "mend the row or the setting that it names; then `certworker renew`"
_ACCOUNT_UNKNOWN = "urn:ietf:params:acme:error:accountDoesNotExist"
_ACCOUNT_GONE = "a new order is made with the account that is used now; see acme_accounts"
_ENDS_ORDER = ("certworker:order-lost", "certworker:order-expired")


def _meet(bench: Bench, session: Session, failure: Failure) -> None:
    """Record trouble; a CA that cannot be asked for the account either is trouble of its own."""
    try:
        _record_trouble(bench, session, failure)
    except CaError as error:
        _put_off(bench, session, classify(error, Endpoint.ACCOUNT))


def _record_trouble(bench: Bench, session: Session, failure: Failure) -> None:
    """Keep the issuance and try the same action later, or close it if that cannot help."""
    if failure.type == _ACCOUNT_UNKNOWN and bench.accounts.recover(session.issuance.account_id or ""):
        _fail(bench, session, replace(failure, error_class=ErrorClass.TRANSIENT, hint=_ACCOUNT_GONE))
        return
    if failure.error_class in _GOES_ON and failure.type not in _ENDS_ORDER:
        _put_off(bench, session, failure)
    else:
        _fail(bench, session, failure)


def _refuse_chain(bench: Bench, session: Session, failure: Failure) -> None:
    """A wrong chain is downloaded once more, in case it was damaged on the way; then the CA means it."""
    if (session.issuance.error or {}).get("type") != failure.type:
        _put_off(bench, session, replace(failure, error_class=ErrorClass.TRANSIENT))
    else:
        _fail(bench, session, failure)


def _put_off(bench: Bench, session: Session, failure: Failure) -> None:
    now, failures = bench.clock(), session.issuance.failures + 1
    attempt_at = retry_at(failure, failures, now, bench.draw())
    error = describe(failure, now, attempt_at)

    def put_off(tx: Connection) -> Issuance:
        released = issuances.release(tx, session.issuance, attempt_at, now, failures=failures, error=error)
        lineages.record_error(tx, session.lineage.id, error, now)
        return released

    session.issuance = bench.db.write(put_off)
    session.wait_until = attempt_at


def _fail(bench: Bench, session: Session, failure: Failure) -> None:
    """Close the issuance; the lineage tries anew with another one, when the failure's class says."""
    now = bench.clock()

    def fail(tx: Connection) -> Issuance:
        lineage = lineages.lock(tx, session.lineage.id) or session.lineage
        failures = lineage.failures + 1
        next_check_at = retry_at(failure, failures, now, bench.draw())
        error = describe(failure, now, next_check_at)
        closed = issuances.close(tx, session.issuance, State.FAILED, now, error=error)
        challenges.withdraw(tx, session.issuance.id)
        lineages.record_failure(tx, lineage.id, error, failures=failures, next_check_at=next_check_at, now=now)
        return closed

    session.issuance = bench.db.write(fail)


def put_off_bug(bench: Bench, session: Session, said: str) -> None:
    """Put an issuance off that met a fault of our own, so that it neither spins nor blocks the others."""
    hint = "this is a bug in certworker: see the log, and report it"
    _put_off(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:bug", said, hint))


def describe(failure: Failure, now: datetime, retry_at_: datetime | None) -> dict[str, str | None]:
    """Return a failure as it is kept in `error` columns and shown by `status`."""
    return {
        "class": failure.error_class.value, "type": failure.type, "detail": failure.detail, "hint": failure.hint,
        "at": _shown(now), "retry_at": None if retry_at_ is None else _shown(retry_at_),
        "asked_by": None if failure.retry_after is None else "ca",
    }  # fmt: skip


def _shown(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def open_session(db: Database, issuance: Issuance) -> Session:
    """Return a claimed issuance ready for `advance`."""
    lineage = db.read(lambda tx: lineages.find(tx, issuance.lineage_id))
    assert lineage is not None, "issuances.lineage_id is a foreign key"
    return Session(issuance, lineage)


LONGEST_HOLD = timedelta(seconds=30)
"""A lease is kept through a wait up to this; a longer one is given back."""


def give_back(bench: Bench, session: Session, attempt_at: datetime) -> None:
    """Release an issuance that waits for the CA; whoever claims it next looks first."""
    now = bench.clock()
    session.issuance = bench.db.write(lambda tx: issuances.release(tx, session.issuance, attempt_at, now))
