"""Gateways with one route and with hostile values, for the tests of both renderers."""

from hypothesis import strategies as st

from certworker.core.snapshot import Listener, Match, Pool, Route, Snapshot, Target
from tests.node.conftest import uuid

nasty = st.text(alphabet="/abz'\"\\$#{}()[]|%;!-_.~ \n\r\t\x00é&<>*?+,=:@^", min_size=1, max_size=40)
hosts = nasty | st.from_regex(r"(\*\.)?[a-z0-9.-]{1,20}", fullmatch=True)
paths = st.tuples(st.sampled_from(["exact", "prefix", "regex"]), nasty | nasty.map("/{}".format))


def one_route(match: Match, kind: str = "path") -> Snapshot:
    target = Target(id=uuid(3), host="10.0.0.1", port=80)
    route = Route.model_validate({"id": uuid(2), "type": kind, "match": match, "priority": 1, "pool_id": uuid(4)})
    listener = Listener(id=uuid(1), port=80, protocol="http", routes=(route,))
    return Snapshot(listeners=(listener,), pools=(Pool(id=uuid(4), policy="weighted", targets=(target,)),))
