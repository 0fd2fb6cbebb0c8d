"""`policy`: which names are wanted."""

from typing import Any

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import count, json_option, print_json, print_table
from certworker.core.names import check_name, check_names
from certworker.errors import InputError, NameRefused
from certworker.store import audit, lineages, policies
from certworker.store.database import Transaction
from certworker.store.policies import Policy
from certworker.store.rows import new_id
from certworker.wiring import App

_ACTOR = "operator"


@click.group()
def policy() -> None:
    """TLS policies: which names are wanted."""


@policy.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--mode", type=click.Choice(["auto", "manual"]), default="auto", show_default=True)
@click.option("--shared", is_flag=True, help="One certificate for all the names, instead of one each.")
@json_option
@click.pass_context
def add(ctx: click.Context, names: tuple[str, ...], mode: str, shared: bool, as_json: bool) -> None:
    """Want certificates for these names. Any bad name stores nothing."""
    settings = settings_of(ctx)
    manual = mode == "manual"
    checked = check_names(names, private_ca=settings.acme_private_ca or manual, wildcard=manual, shared=shared)
    app, policy_id = wiring.open_app(settings), new_id()

    def insert(tx: Transaction) -> None:
        if policies.add(tx, list(checked), app.clock(), mode=mode, shared=shared, policy_id=policy_id):
            _audit(tx, app, "policy.added", policy_id, {"domains": list(checked), "mode": mode, "shared": shared})

    app.db.write(insert)
    app.close()
    if as_json:
        print_json({"id": policy_id, "names": checked, "mode": mode, "status": "pending"})
    else:
        click.echo(f"policy {policy_id}: {', '.join(checked)}")


@policy.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """Show every policy and its status."""
    app = wiring.open_app(settings_of(ctx))
    found = app.db.read(_all)
    app.close()
    if as_json:
        print_json([_document(one) for one in found])
    else:
        rows = [(one.id, one.mode, _status(one), [str(name) for name in one.domains]) for one in found]
        print_table(count(len(found), "policy", "policies"), ("id", "mode", "status", "names"), rows)


@policy.command()
@click.argument("policy_id", metavar="ID|NAME")
@json_option
@click.pass_context
def show(ctx: click.Context, policy_id: str, as_json: bool) -> None:
    """Show one policy with its lineages."""
    app = wiring.open_app(settings_of(ctx))
    one = app.db.read(lambda tx: _get(tx, policy_id))
    linked = app.db.read(lambda tx: lineages.of_policy(tx, one.id))
    app.close()
    document = _document(one) | {
        "lineages": [
            {"id": x.id, "names": x.dns_names, "status": x.status, "expires_at": x.not_after, "error": x.error}
            for x in linked
        ]
    }
    if as_json:
        print_json(document)
        return
    click.echo(f"policy {one.id}  mode {one.mode}  status {_status(one)}")
    for refused in one.refused_names or []:
        click.echo(f"  refused {refused['value']!r}: {refused['rule']}")
    rows = [(x.dns_names, x.status, x.not_after, (x.error or {}).get("detail")) for x in linked]
    print_table("", ("names", "status", "expires", "last error"), rows)


@policy.command()
@click.argument("policy_id", metavar="ID|NAME")
@click.pass_context
def pause(ctx: click.Context, policy_id: str) -> None:
    """Renew nothing for it until it is resumed; its certificates are served on."""
    _set_paused(ctx, policy_id, paused=True)


@policy.command()
@click.argument("policy_id", metavar="ID|NAME")
@click.pass_context
def resume(ctx: click.Context, policy_id: str) -> None:
    """Renew for it again."""
    _set_paused(ctx, policy_id, paused=False)


@policy.command()
@click.argument("policy_id", metavar="ID|NAME")
@click.pass_context
def remove(ctx: click.Context, policy_id: str) -> None:
    """Delete a policy. What it alone wanted is renewed no more, and served until it expires."""
    app = wiring.open_app(settings_of(ctx))

    one = app.db.read(lambda tx: _get(tx, policy_id))

    def delete(tx: Transaction) -> None:
        if policies.remove(tx, one.id):  # not if the answer to that commit was lost, and it is said again
            _audit(tx, app, "policy.removed", one.id, {"domains": one.domains, "mode": one.mode}, removed=True)

    app.db.write(delete)
    app.close()
    click.echo(f"removed policy {one.id}: {', '.join(map(str, one.domains))}")


def _set_paused(ctx: click.Context, policy_id: str, *, paused: bool) -> None:
    app = wiring.open_app(settings_of(ctx))

    def change(tx: Transaction) -> Policy:
        one = _get(tx, policy_id)
        now = app.clock()
        if paused != (one.paused_at is not None):
            policies.set_paused(tx, one.id, now if paused else None, now)
            _audit(tx, app, "policy.paused" if paused else "policy.resumed", one.id, {"paused": paused})
        return one

    one = app.db.write(change)
    app.close()
    click.echo(f"{'paused' if paused else 'resumed'} policy {one.id}")


def _all(tx: Transaction) -> list[Policy]:
    found: list[Policy] = []
    while page := policies.list_all(tx, after=found[-1].id if found else ""):
        found += page
    return found


def _get(tx: Transaction, key: str) -> Policy:
    """Return the policy with this id, or the only one that wants this name."""
    one = policies.find(tx, key.lower()) if _is_id(key) else None
    if one is not None:
        return one
    found = policies.wanting(tx, _as_stored(key))
    if len(found) > 1:
        raise InputError(f"policy {key!r}: {len(found)} policies want this name, give an id: "
                         + ", ".join(one.id for one in found))  # fmt: skip
    if not found:
        raise InputError(f"policy {key!r}: there is none with this id or name; see `certworker policy list`")
    return found[0]


def _as_stored(key: str) -> str:
    """Return a name as it is stored; one that is none may still be what another program wrote."""
    try:
        return check_name(key, private_ca=True, wildcard=True)
    except NameRefused:
        return key


def _is_id(key: str) -> bool:
    return len(key) == 36 and key.count("-") == 4


def _audit(
    tx: Transaction, app: App, action: str, policy_id: str, values: dict[str, Any], *, removed: bool = False
) -> None:
    diff = {"table": "tls_policies", "id": policy_id, "before": values if removed else {}}
    audit.record(tx, action, {**diff, "after": {} if removed else values}, app.clock(), actor=_ACTOR)


def _status(one: Policy) -> str:
    return f"{one.status} (paused)" if one.paused_at else one.status


def _document(one: Policy) -> dict[str, Any]:
    return {
        "id": one.id, "names": one.domains, "mode": one.mode, "status": one.status, "shared": one.shared,
        "paused_at": one.paused_at, "refused_names": one.refused_names or [],
    }  # fmt: skip
