"""From settings to what runs on a gateway machine: its proxy, and the agent of `certworker agent`.

No database here, and nothing that knows one: a gateway machine has neither its address nor the key.
"""

import os
import platform
import pwd
import random
import shutil
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from certworker.core.transit import EnrolmentToken, EnrolRequest
from certworker.errors import SettingsError
from certworker.node.agent import Agent
from certworker.node.apply import Proxy
from certworker.node.folder import Folder
from certworker.node.haproxy import Haproxy, HaproxySetup
from certworker.node.included import COMMAND_PATH, Commands, HaproxyDialect, Included, NginxDialect
from certworker.node.lookup import Lookup
from certworker.node.loop import Loop
from certworker.node.membership import take_membership
from certworker.node.nginx import Nginx, NginxSetup
from certworker.node.patience import Patience
from certworker.node.remote import Endpoint, Line, RemoteSource, enrol
from certworker.settings import Settings


@dataclass(frozen=True, slots=True)
class Outpost:
    """The agent of a gateway machine, ready to run."""

    name: str
    agent: Agent
    line: Line
    loop: Loop


def make_outpost(settings: Settings, folder_path: Path, proxy_name: str, token: EnrolmentToken | None) -> Outpost:
    """Return this machine's agent, enrolled with `token` if it is not yet."""
    folder, patience, chance = Folder(folder_path), Patience(), random.SystemRandom()
    proxy = make_proxy(proxy_name, settings, folder, patience)
    membership = take_membership(folder, token, _enrol)
    line = Line(membership.endpoint)
    source = RemoteSource(line, membership.token, f"certworker {version('certworker')}")
    agent = Agent(membership.name, source, folder, proxy, patience, chance)
    return Outpost(membership.name, agent, line, Loop(agent, source, chance))


def _enrol(endpoint: Endpoint, request: EnrolRequest) -> str:
    with closing(Line(endpoint)) as line:
        return enrol(line, request)


def make_proxy(name: str, settings: Settings, folder: Folder, patience: Patience) -> Proxy:
    """Return the proxy of this machine that works in `folder`, as it is or not running yet.

    With PROXY_RELOAD it is the operator's own, which includes what lies there.
    """
    if settings.proxy_reload is not None:
        return _make_included(name, settings.proxy_reload, settings, folder, patience)
    make = _make_haproxy if name == "haproxy" else _make_nginx
    return make(settings, folder, patience)


def _make_included(name: str, reload: tuple[str, ...], settings: Settings, folder: Folder, patience: Patience) -> Proxy:
    check, named = settings.proxy_check, settings.haproxy_bin if name == "haproxy" else settings.nginx_bin
    for setting, command in (("PROXY_RELOAD or --reload", reload), ("PROXY_CHECK or --check", check)):
        if command is not None and shutil.which(command[0], path=COMMAND_PATH) is None:
            raise SettingsError(f"{setting}: there is no program {command[0]!r}, give its whole path")
    dialect = HaproxyDialect(folder) if name == "haproxy" else NginxDialect(folder, Lookup(patience))
    return Included(folder, dialect, Commands(reload, check or ()), patience, _search_binary(named, name))


def _make_haproxy(settings: Settings, folder: Folder, patience: Patience) -> Proxy:
    user = _existing_user("haproxy")
    binary = _find_binary(settings.haproxy_bin, "haproxy", "HAPROXY_BIN")
    return Haproxy(folder, HaproxySetup(binary, user=user, group=user), patience)


def _make_nginx(settings: Settings, folder: Folder, patience: Patience) -> Proxy:
    user = _existing_user("nginx") or _existing_user("www-data")
    binary = _find_binary(settings.nginx_bin, "nginx", "NGINX_BIN")
    return Nginx(folder, NginxSetup(binary, user=user, reserved=settings.own_addresses), patience)


def _find_binary(named: Path | None, name: str, setting: str) -> Path:
    found = _search_binary(named, name)
    if found is None:
        raise SettingsError(f"there is no {name} on the PATH: install it or set {setting}")
    return found


def _search_binary(named: Path | None, name: str) -> Path | None:
    found = named or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return Path(found) if found else None


def _existing_user(name: str) -> str | None:
    """Return the user a proxy started by root gives up its rights to."""
    if os.geteuid() != 0 or platform.system() != "Linux":
        return None
    try:
        return pwd.getpwnam(name).pw_name
    except KeyError:
        return None
