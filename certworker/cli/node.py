"""`node`: the gateway machines of the fleet."""

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import count, json_option, print_json, print_table, show
from certworker.core.transit import EnrolmentToken, check_node_name, check_url
from certworker.errors import InputError, SettingsError
from certworker.settings import Settings
from certworker.steps.admit import dismiss, invite
from certworker.steps.deliver import held_back
from certworker.steps.identity import take_identity
from certworker.store import enrolments, nodes, versions
from certworker.store.database import Transaction
from certworker.store.enrolments import EnrolledNode
from certworker.store.nodes import NodeStatus
from certworker.wiring import App


@click.group()
def node() -> None:
    """The gateway machines of the fleet."""


@node.command()
@click.argument("name")
@click.option("--canary", is_flag=True, help="It gets a version first; the others follow when it has proved it.")
@click.option("--url", help="Where the machine reaches NODE_LISTEN, https://host:port; default: NODE_URL.")
@json_option
@click.pass_context
def enroll(ctx: click.Context, name: str, canary: bool, url: str | None, as_json: bool) -> None:
    """Print a token with which one machine joins the fleet as NAME, within an hour: `certworker agent --enroll`."""
    settings = settings_of(ctx)
    name, url = _check(check_node_name, "node", name), _check(_reachable, "url", url or _url(settings))
    app = wiring.open_app(settings)
    try:
        pin = take_identity(app.db, app.sealer).pin
        invitation = invite(app.db, app.clock, name, canary=canary, actor=wiring.operator())
    finally:
        app.close()
    token = EnrolmentToken(
        url=url, pin=pin, name=name, enrolment_id=invitation.enrolment_id, secret=invitation.secret
    ).text()
    until = invitation.expires_at
    if as_json:
        print_json({"node": name, "canary": canary, "url": url, "expires_at": until, "token": token})
        return
    click.echo(f"on the machine, until {until:%Y-%m-%d %H:%M:%SZ}: certworker agent --enroll TOKEN", err=True)
    click.echo(token)


@node.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """Show every node: what it proved to serve, when it was heard of, what is wrong."""
    app = wiring.open_app(settings_of(ctx))
    document = app.db.read(lambda tx: _document(tx, app))
    app.close()
    if as_json:
        print_json(document)
        return
    heads = ("node", "live", "canary", "version", "revision", "heartbeat", "proxy", "error")
    rows = [
        (one["name"], _word(one["live"]), _word(one["canary"]), one["version"], one["revision"],
         _age(one["heartbeat_age_secs"]), one["proxy"], one["error"])
        for one in document["nodes"]
    ]  # fmt: skip
    print_table(count(len(rows), "node"), heads, rows)
    for one in document["nodes"]:
        for warning in one["warnings"]:
            click.echo(f"{one['name']}: {warning}")
    for one in document["invited"]:
        click.echo(f"{one['name']}: invited until {show(one['expires_at'])}; `certworker node remove` ends that")
    if document["held_back"]:
        click.echo(f"version {document['published']} goes to canaries only: {document['held_back']}")


@node.command()
@click.argument("name")
@click.pass_context
def remove(ctx: click.Context, name: str) -> None:
    """End a node's token at once, and let nobody wait for it. Its proxy serves on what it has until it is stopped."""
    app = wiring.open_app(settings_of(ctx))
    try:
        removed = dismiss(app.db, app.clock, name, actor=wiring.operator())
    finally:
        app.close()
    if not removed:
        raise InputError(f"there is no node {name[:300]!r}; see `certworker node list`")
    click.echo(f"node {name} is removed; stop `certworker agent` there")


def _check(rule: Callable[[str], str], field: str, value: str) -> str:
    try:
        return rule(value)
    except ValueError as refused:
        raise InputError(f"{field} {value[:300]!r}: {refused}") from None


def _url(settings: Settings) -> str:
    if settings.node_url is not None:
        return settings.node_url
    if settings.node_listen is None:
        raise SettingsError("there is no node API: set NODE_LISTEN to the host:port where gateway machines reach it")
    return f"https://{settings.node_listen}"


def _reachable(url: str) -> str:
    host = urlsplit(check_url(url)).hostname or ""
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise InputError(f"url {url}: that is no address to reach; set NODE_URL, or give --url")
    return url


def _document(tx: Transaction, app: App) -> dict[str, Any]:
    said = {one.node_id: one for one in nodes.list_all(tx)}
    enrolled = {one.name: one for one in enrolments.list_present(tx)}
    silent, now = app.settings.node_silent, app.clock()
    names = sorted({*said, *enrolled})
    return {
        "nodes": [_node(name, said.get(name), enrolled.get(name), now, silent) for name in names],
        "invited": [{"name": one.name, "expires_at": one.expires_at} for one in enrolments.list_open(tx)],
        "published": versions.published_number(tx),
        "held_back": held_back(tx, silent),
    }


def _node(
    name: str, said: NodeStatus | None, enrolled: EnrolledNode | None, now: datetime, silent: timedelta
) -> dict[str, Any]:
    age = None if said is None else max((now - said.heartbeat_at).total_seconds(), 0.0)
    return {
        "name": name,
        "enrolled_at": None if enrolled is None else enrolled.enrolled_at,
        "canary": enrolled is not None and enrolled.canary,
        "live": age is not None and age < silent.total_seconds(),
        "version": said.version if said else None,
        "version_id": said.version_id if said else None,
        "revision": said.revision if said else None,
        "heartbeat_at": said.heartbeat_at if said else None,
        "heartbeat_age_secs": None if age is None else round(age, 1),
        "proxy": said.proxy if said else None,
        "agent": said.agent if said else None,
        "address": said.address if said else None,
        "unserved": len(said.unserved) if said else None,
        "warnings": said.warnings if said else [],
        "error": said.error if said else None,
    }


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _age(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s ago"
