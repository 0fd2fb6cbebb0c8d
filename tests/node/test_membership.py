"""An enrolment that ends well whatever is interrupted, and what a machine keeps of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest

from certworker.core.rollout import Cursor
from certworker.core.transit import EnrolmentToken, EnrolRequest, read_enrolment_token, read_node_token
from certworker.errors import ControlPlaneError, InputError, NodeError
from certworker.node.folder import Folder
from certworker.node.membership import take_membership
from certworker.node.remote import Endpoint
from certworker.node.state import State, load_state, save_state


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def token(number: int = 1) -> EnrolmentToken:
    return EnrolmentToken(
        url="https://cp.test:8401", pin="a" * 64, name="gw1", enrolment_id=uuid(number), secret=str(number) * 43
    )


class Api:
    """The node API's side: remembers what it was asked, and may be away."""

    def __init__(self) -> None:
        self.asked: list[EnrolRequest] = []
        self.away = False

    def __call__(self, endpoint: Endpoint, request: EnrolRequest) -> str:
        self.asked.append(request)
        if self.away:
            raise ControlPlaneError("away")
        return uuid(900)


@pytest.fixture
def folder() -> Iterator[Folder]:
    path = Path(mkdtemp(prefix="cw-"))
    yield Folder(path)
    rmtree(path)


def test_enrolled_once(folder: Folder) -> None:
    """The token may stay in a unit file: it is used once, and what is kept is nobody else's to read."""
    api = Api()
    first = take_membership(folder, token(), api)
    again = take_membership(folder, token(), api)
    without = take_membership(folder, None, api)

    assert first == again == without
    assert len(api.asked) == 1
    assert read_node_token(first.token.text()) == first.token
    assert first.token.secret == api.asked[0].node_secret
    assert (folder.path / "node.json").stat().st_mode & 0o777 == 0o600
    assert token().secret not in (folder.path / "node.json").read_text()
    assert first.secret not in repr(first)
    assert not (folder.path / "enrolling.json").exists()


def test_a_lost_answer_is_asked_for_again(folder: Folder) -> None:
    """With the same secret, with or without the token on the command line."""
    api = Api()
    api.away = True
    for given in (token(), None):
        with pytest.raises(ControlPlaneError):
            take_membership(folder, given, api)
    api.away = False
    member = take_membership(folder, None, api)

    assert {one.node_secret for one in api.asked} == {member.secret}
    assert member.node_id == uuid(900)


def test_another_token_enrols_anew(folder: Folder) -> None:
    """The old membership stands until the new one does; another control plane's revisions mean nothing then."""
    api = Api()
    old = take_membership(folder, token(1), api)
    save_state(folder, replace(State(), cursor=Cursor(1, 7)))
    api.away = True
    with pytest.raises(ControlPlaneError):
        take_membership(folder, token(2), api)
    assert json.loads((folder.path / "node.json").read_text())["secret"] == old.secret
    api.away = False
    new = take_membership(folder, token(2), api)

    assert new.secret != old.secret
    assert load_state(folder).cursor == Cursor()


def test_no_node_yet(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"certworker node enroll NAME.*--enroll TOKEN"):
        take_membership(folder, None, Api())


def test_a_damaged_file_is_said(folder: Folder) -> None:
    """And not overwritten."""
    (folder.path / "node.json").write_text("{")
    with pytest.raises(NodeError, match=r"node\.json cannot be read"):
        take_membership(folder, token(), Api())


def test_a_token_is_one_word() -> None:
    text = token().text()

    assert text.isprintable()
    assert " " not in text
    assert read_enrolment_token(text) == token()
    assert token().secret not in repr(token())


@pytest.mark.parametrize("text", [token().text()[:-5], token().text()[1:], "cwe1.!!", "cwe1.", "x", "é"])
def test_a_damaged_token_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(InputError) as refused:
        read_enrolment_token(text)

    assert token().secret not in str(refused.value)
    assert text not in str(refused.value) or len(text) < 6
