"""What was measured as tables, as a picture and as facts of the machine."""

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.contestants import CONTESTANTS, ROOT

Row = Mapping[str, Any]
"""A `race.Run` as a document."""

LIMIT = "minimal"
US = "certworker"


def machine() -> dict[str, Any]:
    """Return what has to be known of the machine and of the programs."""
    model = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ":").partition(":")[2]
    total = next(line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")).split()[1]
    return {
        "cpus": os.cpu_count(), "cpu": model.strip(), "memory_gib": round(int(total) / 2**20),
        "kernel": platform.release().partition("-")[0], "python": platform.python_version(),
        "commit": _said("git", "log", "-1", "--format=%h", "--", "certworker", "migrations"),
        "caddy": _said(".tools/bin/caddy", "version"), "lego": _said(".tools/bin/lego", "--version"),
        "certbot": _said(".tools/peers/bin/certbot", "--version"),
        "postgresql": _said("psql", "--version"), "sqlalchemy": version("sqlalchemy"), "acme": version("acme"),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "not there"
    return (done.stdout + done.stderr).strip().split("\n")[0]


def entries(runs: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Return the runs that count, by contestant and number of certificates."""
    found: dict[tuple[str, int], list[Row]] = {}
    for run in runs:
        if not run["fault"]:
            found.setdefault((run["contestant"], run["count"]), []).append(run)
    return found


def ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> float | None:
    """Return the median, over the rounds that both finished, of how many times as fast ours is."""
    rates = {run["round"]: run["rate"] for run in theirs}
    pairs = [run["rate"] / rates[run["round"]] for run in ours if run["round"] in rates]
    return statistics.median(pairs) if pairs else None


def race_table(runs: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table, slowest first; after it what did not count."""
    found = entries(runs)
    heads = ["contestant", "N", "runs", "certificates/s (least to most)", "of the limit", "certworker is"]
    heads += ["requests/cert", "client ms/cert", "PostgreSQL ms/cert", "peak MiB"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for (name, count), some in sorted(found.items(), key=lambda item: median(item[1], "rate")):
        rates = [run["rate"] for run in some]
        limit, ours = found.get((LIMIT, count)) or _any(found, LIMIT), found.get((US, count)) or _any(found, US)
        lines.append(
            f"| {CONTESTANTS[name].what} (`{name}`) | {count} | {len(some)} "
            f"| {number(statistics.median(rates))} ({number(min(rates))} to {number(max(rates))}) "
            f"| {number(ratio(some, limit))} | {number(ratio(ours, some))} x "
            f"| {median(some, asked) / count:.2f} "
            f"| {median(some, 'client_cpu') / count * 1000:.1f} "
            f"| {median(some, 'postgres_cpu') / count * 1000:.1f} | {median(some, 'rss_mib'):.0f} |"
        )
    bad = [
        f"{run['contestant']} at {run['count']}: {run['fault']} ({run['issued']} issued)"
        for run in runs
        if run["fault"]
    ]
    return lines + (["", f"Run again because it did not count: {'; '.join(bad)}."] if bad else [])


def _any(found: Mapping[tuple[str, int], list[Row]], name: str) -> list[Row]:
    """Return the runs with the fewest certificates, for a contestant whose own number `name` did not run with.

    It may have run under other settings only, and with them a longer name.
    """
    return next((some for (one, _), some in sorted(found.items()) if one.startswith(name)), [])


def median(runs: Sequence[Row], what: str | Callable[[Row], float]) -> float:
    return statistics.median(run[what] if isinstance(what, str) else what(run) for run in runs)


def asked(run: Row) -> int:
    return sum(run["requests"].values())


def number(value: float | None) -> str:
    """Return it with three digits that say something."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine_table(facts: Row) -> list[str]:
    """Return the lines of a table of the machine and the programs."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items() if name != "commit")]


def count_table(counts: Sequence[Row]) -> list[str]:
    """Return the lines of a table of what one certificate costs in SQL and requests."""
    heads = ["database", "N", "statements/cert", "commits that changed something/cert", "that only read/cert"]
    lines = [f"| {' | '.join([*heads, 'requests/cert'])} |", f"|{' --- |' * 6}"]
    for one in counts:
        each = [one[kind]["all"] / one["count"] for kind in ("statements", "changing commits", "reading commits")]
        cells = " | ".join(f"{value:.1f}" for value in each)
        lines.append(f"| {one['database']} | {one['count']} | {cells} | {one['requests'] / one['count']:.2f} |")
    return lines


def scale_table(figures: Sequence[Row]) -> list[str]:
    """Return the lines of a table with a column for each database and size."""
    heads = [f"{one['database']} {size(one['lineages'])}" for one in figures]
    names = list(dict.fromkeys(name for one in figures for name in one["figures"]))
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    return lines + [f"| {name} | {' | '.join(number(one['figures'].get(name)) for one in figures)} |" for name in names]


def size(count: int) -> str:
    return f"{count // 10**6}M" if count >= 10**6 else f"{count // 1000}k" if count >= 1000 else str(count)


def picture(runs: Sequence[Row]) -> str:
    """Return an SVG: certificates per second of each contestant, on a logarithmic scale."""
    found = sorted(entries(runs).items(), key=lambda item: -median(item[1], "rate"))
    left, width, high = 380, 430, 24
    rates = [median(some, "rate") for _, some in found]
    scale = width / max(1.0, _decades(max(rates, default=1)))
    rows = []
    for at, (((name, count), _), rate) in enumerate(zip(found, rates, strict=True)):
        y, long = 40 + at * high, max(2.0, _decades(rate) * scale)
        colour = "#0b7285" if name.startswith(US) else "#868e96" if name == LIMIT else "#ced4da"
        label = escape(f"{CONTESTANTS[name].what.replace('`', '')}, N = {count}")
        rows.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{label}</text>')
        rows.append(f'<rect x="{left}" y="{y}" width="{long:.0f}" height="{high - 7}" fill="{colour}"/>')
        rows.append(f'<text x="{left + long + 6:.0f}" y="{y + 13}">{number(rate)}</text>')
    tall, wide = 50 + len(found) * high, left + width + 70
    box = f'viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="12"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {box}>
<rect width="{wide}" height="{tall}" fill="white"/>
<text x="10" y="22" font-size="14">Certificates per second, median (logarithmic)</text>
{chr(10).join(rows)}
</svg>
"""


def _decades(rate: float) -> float:
    """Return how long a bar is: nothing at one tenth of a certificate per second."""
    return math.log10(max(rate, 0.1) * 10)
