"""An order's names are proved: answers published, the CA told to look, and what it found (RFC 8555 §7.5, §8.3)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from certworker.ca.client import Account
from certworker.ca.keys import AccountKey
from certworker.core.issuance import State, still_validating, to_answer, unproved
from certworker.core.order import Authorization
from certworker.core.retry import classify_order, names_refused
from certworker.errors import AnswerFault, ProblemReported
from certworker.steps import trouble
from certworker.steps.session import Bench, Session, Turn, account_of
from certworker.store import challenges, issuances
from certworker.store.challenges import Answer
from certworker.store.issuances import Change, Issuance
from certworker.store.journal import Kind

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,128}")

_ROLLOVER = timedelta(seconds=1)
"""How often an issuance looks whether its account's key change is done."""
_PROXY, _PROXIES = timedelta(seconds=1), timedelta(seconds=30)
"""How often, and for how long since the answers were published, it is asked whether every proxy gives them."""
_VERDICT, _VERDICTS = timedelta(seconds=5), timedelta(seconds=30)
"""How often, and for how long since it was told to look, a CA is asked that is done with some names only."""
_NOTHING_KNOWN: Mapping[str, Authorization] = {}


class NotYet(Exception):
    """The CA was not told anything, because it would not find the answer; the session waits, or was put off."""


def publish_challenges(bench: Bench, session: Session) -> None:
    """Let the responders answer."""
    session.told = False
    _publish(bench, session, State.VALIDATING)


def answer_challenges(bench: Bench, session: Session) -> None:
    """Tell the CA that it may look, if that was not done in this session, and wait for it."""
    if not session.told:
        account = account_of(bench, session)
        if session.authorizations is None:
            session.authorizations = _fetch_authorizations(bench, session, account)
        session.told = True  # from now on it may look, whatever becomes of its answer
        try:
            _tell_to_look(bench, session, account, session.authorizations)
        except BaseException:
            session.told = False
            raise
    trouble.await_ca(bench, session)


def prove_again(bench: Bench, session: Session) -> None:
    """Prove what the CA wants proved, once with every claim; in between it is waited for as if it were busy."""
    if session.authorizations is None:
        proving = _publish(bench, session, State(session.issuance.state))
        session.authorizations = None  # not told yet
        _tell_to_look(bench, session, account_of(bench, session), proving)
        session.authorizations = proving
    trouble.await_ca(bench, session)


def explain_failure(bench: Bench, session: Session) -> None:
    """Find out which names an invalid order died of; what a failing challenge says outweighs the rest."""
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


def _publish(bench: Bench, session: Session, state: State) -> tuple[Authorization, ...]:
    """Read the authorizations and commit, with `state`, what proves the names."""
    session.authorizations = _fetch_authorizations(bench, session, account_of(bench, session))
    offers = tuple((a, _token_of(a)) for a in unproved(session.authorizations))
    published = bench.journal.write(_PUBLISH, _Publication(bench, session.issuance, state, offers, bench.clock()))
    if published is None:
        raise _later(bench, session)
    session.issuance, answers = published
    session.looks, session.fetched = 0, False
    session.answers = {answer.token: answer.key_authorization for answer in answers}
    return session.authorizations


@dataclass(frozen=True, slots=True)
class _Publication:
    """Tokens that are to be answered, and the state in which they are."""

    bench: Bench
    issuance: Issuance
    state: State
    offers: Sequence[tuple[Authorization, str]]
    now: datetime

    @property
    def change(self) -> Change:
        moves = {"failures": 0, "error": None} if self.state != self.issuance.state else {}
        return issuances.change(self.issuance, self.now, state=self.state, **moves)

    def answers(self, key: AccountKey) -> list[Answer]:
        return [
            Answer(self.issuance.id, a.url, a.dns_name, token, key.key_authorization(token)) for a, token in self.offers
        ]


def _publish_all(
    tx: Connection, publications: Sequence[_Publication]
) -> list[tuple[Issuance, list[Answer]] | None]:  # fmt: skip
    """Let the responders answer; None for those whose account's key is being changed."""
    accounts, now = publications[0].bench.accounts, max(one.now for one in publications)
    ids = sorted({one.issuance.account_id or "" for one in publications})
    keys = {account_id: accounts.publishing_key(tx, account_id) for account_id in ids}
    named = [(one, keys[one.issuance.account_id or ""]) for one in publications]
    published = [(one, one.answers(key)) for one, key in named if key is not None]
    challenges.publish_all(tx, [answer for _, answers in published for answer in answers], now)
    moved = issuances.record_all(tx, [one.change for one, _ in published])
    done = {issuance.id: (issuance, answers) for issuance, (_, answers) in zip(moved, published, strict=True)}
    return [done.get(one.issuance.id) for one in publications]


_PUBLISH = Kind(Turn.PUBLISH, _publish_all)


def _later(bench: Bench, session: Session) -> NotYet:
    """The account's key is being changed: the CA would compare with the new one."""
    session.wait_until = bench.clock() + _ROLLOVER
    return NotYet()


def _tell_to_look(bench: Bench, session: Session, account: Account, authorizations: Sequence[Authorization]) -> None:
    """Let the CA look at everything that it has not looked at."""
    pending = to_answer(authorizations)
    if pending:
        _await_proxies(bench, session, [a.dns_name for a in pending], account.key.thumbprint)
    for authorization in pending:
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


def _await_proxies(bench: Bench, session: Session, dns_names: Sequence[str], thumbprint: str) -> None:
    """Raise NotYet unless every proxy can answer the CA: wherever it looks, it has to find the same."""
    unready = bench.unready(dns_names, thumbprint)
    if unready is None:
        return
    now = bench.clock()
    if now - session.issuance.state_at < _PROXIES:
        session.wait_until = now + _PROXY
    else:
        trouble.await_proxies(bench, session, unready)
    raise NotYet


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
