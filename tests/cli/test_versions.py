"""`config diff`, `publish`, `rollback`, `versions`: what is served, what was, and the way between."""

import json
import os
import pwd
from collections.abc import Callable

import pytest

from tests.flow.box import until

from .conftest import Cli

Write = Callable[[str, str], str]
DOCUMENT = """
upstream_pools = [{ name = "web", health_check = { kind = "tcp" } }]
upstream_targets = [{ pool_id = "web", address = "127.0.0.1:8080", weight = %d }]
listeners = [{ name = "http", port = 8080, protocol = "http" }]
routes = [{ listener_id = "http", match_expr = { path = { prefix = "/" } }, upstream_pool_id = "web" }]
"""
ME = pwd.getpwuid(os.getuid()).pw_name
NOBODY = "00000000-0000-4000-8000-000000000009"


@pytest.fixture
def apply(cli: Cli, write: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the gateway's one target this weight."""
    monkeypatch.delenv("SUDO_USER", raising=False)

    def apply(weight: int) -> None:
        assert cli("config", "apply", write("gateway.toml", DOCUMENT % weight)).code == 0

    return apply


def test_from_rows_to_a_version_and_back(cli: Cli, apply: Callable[[int], None]) -> None:
    """Every step says what it did, and on whom the version is."""
    apply(1)
    assert cli("config", "publish").out == "version 1 is published\n"
    assert cli("config", "publish").out == "version 1 is published already: nothing to do\n"
    apply(5)
    assert cli("config", "publish", "--draft").out == "version 2 is a draft\n"
    assert cli("config", "publish", "--draft").out == "version 2 is a draft of these rows already: nothing to do\n"
    assert cli("config", "publish", "2").out == "version 2 is published\n"

    done = cli("config", "rollback")
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()
    assert first == "version 3 is published and brings back version 1"
    assert second.startswith(f"version 3 was published by {ME} instead of the rows, at 20")
    found = cli("config", "versions", "--json").json
    assert [(one["number"], one["status"], one["created_by"], one["restores"], one["nodes"]) for one in found] == [
        (3, "published", ME, 1, []), (2, "archived", ME, None, []), (1, "archived", ME, None, []),
    ]  # fmt: skip
    assert cli("config", "rollback", "3").out.startswith("version 3 is published already: nothing to do\n")
    assert cli("config", "publish").out == "version 4 is published\n"
    published = ["config.published", "config.drafted", "config.published", "config.rolled_back", "config.published"]
    assert [action for action in cli.audited() if action != "config.applied"] == published
    assert {actor for (actor,) in cli.sql("SELECT actor FROM audit_logs")} == {ME}


def test_whoever_called_sudo_is_named(cli: Cli, apply: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the service's user, as which the commands run."""
    monkeypatch.setenv("SUDO_USER", "alice")
    apply(1)
    cli("config", "publish")

    assert cli("config", "versions", "--json").json[0]["created_by"] == "alice"
    monkeypatch.setenv("SUDO_USER", "al\nice")
    apply(2)
    cli("config", "publish")
    assert cli("config", "versions", "--json").json[0]["created_by"] == "operator"


def test_a_diff_for_people(cli: Cli, apply: Callable[[int], None]) -> None:
    """By table, with the names of pools and listeners, and what was what."""
    apply(1)
    assert cli("config", "diff").out.startswith("nothing published -> the rows as they are now: 5 added\n\nlisteners\n")
    cli("config", "publish")
    assert cli("config", "diff").out == "version 1 (published) -> the rows as they are now: no difference\n"
    apply(5)
    (target,) = cli.sql("SELECT id FROM upstream_targets")[0]

    assert cli("config", "diff").out == (
        "version 1 (published) -> the rows as they are now: 1 changed\n\n"
        f"upstream_targets\n  ~ {target}\n      weight: 1 -> 5\n"
    )
    cli("config", "publish")
    (route, pool) = cli.sql("SELECT r.id, p.id FROM routes r JOIN upstream_pools p ON r.upstream_pool_id = p.id")[0]
    cli.sql("DELETE FROM routes")
    shown = cli("config", "diff").out
    assert f"\n  - {route}\n" in shown
    assert f"\n      upstream_pool_id: {pool} ('web')\n" in shown
    assert "\n      match_expr.host: none\n" not in shown


def test_a_diff_for_programs(cli: Cli, apply: Callable[[int], None]) -> None:
    """Both sides, and every change by table, id and field; any two versions will do, in any order."""
    for weight in (1, 5):
        apply(weight)
        cli("config", "publish")
    (target,) = cli.sql("SELECT id FROM upstream_targets")[0]

    document = cli("config", "diff", "2", "1", "--json").json
    assert (document["from"]["number"], document["from"]["status"], document["to"]["number"]) == (2, "published", 1)
    assert document["changes"] == [
        {"table": "upstream_targets", "id": target, "change": "changed", "fields": {"weight": {"from": 5, "to": 1}}}
    ]
    assert document["faults"] == []
    assert cli("config", "diff", "1", "--json").json["to"] == "rows"
    assert cli("config", "diff", "rows", "published", "--json").json["changes"] == []
    assert cli("config", "diff", "1", "1", "--json").json["changes"] == []


@pytest.fixture
def bad_row(cli: Cli, apply: Callable[[int], None]) -> str:
    """What another program wrote: a target that is our own API."""
    apply(1)
    address = os.environ["CERTWORKER_API_LISTEN"]
    cli.sql("INSERT INTO upstream_targets (id, pool_id, address) SELECT ?, id, ? FROM upstream_pools", NOBODY, address)
    return address


def test_a_bad_row_refuses_the_publish(cli: Cli, bad_row: str) -> None:
    """Table, id, field, value and rule in one line; exit code 1, and the version before stands."""
    said = (f"upstream_targets {NOBODY}: address '{bad_row}': ", "certworker's own", "set ON_BAD_ROW=leave_out")

    cli("config", "publish").refused(1, *said)
    cli("config", "publish", "--draft").refused(1, *said)
    done = cli("config", "publish", "--json")
    assert (done.code, done.json["refused"], done.json["version"]) == (1, True, None)
    assert [(fault["table"], fault["row_id"], fault["field"]) for fault in done.json["faults"]] == [
        ("upstream_targets", NOBODY, "address")
    ]
    assert cli("config", "versions", "--json").json == []
    assert cli("status", "--json").json["publish_faults"][0].startswith(f"upstream_targets {NOBODY}")
    assert f"not published: upstream_targets {NOBODY}" in cli("status").out
    warned = cli("config", "diff", "--json")
    assert warned.err.startswith(f"warning: left out: upstream_targets {NOBODY}")
    assert len(warned.json["faults"]) == 1


def test_a_bad_row_is_left_out(cli: Cli, bad_row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If so set: the rest is published, the exit code says that something was not, and `status` keeps saying it."""
    monkeypatch.setenv("CERTWORKER_ON_BAD_ROW", "leave_out")

    done = cli("config", "publish")
    assert (done.code, done.out) == (1, "version 1 is published\n")
    assert done.err.startswith(f"warning: left out: upstream_targets {NOBODY}: address '{bad_row}'")
    assert cli("status", "--json").json["publish_faults"] == []
    assert f"published without: upstream_targets {NOBODY}" in cli("status").out
    assert "config.left_out" in cli.audited()
    cli.sql("DELETE FROM upstream_targets WHERE id = ?", NOBODY)
    assert cli("config", "publish").code == 0
    assert cli("status", "--json").json["left_out_rows"] == []


def test_a_hold_is_shown_where_people_look(cli: Cli, apply: Callable[[int], None]) -> None:
    """By `status`, and to whoever changes the rows and expects them to be served."""
    for weight in (1, 5):
        apply(weight)
        cli("config", "publish")
    cli("config", "rollback")

    document = cli("status", "--json").json
    assert (document["publish_hold"]["number"], document["publish_hold"]["by"]) == (3, ME)
    assert "held: version 3 was published by" in cli("status").out
    told = cli("config", "apply", str(cli.folder / "gateway.toml"))
    assert (told.code, told.err.count("\n")) == (0, 1)
    assert told.err.startswith("warning: version 3 was published by")
    cli("config", "publish")
    assert cli("status", "--json").json["publish_hold"] is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("diff", "0"), ["'0'", "a version's number, published, or rows"]),
        (("diff", "x\ny"), ["a version's number, published, or rows"]),
        (("diff", "1", "2", "3"), ["unexpected extra argument"]),
        (("diff", "9"), ["version 9: there is none"]),
        (("diff", "9" * 30), ["a version's number"]),
        (("publish", "9"), ["version 9: there is none", "config versions"]),
        (("publish", "-1"), ["-1"]),
        (("publish", "0"), ["0 is not in the range"]),
        (("publish", "1", "--draft"), ["--draft makes a draft of the rows, NUMBER publishes one"]),
        (("publish", "9" * 30), ["not in the range"]),
        (("rollback",), ["nothing to roll back", "no version yet"]),
        (("rollback", "9"), ["version 9: there is none"]),
        (("rollback", "one"), ["'one' is not a valid integer"]),
        (("rollback", "1;2"), ["is not a valid integer"]),
        (("versions", "1"), ["unexpected extra argument"]),
    ],
)
def test_wrong_use(cli: Cli, words: tuple[str, ...], parts: list[str]) -> None:
    """Exit code 2, one line, and nothing changed."""
    before = cli.content()
    cli("config", *words).refused(2, *parts)

    assert cli.content() == before


def test_without_rows_there_is_nothing_to_publish(cli: Cli) -> None:
    """Said, and no error."""
    for words in (("publish",), ("publish", "--draft")):
        assert cli("config", *words).out == "there are no rows: nothing to publish\n"
    assert cli("config", "diff").out == (
        "nothing published -> the rows as they are now: 1 added\n\n"
        f"responders\n  + {os.environ['CERTWORKER_RESPONDER_LISTEN']}\n"
    )
    assert cli("config", "versions").out.startswith("0 versions")


def test_other_programs_versions_are_listed(cli: Cli, apply: Callable[[int], None]) -> None:
    """Without a number, and nothing in them reaches a terminal as it is; publishing takes their place."""
    cli.sql(
        "INSERT INTO config_versions (id, snapshot_json, status, created_by) VALUES (?, ?, 'published', ?)",
        NOBODY, json.dumps({"listeners": "all"}), "a\x1b[31m",
    )  # fmt: skip
    apply(1)

    assert "\x1b" not in cli("config", "versions").out
    cli("config", "diff").refused(2, f"version {NOBODY}: this release cannot read it: snapshot: listeners")
    assert cli("config", "publish").out == "version 1 is published\n"
    assert [one["status"] for one in cli("config", "versions", "--json").json] == ["published", "archived"]


def test_a_service_lets_a_roll_back_stand(cli: Cli, apply: Callable[[int], None]) -> None:
    """Through a change of another row, and through a restart; `config publish` is heard while it runs."""
    for weight in (1, 5):
        apply(weight)
        cli("config", "publish")
    cli("config", "rollback")
    for _ in range(2):
        service = cli.start_service()
        cli.sql("UPDATE listeners SET port = port + 1")
        until(lambda: cli.sql("SELECT count(*) FROM changes WHERE topic = 'gateway'") == [(0,)])
        assert cli("config", "versions", "--json").json[0]["number"] == 3
        service.terminate()
        assert service.wait(30) == 0
    assert cli("config", "publish").out == "version 4 is published\n"


@pytest.mark.parametrize(("policy", "published"), [("refuse", []), ("leave_out", ["published"])])
def test_a_service_follows_the_policy_for_bad_rows(
    cli: Cli, bad_row: str, monkeypatch: pytest.MonkeyPatch, policy: str, published: list[str]
) -> None:
    """Nothing is published, or everything else; either way the audit log has the row, in certworker's own name."""
    monkeypatch.setenv("CERTWORKER_ON_BAD_ROW", policy)
    cli.start_service()

    assert [one["status"] for one in cli("config", "versions", "--json").json] == published
    action = "config.left_out" if published else "config.refused"
    ((actor, said),) = cli.sql("SELECT actor, diff FROM audit_logs WHERE action = ?", action)
    assert actor == "certworker"
    assert bad_row in said


def test_a_service_may_publish_nothing_by_itself(
    cli: Cli, apply: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AUTO_PUBLISH=off a person does, and the notes of changes do not pile up."""
    monkeypatch.setenv("CERTWORKER_AUTO_PUBLISH", "off")
    apply(1)
    cli.start_service()
    until(lambda: cli.sql("SELECT count(*) FROM changes WHERE topic = 'gateway'") == [(0,)])

    assert cli("config", "versions", "--json").json == []
    assert cli("config", "publish").out == "version 1 is published\n"
