"""Where certworker's time goes: py-spy samples of `certworker renew`, by what it was at and with what.

A sample is the thread that held Python's lock, of which there is one at a time: what all threads together are short of.
SQLite's own work, PostgreSQL's, TLS and signatures run without it and are not seen here. Sampling slows the process
down, so nothing else is timed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tests.bench.contestants import CONTESTANTS, PEERS, Job, Task
from tests.bench.race import Run, Terms, run_once

RATE = 200

AT = {
    "start: imports": r"_find_and_load",
    "policies become lineages (reconcile)": r"\((\S*/)?steps/reconcile\.py",
    "scan, tickets (request)": r"\((\S*/)?steps/(scan|renew)\.py:.*|request \((\S*/)?certworker/steps/renew\.py",
    "renewal information (refresh_ari)": r"\((\S*/)?steps/refresh_ari\.py",
    "an issuance moves (crew)": r"\((\S*/)?steps/crew\.py",
    "responder": r"\((\S*/)?certworker/responder\.py",
    "the command looks (oneshot)": r"\((\S*/)?certworker/oneshot\.py",
}
WITH = {
    "SQL: statements built, sent, read": r"sqlalchemy|psycopg|sqlite|store/database\.py",
    "signing": r"ca/jws\.py|josepy|AccountKey",
    "TLS and HTTP": r"ca/(transport|connection|proxies|headers)\.py|http/client\.py|ssl\.py|socket(server)?\.py",
    "answers read": r"ca/(messages|fields)\.py|json/",
    "keys, CSR, chain, seal": r"ca/(csr|keys)\.py|core/certificate\.py|store/seal\.py|cryptography",
}
"""The first that matches any frame of the stack."""


def profile(database: str, count: int, terms: Terms, folder: Path) -> tuple[Run, Counter[tuple[str, str]]]:
    """Run `certworker renew` under py-spy; return the run, and samples by what it was at and with what."""
    name = "certworker-pg" if database == "postgresql" else "certworker"
    samples = folder / "samples.txt"

    def prepare(task: Task) -> Job:
        job = CONTESTANTS[name].prepare(task)
        spy = [str(PEERS / "py-spy"), "record", "--format", "raw", "--full-filenames", "--gil", "--rate", str(RATE)]
        return replace(job, argv=[*spy, "--output", str(samples), "--", *job.argv])

    run = run_once(name, replace(CONTESTANTS[name], prepare=prepare), count, terms)
    lines = samples.read_text().splitlines()
    samples.unlink()
    return run, share(lines)


def share(lines: Iterable[str]) -> Counter[tuple[str, str]]:
    """Sort py-spy's raw stacks, `frame;frame;... count` with the outermost first."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        stack, _, samples = line.rpartition(" ")
        found[_first(AT, stack), _first(WITH, stack)] += int(samples)
    return found


def _first(kinds: dict[str, str], stack: str) -> str:
    return next((name for name, pattern in kinds.items() if re.search(pattern, stack)), "else")


def table(run: Run, found: Counter[tuple[str, str]]) -> list[str]:
    """Return the lines of a Markdown table in milliseconds for each certificate."""
    each = 1000 / RATE / run.count
    kinds = [kind for kind in [*WITH, "else"] if any(key[1] == kind for key in found)]
    lines = [f"| ms/cert with the GIL | {' | '.join(kinds)} | all |", f"| --- |{' --- |' * (len(kinds) + 1)}"]
    for at in [*AT, "else"]:
        row = [found[at, kind] * each for kind in kinds]
        if any(row):
            lines.append(f"| {at} | {' | '.join(f'{value:.1f}' for value in [*row, sum(row)])} |")
    whole = [sum(n for key, n in found.items() if key[1] == kind) * each for kind in kinds]
    lines.append(f"| all | {' | '.join(f'{value:.1f}' for value in [*whole, sum(whole)])} |")
    return lines
