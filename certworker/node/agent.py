"""The agent's loop body: look at what is wanted, take the next steps towards it, say what was proved.

A version and the certificates come separately. Certificates change while the proxy runs; a version
is applied with a reload, and one that is refused is not tried again until there is a newer one (or
the agent starts anew, when somebody may have made room for it).
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

from certworker.core.rollout import CertificateChanges, Heartbeat
from certworker.core.snapshot import check_host
from certworker.errors import CheckRefused, CommandRefused, NodeError, PairRefused
from certworker.node.apply import (
    Proxy,
    challenge_ports,
    expect,
    hand_over,
    ignored_rows,
    plan_lists,
    stage_version,
    switch_version,
)
from certworker.node.control import PublishedVersion, Source
from certworker.node.folder import Folder
from certworker.node.pairs import render_pair
from certworker.node.patience import Patience
from certworker.node.probe import (
    SAMPLE,
    SETTLE_LIMIT,
    Expectation,
    ExpectedAnswer,
    Probe,
    probe_tls,
    prove,
    prove_answers,
)
from certworker.node.state import HeldCertificate, Lists, State, load_state, save_state

MOST_TOLD = 10_000
"""Fingerprints, and faults of each kind, in one heartbeat: a first start may prove a million, or fail to."""
MOST_WARNINGS = 100
HOT_LIMIT = 500
"""Above that many changed lines one reload is cheaper than as many commands."""

_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
"""A SHA-256 in base64url (RFC 8555 §8.1)."""
_NOT_RUNNING = "the proxy does not run"


class Agent:
    """One node: a folder, a proxy, and where its orders come from.

    It holds the folder's lock from the start until `close`; the proxy runs on without it.
    """

    def __init__(
        self,
        node_id: str,
        source: Source,
        folder: Folder,
        proxy: Proxy,
        patience: Patience,
        chance: random.Random,
        probe: Probe = probe_tls,
    ) -> None:
        self._proxy_name = proxy.describe()
        folder.lock()
        self._node_id = node_id
        self._source = source
        self._folder = folder
        self._proxy = proxy
        self._patience = patience
        self._chance = chance
        self._probe = probe
        self._state = load_state(folder)
        self._refused: tuple[str, str] | None = None
        """Id of the version that was refused last, and why."""
        self._unread = False
        """Whether the files were written anew and the proxy has not read them yet."""
        self._settled = False
        """Whether the running proxy has been compared with the folder since the agent started."""
        self._proved: dict[str, str] = {}
        """Certificate id -> fingerprint, of what was proved since the last report."""
        self._warnings: tuple[str, ...] = ()

    def step(self) -> Heartbeat:
        """Take over what is wanted now, and report. An unreachable source leaves the proxy as it is."""
        troubles = [self._attempt(self._tend)]
        changes = self._source.changes_after(self._state.cursor)
        troubles.append(self._attempt(lambda: self._take_certificates(changes)))
        troubles.append(self._attempt(lambda: self._take_version(self._source.published())))
        self._proxy.tidy()
        heartbeat = self._heartbeat([trouble for trouble in troubles if trouble])
        self._source.report(heartbeat)
        self._proved = {}
        return heartbeat

    @property
    def serving(self) -> bool:
        """Whether the proxy runs now, whoever started it."""
        return self._proxy.running()

    def stop(self) -> None:
        """End the proxy. What it served is served again by the next step."""
        self._proxy.stop()

    def close(self) -> None:
        """Leave the folder to another agent; the proxy runs on."""
        self._folder.unlock()

    def _attempt(self, move: Callable[[], None]) -> str | None:
        try:
            move()
        except (NodeError, OSError) as refused:
            return str(refused)
        return None

    def _tend(self) -> None:
        """See that the proxy runs, and that it runs what the folder says."""
        version = self._state.version
        if version is None:
            return
        if not self._settled or self._proxy.is_outdated():
            self._unread |= self._restore_files(version)
        if not self._proxy.running():
            self._proxy.start()
        elif self._unread or self._proxy.why_not_served(version.number) is not None:
            self._proxy.reload()
        self._unread = False
        self._settled = True

    def _restore_files(self, version: PublishedVersion) -> bool:
        """Write what the state says, and return whether the proxy may run anything else."""
        rendered = self._proxy.render(version.snapshot, version.number)
        kept = self._folder.holds_version(version.folder_name, rendered)
        if not kept:
            self._folder.write_version(version.folder_name, rendered)
        self._folder.point_at(version.folder_name)
        lists = plan_lists(self._state)
        self._proxy.write_lists(lists)
        return not kept or not self._proxy.serves(lists)

    def _take_certificates(self, changes: CertificateChanges) -> None:
        """Serve what changed, prove it, and only then move the cursor."""
        wanted = self._serve(self._merge(changes))
        fresh = {name for name, one in wanted.held.items() if one != self._state.held.get(name)}
        new_rows = dict(wanted.thumbprints.items() - self._state.thumbprints.items())
        self._keep(self._prove_answers(self._prove(wanted, fresh), new_rows.keys()))

    def _merge(self, changes: CertificateChanges) -> State:
        """Return the state with the changes in it; a pair that is refused leaves the one before it."""
        held, refused = dict(self._state.held), dict(self._state.refused)
        for one in changes.changed:
            try:
                file = self._folder.write_certificate(render_pair(one))
                self._proxy.check_pair(file)
            except PairRefused as refusal:
                refused[one.id] = str(refusal)
                continue
            refused.pop(one.id, None)
            held[one.id] = HeldCertificate(
                one.id, one.policy_ids, one.dns_names, one.fingerprint, one.expires_at, one.wanted, file
            )
        gone = changes.removed
        if changes.complete:
            gone |= {*held, *refused} - {one.id for one in changes.changed}
        unproved = {name: why for name, why in self._state.unproved.items() if name not in gone}
        for name in gone:
            held.pop(name, None)
            refused.pop(name, None)
        merged = replace(self._state, cursor=changes.cursor, held=held, refused=refused, unproved=unproved)
        return _merge_thumbprints(merged, changes)

    def _serve(self, wanted: State) -> State:
        """Bring the lists, on disk and in the running proxy, to what `wanted` says."""
        before, after = plan_lists(self._state), plan_lists(wanted)
        if before == after:
            return wanted
        self._proxy.write_lists(after)
        if not self._settled:
            return wanted  # the next start reads them
        try:
            self._swap(before, after)
        except CommandRefused:
            return self._serve_by_reload(wanted, before)
        return wanted

    def _swap(self, before: Lists, after: Lists) -> None:
        if before.changes_to(after) > HOT_LIMIT:
            raise CommandRefused("too many lines changed at once")
        self._proxy.swap(before, after)

    def _serve_by_reload(self, wanted: State, before: Lists) -> State:
        try:
            wanted = self._screen(wanted, self._folder.current)
            self._proxy.reload()
        except NodeError:
            self._proxy.write_lists(before)
            raise
        return wanted

    def _screen(self, wanted: State, version: Path) -> State:
        """Write the lists for `version` without the certificates that the proxy itself refuses.

        One customer's weak key must not keep a node from starting.
        """
        while True:
            self._proxy.write_lists(plan_lists(wanted))
            try:
                self._warnings = self._proxy.check(version)
            except CheckRefused as refusal:
                bad = {name for name, one in wanted.held.items() if one.file in refusal.files}
                if not bad:
                    raise
                wanted = self._without(wanted, bad, str(refusal))
            else:
                return wanted

    def _without(self, wanted: State, bad: set[str], why: str) -> State:
        """Return `wanted` with the certificates in `bad` as they were before, or without them."""
        held = {name: one for name, one in wanted.held.items() if name not in bad}
        older = {name: self._state.held[name] for name in bad if name in self._state.held}
        held |= {name: one for name, one in older.items() if one != wanted.held[name]}
        said = {name: f"certificate {name}: is its key or signature too weak? {why}" for name in bad}
        return replace(wanted, held=held, refused={**wanted.refused, **said})

    def _prove(self, state: State, fresh: Iterable[str]) -> State:
        """Return the state with what handshakes said about `fresh` and about what was not proved before."""
        fresh = set(fresh)
        if not self._settled:
            return replace(state, unproved={**state.unproved, **dict.fromkeys(fresh, _NOT_RUNNING)})
        doubtful = fresh | state.unproved.keys()
        expected = expect(state.version, state.held, doubtful) if doubtful else []
        if not expected:
            return replace(state, unproved={})
        # What failed its proof long ago is looked at once; what is new may take a moment.
        faults = self._ask(expected, SETTLE_LIMIT if fresh else timedelta())
        if self._proxy.managed and faults.keys() & fresh:
            # What was swapped in while running does not show: take everything over from the files.
            self._proxy.reload()
            faults = self._ask(expected, SETTLE_LIMIT)
        self._proved |= {one.certificate_id: one.fingerprint for one in expected if one.certificate_id not in faults}
        return replace(state, unproved=faults)

    def _prove_answers(self, state: State, fresh: AbstractSet[str]) -> State:
        """Return the state with what was answered to challenges for `fresh` and for what was not proved before."""
        names = state.thumbprints.keys() & (fresh | state.unanswered.keys())
        refused = {name: why for name, why in state.unanswered.items() if name not in state.thumbprints}
        ports = challenge_ports(state.version)
        if not self._settled:
            return replace(state, unanswered=refused | dict.fromkeys(names, _NOT_RUNNING))
        if not ports:
            return replace(state, unanswered=refused)  # the responders answer, for every name
        expected = [ExpectedAnswer(port, name, state.thumbprints[name]) for port in ports for name in sorted(names)]
        limit = SETTLE_LIMIT if fresh else timedelta()
        faults = prove_answers(expected, self._patience, self._chance, limit)
        return replace(state, unanswered={**refused, **faults})

    def _ask(self, expected: Sequence[Expectation], limit: timedelta) -> Mapping[str, str]:
        return prove(expected, self._probe, self._patience, self._chance, limit)

    def _take_version(self, published: PublishedVersion | None) -> None:
        """Apply a version that is not served yet, unless it has been refused."""
        old = self._state.version
        if published is None or (old is not None and published.id == old.id):
            return
        if self._refused is not None and self._refused[0] == published.id:
            return
        remarks = self._warnings
        try:
            self._keep(self._apply(published, old))
        except NodeError as refused:
            self._warnings = remarks
            if not self._proxy.managed:
                # The trouble may be of the operator's own files, and has nothing to do with the version.
                self._proxy.write_lists(plan_lists(self._state))
                raise
            self._refused = published.id, str(refused)
        else:
            self._refused = None

    def _apply(self, published: PublishedVersion, old: PublishedVersion | None) -> State:
        staged = stage_version(self._folder, self._proxy, published)
        wanted = self._screen(replace(self._state, version=published), staged)
        if self._proxy.managed:
            switch_version(self._folder, self._proxy, published, old, lambda: self._verify(wanted))
        else:
            hand_over(self._folder, self._proxy, published, old)
        self._settled = True
        proved = self._prove(wanted, wanted.held.keys() - self._shown(self._state))
        return self._prove_answers(proved, wanted.thumbprints.keys())

    def _verify(self, wanted: State) -> None:
        """Raise `NodeError` if a sample of the certificates, as far as they were proved, is not shown."""
        sound = sorted(self._shown(self._state) & wanted.held.keys())
        sample = self._chance.sample(sound, min(SAMPLE, len(sound)))
        if faults := self._ask(expect(wanted.version, wanted.held, sample), SETTLE_LIMIT):
            raise NodeError(next(iter(faults.values())))

    def _shown(self, state: State) -> set[str]:
        """Return the ids of the certificates that some listener has been proved to show."""
        listed = {one.certificate_id for one in expect(state.version, state.held, state.held)}
        return listed - state.unproved.keys()

    def _keep(self, state: State) -> None:
        if state != self._state:
            save_state(self._folder, state)
            self._state = state
            self._collect()

    def _collect(self) -> None:
        """Remove the files that nothing refers to."""
        version = self._state.version
        self._folder.collect(
            {
                self._folder.certs: {one.file.rpartition("/")[2] for one in self._state.held.values()},
                self._folder.lists: self._proxy.list_names(plan_lists(self._state)),
                self._folder.versions: set() if version is None else {version.folder_name},
            }
        )

    def _heartbeat(self, troubles: list[str]) -> Heartbeat:
        served = self._state.version
        if served is not None and (why := self._proxy.why_not_served(served.number)) is not None:
            served = None
            troubles = [*troubles, why]
        if self._refused is not None:
            troubles = [self._refused[1], *troubles]
        unserved, unanswered = self._unserved(served), self._state.unanswered
        return Heartbeat(
            node_id=self._node_id,
            version_id=served.id if served else None,
            version_number=served.number if served else None,
            cursor=self._state.cursor,
            proxy=self._proxy_name,
            fingerprints=_first(self._proved),
            unserved=_first(unserved),
            refused=_first(self._state.refused),
            refused_version_id=None if self._refused is None else self._refused[0],
            unanswered=_first(unanswered),
            untold=sum(max(0, len(faults) - MOST_TOLD) for faults in (unserved, unanswered)),
            warnings=(self._warnings if self._proxy.managed else ignored_rows(self._state.version))[:MOST_WARNINGS],
            error=troubles[0] if troubles else None,
        )

    def _unserved(self, served: PublishedVersion | None) -> dict[str, str]:
        held = self._state.held
        expected = expect(served, held, held)
        listed, answered = {one.certificate_id for one in expected}, {one.dns_name for one in expected}
        why = "no https listener that is served answers its names"
        # Where other certificates answer all of its names, for longer, there is nothing to mend.
        nowhere = {
            name: why for name, one in held.items() if name not in listed and not answered.issuperset(one.dns_names)
        }
        hint = f"; {self._proxy.hint}" if self._proxy.hint else ""
        unproved = {name: f"{why}{hint}" for name, why in self._state.unproved.items()}
        return {**nowhere, **unproved, **self._state.refused}


def _first(told: Mapping[str, str]) -> dict[str, str]:
    return dict(islice(told.items(), MOST_TOLD))


def _merge_thumbprints(state: State, changes: CertificateChanges) -> State:
    """Return the state with the changed rows in it; a row that no proxy can be given is left out and named."""
    gone = changes.removed_hosts
    if changes.complete:
        gone |= (state.thumbprints.keys() | state.unanswered.keys()) - changes.thumbprints.keys()
    bad = {name: why for name, value in changes.thumbprints.items() if (why := _find_row_fault(name, value))}
    rows = {**state.thumbprints, **changes.thumbprints}
    return replace(
        state,
        thumbprints={name: value for name, value in rows.items() if name not in gone | bad.keys()},
        unanswered={name: why for name, why in state.unanswered.items() if name not in gone} | bad,
    )


def _find_row_fault(name: str, thumbprint: str) -> str | None:
    try:
        as_written = check_host(name) == name and "*" not in name
    except ValueError:
        as_written = False
    if not as_written:
        return "no name in A-labels and lower case"
    return None if _THUMBPRINT.fullmatch(thumbprint) else "no thumbprint of an account key"
