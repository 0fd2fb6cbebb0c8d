"""What a gateway machine keeps of its enrolment: where the control plane is, its key's hash, and our token.

node.json        0600, the token that this node proves itself with
enrolling.json   0600, only while an enrolment is under way: an answer that got lost is asked for again
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from certworker.core.rollout import Cursor
from certworker.core.transit import EnrolmentToken, EnrolRequest, NodeToken
from certworker.errors import InputError, NodeError
from certworker.node.folder import Folder, write_file
from certworker.node.remote import Endpoint
from certworker.node.state import load_state, save_state


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


M = TypeVar("M", bound=_Stored)


class Membership(_Stored):
    """Who this machine is to its control plane."""

    url: str
    pin: str
    name: str
    enrolment_id: str
    """The enrolment that it comes from: the same token again changes nothing."""
    node_id: str
    secret: str = Field(repr=False)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.pin)

    @property
    def token(self) -> NodeToken:
        return NodeToken(self.node_id, self.secret)


class _Enrolling(_Stored):
    """An enrolment under way: the token that a person gave, and the secret that we made for it."""

    token: EnrolmentToken
    node_secret: str = Field(repr=False)


Enrol = Callable[[Endpoint, EnrolRequest], str]
"""Asks the node API, and returns the node's id."""


def take_membership(folder: Folder, token: EnrolmentToken | None, enrol: Enrol) -> Membership:
    """Return this folder's membership; with a token that it does not come from, enrol first.

    InputError if there is neither. What `enrol` raises leaves the folder so that the same call goes on.
    """
    known = _load(Membership, folder.path / "node.json")
    under_way = _load(_Enrolling, folder.path / "enrolling.json")
    if token is None and under_way is not None:
        token = under_way.token
    if token is None or (known is not None and known.enrolment_id == token.enrolment_id):
        if known is None:
            raise InputError(
                f"this machine is no node yet ({folder.path}): run `certworker node enroll NAME` where the control "
                "plane is, and here `certworker agent --enroll TOKEN`"
            )
        return known
    if under_way is None or under_way.token != token:
        under_way = _Enrolling(token=token, node_secret=secrets.token_urlsafe(32))
        _save(under_way, folder.path / "enrolling.json")
    return _finish(folder, under_way, enrol)


def _finish(folder: Folder, under_way: _Enrolling, enrol: Enrol) -> Membership:
    token = under_way.token
    request = EnrolRequest(
        enrolment_id=token.enrolment_id, secret=token.secret, name=token.name, node_secret=under_way.node_secret
    )
    node_id = enrol(Endpoint(token.url, token.pin), request)
    # The revisions of another control plane mean nothing to this one.
    save_state(folder, replace(load_state(folder), cursor=Cursor()))
    membership = Membership(
        url=token.url, pin=token.pin, name=token.name, enrolment_id=token.enrolment_id, node_id=node_id,
        secret=under_way.node_secret,
    )  # fmt: skip
    _save(membership, folder.path / "node.json")
    (folder.path / "enrolling.json").unlink()
    return membership


def _save(document: BaseModel, path: Path) -> None:
    write_file(path, document.model_dump_json().encode())


def _load(kind: type[M], path: Path) -> M | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise NodeError(f"{path} cannot be read: restore it, or remove it and enrol this node anew") from None
