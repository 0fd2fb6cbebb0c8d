"""What a failure leads to: once more later, without a name, with another order, or not before a person acts.

The class of a failure says who acts and how patient we are (`core.retry`); whose trouble it is decides who
is told: one issuance, the account, or everybody who asks this CA (`gate`).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.ca.problems import classify
from certworker.core.budget import Charge, Limits, charges_of_order, of_certificates, validations_bucket
from certworker.core.certificate import Validity
from certworker.core.issuance import POLLING, REST, State, may_leave_out, wait_for
from certworker.core.names import names_hash
from certworker.core.renewal import Reason, Wait, decide_renewal, drops_replaces, is_urgent
from certworker.core.retry import Endpoint, ErrorClass, Failure, names_refused, retry_at
from certworker.errors import AccountGone, CaError, InputError, ProblemReported, SealError
from certworker.steps.session import Bench, Session
from certworker.store import budget, certificates, challenges, issuances, lineages
from certworker.store.budget import Refusal
from certworker.store.certificates import Present
from certworker.store.issuances import Issuance
from certworker.store.lineages import LeftOut, Lineage

MOST_CRASHES = 5
"""Workers in a row that an issuance may cost before it is set aside."""
SUSPECT_CRASHES = 2
"""From so many on it is worked on without another suspect beside it: whoever dies next has shown which one it is."""
_QUARANTINE = timedelta(days=1)
_SAME_NAMES = timedelta(seconds=15)
_GOES_ON = (ErrorClass.TRANSIENT, ErrorClass.RATE_LIMITED)
_ENDS_ORDER = ("certworker:order-lost", "certworker:order-expired")
_CAA = "urn:ietf:params:acme:error:caa"
_NO_NAMES: Mapping[str, Failure] = {}


def meet(bench: Bench, session: Session, error: CaError, doing: Endpoint) -> None:
    """Record what the CA, or the way to it, has answered instead of what was asked."""
    failure = classify(error, doing)
    try:
        if _goes_on_at_once(bench, session, error):
            return
    except AccountGone as gone:
        give_up_account(bench, session, gone)
        return
    except (InputError, SealError) as unusable:
        give_up_key(bench, session, unusable)
        return
    except CaError as other:  # the CA cannot be asked for the account either
        error, failure = other, classify(other, Endpoint.ACCOUNT)
    if not error.told:
        error.told = True
        bench.gate.failed(failure, session.lineage.id)
    if failure.error_class in _GOES_ON and failure.type not in _ENDS_ORDER:
        put_off(bench, session, failure)
    else:
        refused = names_refused(session.dns_names, error.problem) if isinstance(error, ProblemReported) else _NO_NAMES
        fail(bench, session, *look_for_ourselves(bench, session, failure, refused))


def look_for_ourselves(
    bench: Bench, session: Session, failure: Failure, refused: Mapping[str, Failure]
) -> tuple[Failure, Mapping[str, Failure]]:
    """Add what DNS says here to the hint of a failed validation, for one name: looking takes time."""
    if failure.error_class is not ErrorClass.VALIDATION:
        return failure, refused
    name = next((name for name, why in sorted(refused.items()) if why.type == failure.type), session.dns_names[0])
    seen = f"; seen from here, {name}: "
    if failure.type == _CAA:
        seen += str(bench.look_up_caa(name))
        if session.account is not None:
            seen += f"; our account, for accounturi (RFC 8657 §3), is {session.account.url}"
    else:
        seen += str(bench.look_up(name))
    told = {name: replace(refused[name], hint=refused[name].hint + seen)} if name in refused else {}
    return replace(failure, hint=failure.hint + seen), {**refused, **told}


def _goes_on_at_once(bench: Bench, session: Session, error: CaError) -> bool:
    """Mend what we can mend ourselves; the same action is taken again with what is different now."""
    row = session.issuance
    if not isinstance(error, ProblemReported):
        return False
    if row.state == State.ORDER_INTENT and row.replaces is not None and drops_replaces(error.problem):
        # The CA has its reasons not to see a renewal in it: an order like any other is as good (RFC 9773 §5).
        session.issuance = bench.db.write(lambda tx: _drop_replaces(tx, bench, session))
        return True
    if row.account_id is None or session.account is None or session.recovered:
        return False
    # Another process may have changed the account's key; or the CA has lost it, and gets it back. Asked with what
    # was refused, not with what is open by now: another thread may have found out already.
    session.recovered = bench.accounts.recover(row.account_id, session.account, error.problem.code)
    return session.recovered


def _drop_replaces(tx: Connection, bench: Bench, session: Session) -> Issuance:
    """Go on as a new order, which the CA counts as one."""
    row, now = session.issuance, bench.clock()
    for charge in of_certificates(_charges_again(tx, bench, session, None)):
        budget.charge(tx, bench.accounts.directory_url, charge.bucket, row.account_id or "", charge.limit, now)
    return issuances.record(tx, row, now, replaces=None)


def give_up_account(bench: Bench, session: Session, gone: AccountGone) -> None:
    """Close an issuance whose account is used no more: its order can be reached with no other one."""
    hint = "a new order is made with the account that is used now; see `certworker account list`"
    fail(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:account-gone", str(gone), hint))


def give_up_key(bench: Bench, session: Session, unusable: InputError | SealError) -> None:
    """Close an issuance whose own key, or its account's, cannot be used."""
    hint = "mend the row or the setting that it names; then `certworker renew`"
    fail(bench, session, Failure(ErrorClass.ACTION_REQUIRED, "certworker:key", str(unusable), hint))


def refuse_chain(bench: Bench, session: Session, failure: Failure) -> None:
    """A wrong chain is downloaded once more, in case it was damaged on the way; then the CA means it."""
    if (session.issuance.error or {}).get("type") != failure.type:
        put_off(bench, session, replace(failure, error_class=ErrorClass.TRANSIENT))
    else:
        fail(bench, session, failure)


def put_off(bench: Bench, session: Session, failure: Failure) -> None:
    """Keep the issuance; the same action is taken again when the failure's class says."""
    now, failures = bench.clock(), session.issuance.failures + 1
    attempt_at = retry_at(failure, failures, now, bench.draw(), session.lineage.validity)
    error = describe(failure, now, attempt_at)
    _release(bench, session, attempt_at, error, failures)


def put_off_bug(bench: Bench, session: Session, said: str) -> None:
    """Put an issuance off that met a fault of our own, so that it neither spins nor blocks the others."""
    hint = "this is a bug in certworker: see the log, and report it"
    put_off(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:bug", said, hint))


def await_budget(bench: Bench, session: Session, refusal: Refusal) -> None:
    """Wait until the rate ledger lets this order through; nothing has failed."""
    limit, _, of = refusal.bucket.partition(":")
    detail = f"our own limit {limit!r} for this CA is used up"
    if of:
        detail += f" for {of if limit in ('domain', 'validations') else ', '.join(session.dns_names[:5])}"
    hint = "nothing to do: it goes on by itself; to change the limit see ACME_RATE_LIMITS"
    failure = Failure(ErrorClass.RATE_LIMITED, "certworker:budget", detail, hint)
    error = describe(failure, bench.clock(), refusal.until, asked_by="ledger")
    # What the lineage's last failure was is still what a person has to know.
    _release(bench, session, refusal.until, error, session.issuance.failures, shown=session.lineage.error is None)


def await_same_names(bench: Bench, session: Session) -> None:
    """Wait for another issuance that orders the very same names: the CA might give both one order."""
    now = bench.clock()
    detail = "another certificate for the same names is being ordered"
    failure = Failure(ErrorClass.TRANSIENT, "certworker:same-names", detail, "nothing to do: it is next")
    attempt_at = now + _SAME_NAMES
    _release(bench, session, attempt_at, describe(failure, now, attempt_at), session.issuance.failures)


def await_ca(bench: Bench, session: Session) -> None:
    """Look again when a busy CA says, or soon and then ever more rarely (RFC 8555 §7.5.1)."""
    retry_after = session.order.retry_after if session.order is not None else None
    now = bench.clock()
    if session.order_has_expired(now):
        detail = "the CA never finished the order before it expired"
        hint = "a new order is made; ask the CA if this lasts"
        fail(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:order-expired", detail, hint))
        return
    wait = _next_look(bench, session, retry_after)
    if not session.looks:
        session.first_wait = wait
    session.wait_until = now + (wait if now - session.issuance.state_at < POLLING else max(wait, REST))
    session.order = None


def _next_look(bench: Bench, session: Session, retry_after: timedelta | None) -> timedelta:
    """Return how long to wait: as the CA says, or else as it turned out before.

    Its fetch of the token is news that it did not have when it said so: it is looked at once, soon after that.
    """
    if retry_after is not None and not (session.fetched and session.looks == 0):
        return wait_for(retry_after, session.looks)
    if session.issuance.state == State.FINALIZING:
        return bench.paces.certificate.wait(session.looks)
    return bench.paces.verdict.wait(session.looks) if session.fetched else wait_for(None, session.looks)


def await_proxies(bench: Bench, session: Session, unready: str) -> None:
    """Keep an order whose challenges not every proxy can answer: a CA that looked now would fail the name."""
    hint = "the order waits: see `certworker node list` for the node, or remove one that is gone for good"
    put_off(bench, session, Failure(ErrorClass.TRANSIENT, "certworker:proxies", unready, hint))


def await_start(bench: Bench, session: Session, validity: Validity, takes_over_at: datetime) -> None:
    """Keep a certificate that is not valid yet, until it takes over from the one that serves."""
    detail = f"the CA's new certificate is valid from {_shown(validity.not_before)} only"
    hint = "nothing to do: it serves then; if that is not what it should say, check this machine's clock"
    failure = Failure(ErrorClass.TRANSIENT, "certworker:not-yet-valid", detail, hint)
    error = describe(failure, bench.clock(), takes_over_at)
    _release(bench, session, takes_over_at, error, session.issuance.failures)


def quarantine(bench: Bench, session: Session) -> None:
    """Set an issuance aside that was in the hands of several workers when they died."""
    now = bench.clock()
    detail = f"{session.issuance.crashes} workers in a row ended while they worked on it, in state "
    hint = "see the workers' logs around that time, and report it; `certworker renew NAME` tries it once more"
    failure = Failure(ErrorClass.ACTION_REQUIRED, "certworker:quarantined", detail + session.issuance.state, hint)
    attempt_at = now + _QUARANTINE
    _release(bench, session, attempt_at, describe(failure, now, attempt_at), session.issuance.failures)


def _release(
    bench: Bench, session: Session, attempt_at: datetime, error: dict[str, str | None], failures: int,
    *, shown: bool = True,
) -> None:  # fmt: skip
    now = bench.clock()
    urgent = session.is_urgent(now)

    def release(tx: Connection) -> Issuance:
        if shown:
            lineages.record_error(tx, session.lineage.id, error, now)  # first, as everybody locks them
        return issuances.release(
            tx, session.issuance, attempt_at, now, failures=failures, error=error, urgent=urgent, crashes=0
        )

    session.issuance = bench.db.write(release)
    session.wait_until = attempt_at


def fail(bench: Bench, session: Session, failure: Failure, refused: Mapping[str, Failure] = _NO_NAMES) -> None:
    """Close the issuance, or go on without the names that were `refused` if that helps the others.

    The lineage tries anew with another issuance, when the failure's class says.
    """
    now = bench.clock()
    session.issuance = bench.db.write(lambda tx: _fail(tx, bench, session, failure, refused, now))
    session.look_anew()


def _fail(
    tx: Connection, bench: Bench, session: Session, failure: Failure, refused: Mapping[str, Failure], now: datetime
) -> Issuance:
    row = session.issuance
    for state in (State.FAILED, State.QUEUED):
        if (recorded := issuances.find_recorded(tx, row, state)) is not None:
            return recorded
    _give_back_tokens(tx, bench, session, now)
    lineage = lineages.lock(tx, session.lineage.id) or session.lineage
    challenges.withdraw(tx, [row.id])
    _charge_validations(tx, bench, row, refused, now)
    if _may_leave_out(tx, session, lineage, refused, now):
        return _leave_out(tx, bench, session, lineage, refused, now)
    failures = lineage.failures + 1
    next_check_at = retry_at(failure, failures, now, bench.draw(), lineage.validity)
    error = describe(failure, now, next_check_at)
    lineages.record_failure(tx, lineage.id, error, failures=failures, next_check_at=next_check_at, now=now)
    return issuances.close(tx, row, State.FAILED, now, error=error)


_BEFORE_FINALIZE = frozenset([State.ORDER_INTENT, State.ORDERED, State.VALIDATING])


def charges_of(
    limits: Limits, lineage: Lineage, dns_names: Collection[str], present: Present | None,
    *, urgent: bool, replaces: str | None,
) -> tuple[Charge, ...]:  # fmt: skip
    """Return what an order for these names asks of the rate ledger, of a lineage whose certificate is `present`."""
    renewal = present is not None and set(dns_names) <= set(present.dns_names or ())
    validity = lineage.validity
    return charges_of_order(
        limits, dns_names, names_hash(dns_names), urgent=urgent, replaces=replaces, renewal=renewal,
        lifetime=None if validity is None else validity.lifetime,
    )  # fmt: skip


def _charges_again(tx: Connection, bench: Bench, session: Session, replaces: str | None) -> tuple[Charge, ...]:
    """Return what the order of this issuance asked of the ledger, or asks without `replaces`."""
    present = certificates.of_lineages(tx, [session.lineage.id]).get(session.lineage.id)
    urgent = session.issuance.urgent
    return charges_of(bench.limits, session.lineage, session.dns_names, present, urgent=urgent, replaces=replaces)


def _give_back_tokens(tx: Connection, bench: Bench, session: Session, now: datetime) -> None:
    """Take back what was debited for a certificate that there will not be: CAs count certificates, not tries."""
    row = session.issuance
    if row.state in _BEFORE_FINALIZE and row.account_id is not None:
        charges = of_certificates(_charges_again(tx, bench, session, row.replaces))
        budget.give_back(tx, bench.accounts.directory_url, charges, row.account_id, now)


def _charge_validations(
    tx: Connection, bench: Bench, row: Issuance, refused: Mapping[str, Failure], now: datetime
) -> None:
    """Count failed validations: a CA does too, and locks a name out that fails too often."""
    limit = bench.limits.validations
    failed = sorted(name for name, why in refused.items() if why.error_class is ErrorClass.VALIDATION)
    if limit is not None and row.account_id is not None:
        for name in failed:
            budget.charge(tx, bench.accounts.directory_url, validations_bucket(name), row.account_id, limit, now)


# -- names that are left out --------------------------------------------------------------------------


def _may_leave_out(
    tx: Connection, session: Session, lineage: Lineage, refused: Mapping[str, Failure], now: datetime
) -> bool:
    if not refused or len(session.dns_names) == 1:
        return False
    serving = certificates.find_of_lineage(tx, lineage.id)
    served = frozenset(serving.dns_names or ()) if serving is not None and serving.expires_at > now else frozenset()
    urgent = is_urgent(now, lineage.validity)
    return may_leave_out(frozenset(session.dns_names), frozenset(refused), served, lineage.failures, urgent=urgent)


def _leave_out(
    tx: Connection, bench: Bench, session: Session, lineage: Lineage, refused: Mapping[str, Failure], now: datetime
) -> Issuance:
    """Go on with the other names; those refused stay wanted, and are ordered again later."""
    row = session.issuance
    before = {name.dns_name: name.failures for name in lineages.left_out(tx, lineage.id)}
    draw = bench.draw()  # one for all: they are tried again together, by one order
    names = [_left_out(name, why, before.get(name, 0) + 1, now, draw) for name, why in sorted(refused.items())]
    lineages.leave_out(tx, lineage.id, names, now)
    if row.reason == Reason.NAMES_MISSING and isinstance(decide_renewal(now, lineage.validity, lineage.renew_at), Wait):
        # It was a try for these names only, and the others have what they need.
        lineages.set_next_check(tx, lineage.id, now, now)
        return issuances.close(tx, row, State.FAILED, now, error=names[0].error)
    remaining = [name for name in session.dns_names if name not in refused]
    # That order is dead, so its key has never been in a certificate: another key for other names.
    return issuances.record(
        tx, row, now, state=State.QUEUED, dns_names=remaining, names_hash=None, key_pem=None, csr_der=None,
        spki_sha256=None, account_id=None, replaces=None, order_url=None, finalize_url=None, order_expires_at=None,
        failures=0, error=None,
    )  # fmt: skip


def _left_out(dns_name: str, failure: Failure, failures: int, now: datetime, draw: float) -> LeftOut:
    probe_at = retry_at(failure, failures, now, draw)
    return LeftOut(dns_name, failures, probe_at, dict(describe(failure, now, probe_at)))


def describe(
    failure: Failure, now: datetime, retry_at_: datetime | None, asked_by: str | None = None
) -> dict[str, str | None]:
    """Return a failure as it is kept in `error` columns and shown by `status`."""
    return {
        "class": failure.error_class.value, "type": failure.type, "detail": failure.detail, "hint": failure.hint,
        "at": _shown(now), "retry_at": None if retry_at_ is None else _shown(retry_at_),
        "asked_by": asked_by if failure.retry_after is None else "ca", "scope": failure.scope.value,
    }  # fmt: skip


def _shown(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
