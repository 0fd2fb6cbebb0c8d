"""`status`: where everything stands."""

from dataclasses import asdict
from typing import Any

import click

from certworker import wiring
from certworker.cli.main import settings_of
from certworker.cli.output import count, json_option, print_json, print_table
from certworker.core.names import check_name
from certworker.errors import UnknownName
from certworker.steps.deliver import Scopes, held_back
from certworker.steps.gate import incident
from certworker.steps.publish import FAULTS, LEFT_OUT, Hold, find_hold, find_lines
from certworker.steps.verify import NOWHERE, missing, unlisted
from certworker.store import lineages, nodes, policies, report, versions
from certworker.store.database import Transaction
from certworker.store.lineages import LeftOut
from certworker.wiring import App

_MOST = 10_000
"""Rows of one kind that are shown."""


@click.command()
@click.argument("name", required=False)
@json_option
@click.pass_context
def status(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """Where everything stands: policies, certificates, nodes; or one name."""
    settings = settings_of(ctx)
    wanted = None if name is None else check_name(name, private_ca=True, wildcard=True)
    app = wiring.open_app(settings)
    document = app.db.read(lambda tx: describe(tx, app, wanted))
    app.close()
    if wanted is not None and not document["lineages"] and not document["policies"]:
        raise UnknownName(f"name {name!r}: no policy wants it; see `certworker policy list`")
    if as_json:
        print_json(document)
    else:
        _print(document)


def describe(tx: Transaction, app: App, name: str | None = None) -> dict[str, Any]:
    """Return what `status --json` prints; with `name` only what has to do with it."""
    found = policies.list_all(tx, limit=_MOST) if name is None else policies.wanting(tx, name)
    live = nodes.live(tx, app.settings.node_silent)
    live_names = {node.node_id for node in live}
    rows = report.lineage_rows(tx, name, limit=_MOST)
    unserved = lineages.unserved_among(tx, [row["id"] for row in rows if row["served_at"] is None])
    left_out = lineages.left_out_among(tx, [row["id"] for row in rows if len(row["dns_names"]) > 1])
    nowhere = unlisted(tx, unserved, Scopes())
    shown_lineages = []
    for row in rows:
        waits = unserved.get(row["id"])
        lacking = [] if waits is None else [why for node in live if (why := missing(waits, node))]
        if row["id"] in nowhere:
            lacking = [f"any node: {NOWHERE}"]
        shown_lineages.append(_lineage(row, lacking, left_out.get(row["id"], [])))
    published = versions.find_published(tx)
    hold = find_hold(tx)
    return {
        "policies": [
            {"id": p.id, "names": p.domains, "mode": p.mode, "status": p.status, "paused": p.paused_at is not None,
             "refused_names": p.refused_names or []}
            for p in found
        ],
        "lineages": shown_lineages,
        "nodes": [
            {"node_id": node.node_id, "version": node.version, "version_id": node.version_id, "revision": node.revision,
             "heartbeat_at": node.heartbeat_at, "live": node.node_id in live_names, "error": node.error}
            for node in nodes.list_all(tx)
        ],
        "ca": incident(tx, app.settings.acme_directory_url, app.clock()),
        "published": None if published is None else {"id": published.id, "number": published.number},
        "publish_faults": find_lines(tx, FAULTS),
        "left_out_rows": find_lines(tx, LEFT_OUT),
        "publish_hold": None if hold is None else asdict(hold),
        "held_back": held_back(tx, app.settings.node_silent),
        "truncated": max(len(found), len(rows)) >= _MOST,
    }  # fmt: skip


def _lineage(row: dict[str, Any], lacking: list[str], left_out: list[LeftOut]) -> dict[str, Any]:
    start, end = row["window_start"], row["window_end"]
    return {
        "id": row["id"], "names": row["dns_names"], "status": row["status"], "error": row["error"],
        "next_check_at": row["next_check_at"], "served_at": row["served_at"], "not_served_by": lacking,
        "failures": row["failures"], "issuance": row["state"], "attempt_at": row["attempt_at"],
        "serial": row["serial"], "fingerprint_sha256": row["fingerprint"], "issuer": row["issuer"],
        "expires_at": row["expires_at"], "certificate_status": row["certificate_status"], "renew_at": row["renew_at"],
        "suggested_window": None if start is None else {"start": start, "end": end, "explanation": row["window_url"]},
        "renewal_info_error": row["ari_error"],
        "left_out": [{"name": x.dns_name, "error": x.error, "next_attempt_at": x.probe_at} for x in left_out],
    }  # fmt: skip


def _print(document: dict[str, Any]) -> None:
    if document["ca"] is not None:
        _print_incident(document["ca"])
    rows = [(p["names"], p["mode"], p["status"] + (" (paused)" if p["paused"] else "")) for p in document["policies"]]
    print_table(count(len(rows), "policy", "policies"), ("names", "mode", "status"), rows)
    for policy in document["policies"]:
        for refused in policy["refused_names"]:
            click.echo(f"  refused {refused['value']!r}: {refused['rule']}")
    click.echo()
    lines = [
        (x["names"], x["status"], x["expires_at"], x["renew_at"] if x["issuance"] is None else f"now: {x['issuance']}",
         _served(x, document["nodes"]))
        for x in document["lineages"]
    ]  # fmt: skip
    print_table(
        count(len(lines), "certificate") + " wanted", ("names", "status", "expires", "renewal", "served"), lines
    )
    for lineage in document["lineages"]:
        if lineage["error"]:
            _print_error(lineage)
        for name in lineage["left_out"]:
            click.echo(f"  without {name['name']}: {name['error']['hint']}; tried again at {name['next_attempt_at']}")
    if document["nodes"]:
        click.echo()
        heads = ("node", "live", "revision", "heartbeat", "error")
        cells = [
            (n["node_id"], "yes" if n["live"] else "no", n["revision"], n["heartbeat_at"], n["error"])
            for n in document["nodes"]
        ]
        print_table(count(len(cells), "node"), heads, cells)
    if document["truncated"]:
        click.echo(f"only the first {_MOST} are shown; ask for one with `certworker status NAME`")
    for fault in document["publish_faults"]:
        click.echo(f"not published: {fault}")
    for fault in document["left_out_rows"]:
        click.echo(f"published without: {fault}")
    if document["held_back"] is not None:
        click.echo(f"version {document['published']['number']} goes to canaries only: {document['held_back']}")
    if document["publish_hold"] is not None:
        click.echo(f"held: {Hold(**document['publish_hold'])}")


def _served(lineage: dict[str, Any], known: list[dict[str, Any]]) -> str:
    if lineage["served_at"] is not None:
        return "yes"
    if lineage["not_served_by"]:
        return "issued, not yet served by: " + "; ".join(lineage["not_served_by"])
    return "" if lineage["expires_at"] is None else ("not yet" if known else "no nodes")


def _print_incident(incident: dict[str, Any]) -> None:
    """Show why the CA is asked for nothing."""
    error, since = incident["error"] or {}, incident["since"]
    click.echo(f"the CA {incident['directory_url']} is {incident['state']}" + (f" since {since}" if since else ""))
    click.echo(f"  said: {error.get('detail')}")
    click.echo(f"  hint: {error.get('hint')}")
    click.echo(f"  next attempt: {incident['next_attempt_at'] or 'now'}\n")


def _print_error(lineage: dict[str, Any]) -> None:
    error = lineage["error"]
    click.echo(f"\n{', '.join(lineage['names'][:5])}: {error['class']} ({error['type']})")
    click.echo(f"  said: {error['detail']}")
    click.echo(f"  hint: {error['hint']}")
    click.echo(f"  next attempt: {error['retry_at']}")
