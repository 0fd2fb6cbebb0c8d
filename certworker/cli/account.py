"""`account`: the ACME accounts."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import click

from certworker import parts, wiring
from certworker.ca.problems import Endpoint, classify, clean_text
from certworker.cli.logs import start_logging
from certworker.cli.main import settings_of
from certworker.cli.output import count, json_option, print_json, print_table
from certworker.errors import CaError, CertworkerError
from certworker.steps import account as steps
from certworker.steps.register import Accounts
from certworker.store import accounts
from certworker.store.accounts import Listed, StoredAccount
from certworker.store.rows import new_id
from certworker.wiring import App

_SHOWN = 300
"""Characters of a text that another program may have written."""
_PINS = "CAA records that name its former URL as accounturi (RFC 8657 §3) have to name this one"


@click.group()
def account() -> None:
    """ACME accounts: what orders are made with."""


@account.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """Show every account; never a key. Asks no CA."""
    app = wiring.open_app(settings_of(ctx))
    found, now = app.db.read(accounts.list_all), app.clock()
    app.close()
    documents = [describe(one, now) for one in found]
    if as_json:
        print_json(documents)
        return
    columns = ("CA", "account", "status", "used", "contact", "terms agreed", "created")
    rows = [
        (one["directory_url"], one["account_url"], one["status"], "yes" if one["default"] else "no", one["contact"],
         one["tos_agreed_at"], one["created_at"])
        for one in documents
    ]  # fmt: skip
    print_table(count(len(rows), "account"), columns, rows)


@account.command()
@click.option("--new-key", is_flag=True, help="Make a successor of an account that cannot be used any more.")
@json_option
@click.pass_context
def register(ctx: click.Context, new_key: bool, as_json: bool) -> None:
    """Register the account for the CA in the settings, or see that the CA still has it and knows its contacts.

    A pause after the CA refused the account ends with it.
    """
    with _opened(ctx, Endpoint.NEW_ACCOUNT) as (app, used):
        wiring.refuse_other_issuer(app)
        done = steps.register(used, new_key=new_key)
        parts.make_gate(app, new_id()).resume()
        lines = {
            "registered": "registered",
            "recovered": f"is in order again; {_PINS}",
            "updated": "is in order, and the CA knows its contacts now",
            "unchanged": "is in order: nothing to do",
        }
        _tell(used, done.account, done.outcome, lines[done.outcome], as_json=as_json)


@account.command()
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=120, show_default=True, metavar="SECS",
    help="Wait so long for what the CA is validating with the old key.",
)  # fmt: skip
@json_option
@click.pass_context
def rollover(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Give the account a new key. Beside a running service no issuance fails; repeat it if it was interrupted."""

    def told(proving: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"  waiting: the CA is validating {count(proving, 'certificate')} with the old key", err=True)

    with _opened(ctx, Endpoint.KEY_CHANGE) as (_, used):
        wait = threading.Event().wait
        done = steps.roll_over(used, timedelta(seconds=timeout), lambda by: wait(by.total_seconds()), told)
        _tell(used, done, "changed", "has a new key", as_json=as_json)


@account.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Even while open issuances use it.")
@json_option
@click.pass_context
def deactivate(ctx: click.Context, yes: bool, force: bool, as_json: bool) -> None:
    """Give the account for the CA in the settings up for good; certificates are served on, and not renewed."""
    with _opened(ctx, Endpoint.ACCOUNT) as (_, used):
        if not yes:
            _ask(f"deactivate the account at {used.directory_url} for good?")
        done = steps.deactivate(used, force=force)
        line = "is deactivated; `certworker account register --new-key` makes another one"
        _tell(used, done, "deactivated", line, as_json=as_json)


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} nobody can be asked here: give --yes")
    if not click.confirm(question, err=True):
        raise CertworkerError("nothing was changed")


@contextmanager
def _opened(ctx: click.Context, doing: Endpoint) -> Iterator[tuple[App, Accounts]]:
    """Give the accounts of the CA in the settings; what the CA says no to ends with what can be done about it."""
    settings = settings_of(ctx)
    start_logging(settings, at_least=logging.CRITICAL)  # what the result says is not said twice
    app = wiring.open_app(settings)
    try:
        yield app, parts.make_accounts(app)
    except CaError as error:
        hint = classify(error, doing).hint
        raise CertworkerError(str(error) if hint in str(error) else f"{error}; {hint}") from None
    finally:
        app.close()


def _tell(used: Accounts, done: StoredAccount, outcome: str, line: str, *, as_json: bool) -> None:
    if not as_json:
        click.echo(f"account {done.account_url} at {done.directory_url} {line}")
        return
    found = used.db.read(accounts.list_all)
    (document,) = (describe(one, used.clock()) for one in found if one.account.id == done.id)
    print_json({"outcome": outcome, **document})


def describe(one: Listed, now: datetime) -> dict[str, Any]:
    """Return what `account list --json` prints of one account."""
    stored = one.account
    return {
        "id": stored.id, "directory_url": clean_text(stored.directory_url, _SHOWN),
        "account_url": None if stored.account_url is None else clean_text(stored.account_url, _SHOWN),
        "status": _status(stored, now), "default": one.used,
        "contact": [clean_text(contact, _SHOWN) for contact in stored.contact],
        "tos_agreed_at": stored.tos_agreed_at, "created_at": one.created_at,
    }  # fmt: skip


def _status(stored: StoredAccount, now: datetime) -> str:
    if stored.deactivated_at is not None:
        return "deactivated"
    if stored.account_url is None:
        return "unregistered"
    return "changing key" if stored.is_rolling(now) or stored.is_overdue(now) else "valid"
