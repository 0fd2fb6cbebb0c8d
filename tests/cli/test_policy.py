"""`policy`, `status` and `renew --dry-run`: what is wanted, and what it says."""

import json
from uuid import uuid4

import pytest

from .conftest import LIMIT, Cli

LONG = "a" * 64

NOTHING = {"renewed": [], "failed": [], "waiting": [], "unchanged": 0}


def add(cli: Cli, *names: str) -> str:
    return str(cli("policy", "add", *names, "--json").json["id"])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "is empty"),
        ("a..b", "empty label"),
        (f"{LONG}.test", "label of 64 characters"),
        (f"{'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * 10}", "254 characters"),
        ("a_b.test", "underscore"),
        ("a b.test", "space or a control character"),
        ("a\nb.test", "space or a control character"),
        ("a\x1bb.test", "space or a control character"),
        ("xn--99999999.test", "punycode"),
        ("a\u200db.test", "IDNA 2008"),
        ("ab--c.test", "reserved '--'"),
        ("*.a.test", "wildcard cannot be validated by HTTP-01"),
        ("1.2.3.4", "is an IP address"),
        ("fe80::1%eth0", "is an IP address"),
        ("0x7f.1", "ends in a number"),
        ("a.test.", "ends with a dot"),
        ("../../etc/passwd", "empty label"),
        ("$(reboot).test", "letters, digits"),
    ],
)
def test_a_bad_name_stores_nothing(cli: Cli, name: str, rule: str) -> None:
    """E01-E10: one line with value and rule, exit code 2, every table as it was; also beside good names."""
    content = cli.content()

    cli("policy", "add", name).refused(2, repr(name), rule)
    cli("policy", "add", "good.test", name, "fine.test").refused(2, repr(name), rule)
    assert cli.content() == content


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("localhost", "no public CA issues for .localhost"),
        ("printer.local", "no public CA issues for .local"),
        ("a.test", "no public CA issues for .test"),
        ("intranet", "one label only"),
        ("co.uk", "public suffix"),
    ],
)
def test_a_public_ca_takes_less(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, rule: str) -> None:
    """E09: a setting makes the difference, and the message names it where it helps."""
    assert cli("policy", "add", name).code == 0
    monkeypatch.setenv("CERTWORKER_ACME_PRIVATE_CA", "false")
    content = cli.content()

    cli("policy", "add", name).refused(2, repr(name), rule)
    assert cli.content() == content


def test_a_shared_certificate_has_a_limit(cli: Cli) -> None:
    """E06: 101 names in one certificate are refused; 101 in a policy are 101 certificates."""
    names = [f"n{number}.test" for number in range(101)]
    content = cli.content()

    cli("policy", "add", "--shared", *names).refused(2, "101 in one shared certificate", "at most 100")
    assert cli.content() == content
    assert cli("policy", "add", *names).code == 0


def test_what_is_added_is_stored_in_one_form(cli: Cli) -> None:
    """E02, E03: lower-case A-labels without repeats, in the given order; audited."""
    done = cli("policy", "add", "MÜNCHEN.test", "a.test", "xn--mnchen-3ya.test", "A.TEST", "--shared", "--json")

    names = ["xn--mnchen-3ya.test", "a.test"]
    assert (done.code, done.err) == (0, "")
    assert done.json == {"id": done.json["id"], "names": names, "mode": "auto", "status": "pending"}
    assert [json.loads(text) for (text,) in cli.sql("SELECT domains FROM tls_policies")] == [names]
    assert cli.sql("SELECT id, mode, status, shared FROM tls_policies") == [(done.json["id"], "auto", "pending", 1)]
    assert cli.audited() == ["policy.added"]


def test_a_manual_policy_may_hold_a_wildcard(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its certificate is uploaded."""
    monkeypatch.setenv("CERTWORKER_ACME_PRIVATE_CA", "false")
    assert cli("policy", "add", "*.corp.test", "--mode", "manual").code == 0
    assert cli("renew", "--dry-run", "--json").json == {**NOTHING, "would_renew": []}


def test_list_and_show(cli: Cli) -> None:
    """Both forms of output; by id, by name, by name in Unicode or capitals."""
    assert cli("policy", "list", "--json").json == []
    first, second = add(cli, "a.test"), add(cli, "münchen.test", "b.test")

    listed = cli("policy", "list", "--json").json
    assert {one["id"]: one["names"] for one in listed} == {
        first: ["a.test"], second: ["xn--mnchen-3ya.test", "b.test"],
    }  # fmt: skip
    text = cli("policy", "list").out
    assert text.startswith("2 policies")
    assert first in text
    assert "xn--mnchen-3ya.test" in text.replace("\n", "")
    for key in (second, second.upper(), "b.test", "B.TEST", "münchen.test", "xn--mnchen-3ya.test"):
        assert cli("policy", "show", key, "--json").json["id"] == second
    assert set(cli("policy", "show", first, "--json").json) == {
        "id", "names", "mode", "status", "shared", "paused_at", "refused_names", "lineages",
    }  # fmt: skip
    assert f"policy {first}  mode auto  status pending" in cli("policy", "show", "a.test").out


@pytest.mark.parametrize("verb", ["show", "pause", "resume", "remove"])
def test_an_unknown_policy_is_named(cli: Cli, verb: str) -> None:
    """By name, by id, by something that is neither; nothing changes."""
    content = cli.content()
    for key in ("nobody.test", "00000000-0000-4000-8000-000000000000", "x\ny", ""):
        cli("policy", verb, key).refused(2, f"policy {key!r}", "there is none")
    assert cli.content() == content


def test_a_name_that_two_want_needs_an_id(cli: Cli) -> None:
    """The message lists them."""
    ids = [add(cli, "a.test"), add(cli, "a.test", "b.test")]

    cli("policy", "remove", "a.test").refused(2, "2 policies want this name", *ids)
    assert cli("policy", "remove", ids[0]).code == 0
    assert cli("policy", "show", "a.test", "--json").json["id"] == ids[1]


def test_pause_resume_remove(cli: Cli) -> None:
    """Each says what it did, leaves an audit row by the operator, and may be repeated."""
    policy_id = add(cli, "a.test")

    assert cli("policy", "pause", "a.test").out == f"paused policy {policy_id}\n"
    assert cli("policy", "pause", policy_id).code == 0
    assert cli("policy", "list", "--json").json[0]["paused_at"] is not None
    assert "(paused)" in cli("policy", "list").out
    assert cli("status", "--json").json["policies"][0]["paused"] is True
    assert cli("renew", "--dry-run", "--json").json["would_renew"] == []
    assert cli("policy", "resume", "a.test").out == f"resumed policy {policy_id}\n"
    assert cli("policy", "list", "--json").json[0]["paused_at"] is None
    assert cli("policy", "remove", "a.test").out == f"removed policy {policy_id}: a.test\n"
    assert cli("policy", "list", "--json").json == []

    assert [name for name in cli.audited() if name.startswith("policy.")] == [
        "policy.added", "policy.paused", "policy.resumed", "policy.removed",
    ]  # fmt: skip
    assert cli.sql("SELECT DISTINCT actor FROM audit_logs WHERE action LIKE 'policy.%ed'") == [("operator",)]


# -- status and renew ----------------------------------------------------------------------------------


def test_status_has_the_contracts_shape(cli: Cli) -> None:
    """Every key that design section 8 names, empty or not."""
    empty = cli("status", "--json")
    assert (empty.code, empty.err) == (0, "")
    assert {"policies", "lineages", "nodes"} <= set(empty.json)
    assert empty.json["policies"] == empty.json["lineages"] == empty.json["nodes"] == []

    policy_id = add(cli, "a.test", "b.test")
    assert cli("renew", "--dry-run").code == 0  # takes the policy over
    cli.sql(
        "INSERT INTO node_status (id, node_id, heartbeat_at) VALUES (?, 'edge-1', '2020-01-01T00:00:00.000000Z')",
        "00000000-0000-4000-8000-000000000001",
    )
    document = cli("status", "--json").json
    policy, node = document["policies"][0], document["nodes"][0]
    assert {key: policy[key] for key in ("id", "names", "mode", "status")} == {
        "id": policy_id, "names": ["a.test", "b.test"], "mode": "auto", "status": "pending",
    }  # fmt: skip
    assert sorted(lineage["names"] for lineage in document["lineages"]) == [["a.test"], ["b.test"]]
    for lineage in document["lineages"]:
        assert {"id", "names", "status", "error", "next_check_at", "served_at"} <= set(lineage)
    assert {"node_id", "version_id", "revision", "heartbeat_at", "live", "error"} <= set(node)
    assert (node["node_id"], node["live"]) == ("edge-1", False)
    text = cli("status").out
    assert "1 policy" in text
    assert "2 certificates wanted" in text
    assert "1 node" in text


def test_status_of_one_name(cli: Cli) -> None:
    """Only what has to do with it; an unknown or impossible one is exit code 2."""
    add(cli, "a.test", "b.test")
    add(cli, "c.test")
    cli("renew", "--dry-run")

    document = cli("status", "A.test", "--json").json
    assert [policy["names"] for policy in document["policies"]] == [["a.test", "b.test"]]
    assert [lineage["names"] for lineage in document["lineages"]] == [["a.test"]]
    cli("status", "nobody.test").refused(2, "name 'nobody.test'", "no policy wants it")
    cli("status", "a..b").refused(2, "name 'a..b'", "empty label")


def test_what_another_program_wrote_wrong_is_explained(cli: Cli) -> None:
    """The policy is in error with the refused name and its rule; the others go on."""
    now = "2026-01-01T00:00:00.000000Z"
    cli.sql(
        "INSERT INTO tls_policies (id, mode, domains, status, created_at, updated_at) "
        "VALUES (?, 'auto', ?, 'pending', ?, ?)",
        "00000000-0000-4000-8000-000000000001", json.dumps(["a..b", "fine.test"]), now, now,
    )  # fmt: skip
    add(cli, "good.test")

    would = cli("renew", "--dry-run", "--json").json["would_renew"]
    assert {"good.test", "fine.test"} == {entry["name"] for entry in would}
    policy = cli("policy", "show", "fine.test", "--json").json
    assert policy["status"] == "error"
    assert [refused["value"] for refused in policy["refused_names"]] == ["a..b"]
    assert "empty label" in policy["refused_names"][0]["rule"]
    assert "refused 'a..b'" in cli("status").out
    assert "policy.error" in cli.audited()


def test_what_no_terminal_can_show_is_escaped(cli: Cli) -> None:
    """Half a character is JSON to SQLite; no command ends over it, and what is printed as JSON is JSON."""
    domains = '["\\ud800.test"]'
    cli.sql(
        "INSERT INTO tls_policies (id, mode, domains, status) VALUES (?, 'auto', ?, 'pending')", str(uuid4()), domains
    )
    text, document = cli.start("policy", "list"), cli.start("policy", "list", "--json")

    assert r"\ud800.test" in text.communicate(timeout=LIMIT)[0]
    (policy,) = json.loads(document.communicate(timeout=LIMIT)[0])
    assert (policy["names"], text.returncode, document.returncode) == (["\ud800.test"], 0, 0)


def test_a_dry_run_asks_nobody(cli: Cli) -> None:
    """The directory's port is closed and nothing minds; it only says what is due, and why."""
    add(cli, "a.test", "b.test")

    done = cli("renew", "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == {
        **NOTHING, "would_renew": [{"name": "a.test", "reason": "first"}, {"name": "b.test", "reason": "first"}],
    }  # fmt: skip
    assert cli("renew", "b.test", "--dry-run").out == "would renew b.test (first)\n1 would be renewed, 0 unchanged\n"
    assert cli.sql("SELECT count(*) FROM issuances") == [(0,)]


def test_nothing_due_is_nothing_to_do(cli: Cli) -> None:
    """Exit code 0, four keys."""
    done = cli("renew", "--json")

    assert (done.code, done.err) == (0, "")
    assert done.json == {"renewed": [], "failed": [], "waiting": [], "unchanged": 0}
    assert cli("renew").out == "0 renewed, 0 failed, 0 waiting, 0 unchanged\n"


def test_an_unknown_name_renews_nothing(cli: Cli) -> None:
    """Exit code 2 even beside a known one; nothing is queued."""
    add(cli, "a.test")

    cli("renew", "a.test", "nobody.test").refused(2, "name 'nobody.test'", "no policy wants")
    cli("renew", "a..b").refused(2, "name 'a..b'")
    assert cli.sql("SELECT count(*) FROM issuances") == [(0,)]


def test_an_unreachable_ca_is_waiting_with_its_reason(cli: Cli) -> None:
    """After the timeout: exit code 1, class, detail, next attempt and hint."""
    add(cli, "a.test")

    done = cli("renew", "--timeout", "3", "--json")
    assert done.code == 1
    assert (done.json["renewed"], done.json["failed"]) == ([], [])
    waiting = done.json["waiting"][0]
    assert waiting["name"] == "a.test"
    assert set(waiting["error"]) >= {"class", "type", "detail", "retry_at", "hint"}
    assert "127.0.0.1:9" in waiting["error"]["detail"]
    text = cli("status").out
    assert "hint:" in text
    assert "next attempt:" in text
