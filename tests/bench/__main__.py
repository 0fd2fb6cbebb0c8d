"""`python -m tests.bench [WHAT]`: everything, or race, count, profile, scale.

Results go onto the screen and to .bench/, from where `publish` puts them into docs/performance.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench import profile, report, scale
from tests.bench.contestants import CONTESTANTS, ROOT, certworker
from tests.bench.race import Run, Terms, race, run_once
from tests.conftest import PostgresServer, run_postgres

RESULTS = ROOT / ".bench"
DOCUMENT = ROOT / "docs" / "performance.md"
DURABLE = ("fsync=on", "synchronous_commit=on", "full_page_writes=on", "shared_buffers=512MB", "max_wal_size=4GB")
SUITE = (
    "race minimal certworker certworker-pg certworker-run caddy-free --name n200 --rounds 3",
    "race minimal:1000 certworker-64:1000 certworker:1000 certworker-pg:1000 caddy-free:1000 --name n1000 --rounds 5",
    "race certworker:10000 --name n10000 --rounds 1",
    "race minimal certworker caddy certbot-4 lego-32 acme-16 --name peers --rounds 1",
    "race minimal:256 certworker-256:256 caddy-free:256 --retry-after 3 5 --name waiting --rounds 2",
    "race certworker-run-pg:3000 certworker-run-pg-4:3000 --name workers --rounds 3",
    "race certworker-run-pg:400 certworker-run-pg-4:1600 --delay 0.1 --name far --rounds 1",
    "race certworker-run-pg:200 certworker-run-pg-4:800 --delay 0.3 --name farther --rounds 1",
    "race minimal certworker:200 --delay 0.1 --name delay --rounds 1",
    "count 200",
    "scale 10000 100000 1000000",
)
"""What `make bench` does: every table of docs/performance.md."""


def main() -> int:
    """Read the command line and do what it says."""
    RESULTS.mkdir(exist_ok=True)
    return _do(sys.argv[1:])


def _do(words: list[str]) -> int:
    asked = _parser().parse_args(words)
    asked.command = " ".join(["python -m tests.bench", *words])
    done: int = asked.act(asked)
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.set_defaults(act=_suite)
    acts = parser.add_subparsers(title="what")
    listed = acts.add_parser("list", help="who can take part")
    listed.set_defaults(act=_list)
    one = acts.add_parser("race", help="contestants side by side")
    one.add_argument("contestants", nargs="+", metavar="NAME[:N]")
    one.add_argument("--name", default="race", help="of the results, below .bench (race)")
    one.add_argument("--rounds", type=int, default=3, help="(3)")
    one.add_argument("--retry-after", type=int, nargs=2, default=(0, 0), metavar=("AUTHORIZATION", "ORDER"))
    one.add_argument("--delay", type=float, default=0, help="seconds that the CA is farther away (0)")
    one.add_argument("--gomaxprocs", type=int, default=1, help="threads of Pebble (1; 0 is Go's default)")
    one.set_defaults(act=_race)
    count = acts.add_parser("count", help="statements, commits and requests per certificate")
    count.add_argument("counts", nargs="*", type=int, default=[200], metavar="N")
    count.set_defaults(act=_count)
    where = acts.add_parser("profile", help="what the time goes to, by py-spy")
    where.add_argument("counts", nargs="*", type=int, default=[200], metavar="N")
    where.set_defaults(act=_profile)
    big = acts.add_parser("scale", help="scan, claim and start with many lineages")
    big.add_argument("sizes", nargs="*", type=int, default=[10_000, 100_000, 1_000_000], metavar="LINEAGES")
    big.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    big.set_defaults(act=_scale)
    publish = acts.add_parser("publish", help="write what is in .bench into docs/performance.md and its picture")
    publish.set_defaults(act=_publish)
    return parser


def _list(_asked: argparse.Namespace) -> int:
    for name, contestant in CONTESTANTS.items():
        absent = "" if contestant.is_here else f"; left out, {contestant.needs} is not here: tools/install-peers"
        print(f"{name:<20} N = {contestant.count:<5} {contestant.what}{absent}")
    return 0


def _suite(_asked: argparse.Namespace) -> int:
    return max(_do(line.split()) for line in SUITE)


def _race(asked: argparse.Namespace) -> int:
    entries, runs = list(_present(asked.contestants)), list[dict[str, Any]]()

    def note(run: Run) -> None:
        _tell(run)
        runs.append(run.document())
        _keep(asked.name, runs=runs, command=asked.command)

    with run_postgres(*DURABLE) as postgres:
        race(entries, asked.rounds, Terms(postgres, tuple(asked.retry_after), asked.delay, asked.gomaxprocs, note))
    print("\n".join(report.race_table(runs)))
    return 0


def _present(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    for word in words:
        name, _, count = word.partition(":")
        contestant = CONTESTANTS[name]
        if contestant.is_here:
            yield name, int(count or contestant.count)
        else:
            print(f"{name} is left out: {contestant.needs} is not here, see tools/install-peers", file=sys.stderr)


def _tell(run: Run) -> None:
    asked = sum(run.requests.values()) / run.count
    print(
        f"{run.contestant:<20} {run.issued}/{run.count} in {run.seconds:.2f} s, {run.rate:.1f}/s, "
        f"{asked:.2f} requests, {run.client_cpu / run.count * 1000:.1f} ms, {run.rss_mib:.0f} MiB, load {run.load} "
        f"{run.fault}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    if run.fault:
        print(run.said, file=sys.stderr)


def _count(asked: argparse.Namespace) -> int:
    with run_postgres(*DURABLE) as postgres:
        counts = [_count_one(name, number, postgres) for number in asked.counts for name in ("sqlite", "postgresql")]
    _keep("counts", counts=counts)
    for one in counts:
        print(f"\n{one['database']}, {one['count']} certificates")
        for kind in ("statements", "changing commits", "reading commits"):
            for what, times in one[kind]["by"].items():
                if times >= one["count"] / 10:
                    print(f"  {times / one['count']:6.2f} {kind}: {what}")
    print("\n".join(report.count_table(counts)))
    return 0


def _count_one(database: str, count: int, postgres: PostgresServer) -> dict[str, Any]:
    path = RESULTS / "counted.json"
    on_postgresql = database == "postgresql"
    contestant = replace(
        CONTESTANTS["certworker"], postgresql=on_postgresql,
        prepare=lambda task: certworker(task, "tests.bench.counted", str(path), "renew"),
    )  # fmt: skip
    run = run_once("certworker", contestant, count, Terms(postgres))
    assert not run.fault, run
    counted = json.loads(path.read_text())
    path.unlink()
    return {"database": database, "count": count, "requests": sum(run.requests.values()), **counted}


def _profile(asked: argparse.Namespace) -> int:
    with run_postgres(*DURABLE) as postgres:
        for number in asked.counts:
            for database in ("sqlite", "postgresql"):
                run, found = profile.profile(database, number, Terms(postgres), RESULTS)
                assert not run.fault, run
                print("\n".join(["", f"{database}, {number} certificates", "", *profile.table(run, found)]))
    return 0


def _scale(asked: argparse.Namespace) -> int:
    path = RESULTS / "scale.json"
    kept = json.loads(path.read_text())["figures"] if path.exists() else []
    found = {(one["database"], one["lineages"]): one for one in kept}
    for database in asked.database or ["sqlite", "postgresql"]:
        for lineages in asked.sizes:
            with _database(database) as (folder, url):
                figures = scale.measure(folder, url, lineages)
            found[database, lineages] = {"database": database, "lineages": lineages, "figures": figures}
            print(json.dumps(found[database, lineages]), file=sys.stderr, flush=True)
            in_order = sorted(found.values(), key=lambda one: (one["database"] != "sqlite", one["lineages"]))
            _keep("scale", figures=in_order)
    print("\n".join(report.scale_table(in_order)))
    return 0


@contextmanager
def _database(kind: str) -> Iterator[tuple[Path, str]]:
    folder = RESULTS / "scale"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        if kind == "sqlite":
            yield folder, ""
        else:
            with run_postgres(*DURABLE) as postgres:
                yield folder, postgres.url(postgres.create_database())
    finally:
        shutil.rmtree(folder)


def _keep(name: str, **what: Any) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": report.machine(), **what}, indent=1))


def _publish(_asked: argparse.Namespace) -> int:
    """Put each result between its marks; what was not measured stays as it is."""
    text, pictured = DOCUMENT.read_text(), []
    tables: dict[str, Callable[[Any], list[str]]] = {
        "runs": report.race_table, "counts": report.count_table, "figures": report.scale_table
    }  # fmt: skip
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        kind = next(key for key in tables if key in found)
        text = _between(text, path.stem, "\n".join([*tables[kind](found[kind]), "", _measured(found)]))
        if path.stem in ("peers", "n200", "n1000"):
            pictured += found["runs"]
        text = _between(text, "machine", "\n".join(report.machine_table(found["machine"])))
        kept = DOCUMENT.with_suffix("") / path.name
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    DOCUMENT.write_text(text)
    if pictured:
        DOCUMENT.with_suffix(".svg").write_text(report.picture(pictured))
    return 0


def _measured(found: dict[str, Any]) -> str:
    command = f"with `{found['command']}`, " if "command" in found else ""
    loads = [run["load"] for run in found.get("runs", [])]
    load = f", load average before the runs {min(loads)} to {max(loads)}" if loads else ""
    return f"Measured {command}at commit {found['machine']['commit']}{load}."


def _between(text: str, name: str, what: str) -> str:
    begin, end = f"<!-- bench: {name} -->", f"<!-- end: {name} -->"
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{what}\n{end}{rest.split(end, 1)[1]}"


if __name__ == "__main__":
    sys.exit(main())
