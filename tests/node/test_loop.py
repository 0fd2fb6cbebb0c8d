"""An agent that goes on whatever it meets."""

import logging
import random
from collections.abc import Callable
from datetime import timedelta

import pytest

from certworker.core.rollout import Cursor, Heartbeat
from certworker.errors import ControlPlaneError
from certworker.node.loop import FIRST_PAUSE, LONGEST_PAUSE, Loop

WELL = Heartbeat("gw1", "v", 1, Cursor(1, 2), "haproxy")
ILL = Heartbeat("gw1", "v", 1, Cursor(1, 2), "haproxy", error="port 80: taken")


class World:
    """Steps that end as a test says."""

    def __init__(self) -> None:
        self.steps: list[Heartbeat | Exception] = []
        self.waits: list[Cursor] = []
        self.heartbeat_every = timedelta(seconds=7)

    def step(self) -> Heartbeat:
        done = self.steps.pop(0)
        if isinstance(done, Exception):
            raise done
        return done

    def wait(self, cursor: Cursor) -> None:
        self.waits.append(cursor)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def turn(world: World) -> Callable[[], timedelta]:
    return Loop(world, world, random.Random(1))._turn  # type: ignore[arg-type]


def test_after_a_step_it_waits_for_news(world: World, turn: Callable[[], timedelta]) -> None:
    world.steps = [WELL]

    assert turn() == timedelta()
    assert world.waits == [WELL.cursor]


def test_trouble_is_not_tried_in_a_circle(world: World, turn: Callable[[], timedelta]) -> None:
    """What was refused would be news again at once."""
    world.steps = [ILL]

    assert turn() == world.heartbeat_every
    assert world.waits == []


def test_a_control_plane_that_is_away_is_asked_ever_more_seldom(world: World, turn: Callable[[], timedelta]) -> None:
    """By chance, so that a fleet does not come back in step; and after a success from the start."""
    world.steps = [ControlPlaneError("away") for _ in range(20)]
    pauses = [turn() for _ in range(20)]
    for number, pause in enumerate(pauses):
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses[10:])) > 1

    world.steps = [WELL, ControlPlaneError("away")]
    turn()
    assert turn() <= FIRST_PAUSE


def test_a_bug_does_not_end_it(world: World, turn: Callable[[], timedelta], caplog: pytest.LogCaptureFixture) -> None:
    world.steps = [ZeroDivisionError("oops"), WELL]
    turn()

    assert turn() == timedelta()
    assert "agent.bug" in caplog.text


def test_what_is_wrong_is_said_once(
    world: World, turn: Callable[[], timedelta], caplog: pytest.LogCaptureFixture
) -> None:
    """And that it is over."""
    world.steps = [ILL, ILL, ControlPlaneError("away"), WELL, WELL]
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            turn()

    said = [(record.message, getattr(record, "error", None)) for record in caplog.records]
    assert said == [
        ("agent.trouble", "port 80: taken"), ("agent.serves", None), ("agent.trouble", "away"), ("agent.well", None)
    ]  # fmt: skip
