"""`execgate policy`: what the policy says to an exec, and why; whether a policy can be used at all.

Nothing runs and no service is asked: the container is looked up on this host, and the user in the container's own
files, as the service does it.
"""

import argparse
import json
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from execgate.cli.remote import seconds_of
from execgate.cli.tables import shown
from execgate.config import Config
from execgate.containers.catalog import Catalog
from execgate.engine import catalog_of, default_policy_of, host_equivalence_of
from execgate.gate.equivalence import HostEquivalence
from execgate.gate.policy import load_policy
from execgate.gate.rules import Explained, Policy, Refusal
from execgate.model.access import Asked, Grant, target_of
from execgate.model.config import ExecConfig, OnDisconnect, ResolvedUser
from execgate.model.container import Container
from execgate.model.errors import Conflict, InvalidArgument
from execgate.model.principal import Method, Principal, certificate_name
from execgate.oci.process import validate_config
from execgate.oci.users import container_user, resolve_user
from execgate.rootless import user_id
from execgate.runtime.rootfs import read_in_container

POLICY_HELP = "the policy (default /etc/execgate/policy.toml if it exists)"

_EPILOG = """\
The exit code is 0 for an exec that is allowed, 1 for one that is denied, 2 when neither can be said: a wrong option, a
policy with mistakes, no such container."""
_MAX_LINE = 1000


def add_commands(commands: Any, command: Any) -> None:
    """Add `policy`; `command` adds one to some commands, with the options of the service."""
    text = "ask what the policy says, or whether it can be used"
    group = commands.add_parser("policy", help=text, description=text.capitalize() + ".")
    below = group.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=type(group))
    check = command(below, "check", _check, "say whether an exec would be allowed, by which rule, or why by none")
    check.set_defaults(failure_exit=2)
    check.epilog = _EPILOG
    check.add_argument("--policy", metavar="FILE", help=POLICY_HELP)
    check.add_argument(
        "--as",
        dest="who",
        type=_principal,
        required=True,
        metavar="WHO",
        help="user:NAME or uid:N, with the groups of this host; cert:NAME or token:NAME",
    )
    check.add_argument("--container", required=True, metavar="NAME", help="by name or id")
    check.add_argument("-u", "--user", default="", metavar="USER[:GROUP]", help="as whom it would run")
    check.add_argument("--privileged", action="store_true", help="with all capabilities")
    check.add_argument("-t", "--tty", action="store_true", help="with a terminal")
    check.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="with this variable; repeatable"
    )
    check.add_argument("-w", "--workdir", default="", metavar="DIR", help="in this directory")
    check.add_argument("--timeout", type=seconds_of, metavar="SECONDS", help="with this time limit")
    check.add_argument("--idle-timeout", type=seconds_of, metavar="SECONDS", help="with this limit to silence")
    check.add_argument(
        "--on-disconnect",
        choices=[choice.value for choice in OnDisconnect if choice.value],
        default="",
        help="with this to happen when the client is gone",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of text, with all rules")
    check.add_argument("args", nargs=argparse.REMAINDER, metavar="-- COMMAND …")

    validate = command(below, "validate", _validate, "read a policy as the service would, and name all its mistakes")
    validate.set_defaults(failure_exit=2)
    validate.add_argument("policy", nargs="?", metavar="FILE", help=POLICY_HELP)


def problems(config: Config) -> list[str]:
    """Return why the service cannot use its policy, nothing if it can."""
    path = config.policy_path()
    try:
        if path is not None:
            load_policy(path)
    except InvalidArgument as error:
        return [*error.message.splitlines(), *filter(None, [error.hint])]
    return []


def _validate(config: Config, _arguments: argparse.Namespace) -> int:
    path = config.policy_path()
    if path is None:
        raise InvalidArgument("there is no policy", hint="name a file")
    rules = load_policy(path).rules
    print(f"{path}: {len(rules)} rules")
    return 0


def _check(config: Config, arguments: argparse.Namespace) -> int:
    policy = _policy(config)
    asked = _asked(catalog_of(config), arguments, host_equivalence_of(config))
    answer = _Answer(
        config.policy_path(),
        arguments.who,
        asked,
        policy.decide(arguments.who, asked),
        policy.explain(arguments.who, asked),
    )
    if arguments.json:
        print(json.dumps(_document(answer), indent=2))
    else:
        print("\n".join(shown(line, _MAX_LINE) for line in _lines(answer)))
    return 0 if isinstance(answer.decision, Grant) else 1


@dataclass(frozen=True, slots=True)
class _Answer:
    """A decision, and all that it was made from."""

    policy: Path | None
    who: Principal
    asked: Asked
    decision: Grant | Refusal
    rules: Sequence[Explained]


def _policy(config: Config) -> Policy:
    """Return the policy of a service with this configuration."""
    path = config.policy_path()
    if path is not None:
        return load_policy(path)
    return default_policy_of(config, user_id())


def _principal(text: str) -> Principal:
    """Return who is meant by `user:NAME`, `uid:N`, `cert:NAME` or `token:NAME`."""
    kind, _, name = text.partition(":")
    if kind in ("user", "uid") and name:
        return _unix(kind, name)
    if kind not in (Method.CERTIFICATE, Method.TOKEN) or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is none of user:NAME, uid:N, cert:NAME, token:NAME")
    if kind == Method.CERTIFICATE:
        name = certificate_name(name)
    return Principal(method=Method(kind), name=name, names=frozenset({name}))


def _unix(kind: str, name: str) -> Principal:
    """Return the peer that a process of this user is after a login; a uid that has no name is in no group."""
    if kind == "uid" and not (name.isdecimal() and name.isascii() and int(name) < 2**32 - 1):
        raise argparse.ArgumentTypeError(f"{name!r} is no uid")
    try:
        entry = pwd.getpwnam(name) if kind == "user" else pwd.getpwuid(int(name))
    except KeyError as error:
        if kind == "user":
            raise argparse.ArgumentTypeError(f"this host has no user {name!r}") from error
        uid, gids = int(name), frozenset[int]()
    else:
        uid, gids = entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Principal(method=Method.UNIX, name=str(uid), names=frozenset({str(uid)}), uid=uid, gids=gids)


def _asked(catalog: Catalog, arguments: argparse.Namespace, host_equivalent: HostEquivalence) -> Asked:
    """Return the exec that is asked about, resolved as the service resolves it."""
    args = arguments.args[1:] if arguments.args[:1] == ["--"] else arguments.args
    config = ExecConfig(
        args=tuple(args),
        tty=arguments.tty,
        env=tuple(arguments.env),
        privileged=arguments.privileged,
        user=arguments.user,
        working_dir=arguments.workdir,
        timeout=arguments.timeout or None,
        idle_timeout=arguments.idle_timeout or None,
        on_disconnect=OnDisconnect(arguments.on_disconnect),
    )
    validate_config(config)
    container = catalog.find(arguments.container)
    spec = catalog.spec(container)
    user = _user(container, spec, config.user)
    why = host_equivalent(container, spec)
    return Asked(target=target_of(container), config=config, user=user, host_equivalent=why)


def _user(container: Container, spec: Mapping[str, Any], user: str) -> ResolvedUser:
    default = container_user(spec.get("process", {}))
    if not user:
        return default
    if container.init is None:
        raise Conflict(f"container {container.name} is not running", hint="nobody knows its users then")
    passwd, group = (read_in_container(container.init.pid, f"/etc/{name}") for name in ("passwd", "group"))
    return resolve_user(user, passwd=passwd, group=group, default=default)


# -- what is printed ---------------------------------------------------------------------------------------------------


def _lines(answer: _Answer) -> Iterator[str]:
    decision, target, user = answer.decision, answer.asked.target, answer.asked.user
    yield f"ALLOWED by rule {decision.rule}" if isinstance(decision, Grant) else "DENIED"
    yield f"  policy     {answer.policy or 'none: the own user of the service may do all'}"
    groups = ", ".join(map(str, sorted(answer.who.gids)))
    yield f"  who        {answer.who.id}{f', groups {groups}' if groups else ''}"
    yield f"  container  {', '.join(target.names)} ({target.engine}{f', {target.image}' if target.image else ''})"
    gids = ", ".join(map(str, sorted({user.gid, *user.additional_gids})))
    yield f"  as         uid {user.uid}, groups {gids}"
    if answer.asked.host_equivalent:
        yield f"  gives      root on the host: {', '.join(answer.asked.host_equivalent)}"
    yield from _bounds(decision) if isinstance(decision, Grant) else _reasons(answer)


def _bounds(grant: Grant) -> Iterator[str]:
    config = grant.config
    yield f"  time       {_time(config.timeout)}, without a byte {_time(config.idle_timeout)}"
    yield f"  client     gone: {config.on_disconnect or 'its input ends'}"
    if grant.max_sessions is not None:
        yield f"  sessions   {grant.max_sessions} at once"
    if grant.record:
        yield f"  recorded   {grant.record}{', or the session ends' if grant.record_or_end else ''}"


def _time(seconds: float | None) -> str:
    return "for ever" if seconds is None else f"{seconds:g} s"


def _reasons(answer: _Answer) -> Iterator[str]:
    mine = [rule for rule in answer.rules if rule.applies]
    if not any(rule.shows for rule in mine):
        yield "  no rule shows them this container: for them there is none (404)"
    for rule in mine:
        yield f"  rule {rule.rule}"
        yield from (f"    {failure.condition}: {failure.reason}" for failure in rule.failures)
    others = len(answer.rules) - len(mine)
    if others:
        yield f"  {others} other rules are not theirs"


def _document(answer: _Answer) -> dict[str, Any]:
    decision, asked = answer.decision, answer.asked
    document: dict[str, Any] = {
        "Allowed": isinstance(decision, Grant),
        "Policy": str(answer.policy) if answer.policy is not None else None,
        "Principal": answer.who.id,
        "PrincipalGids": sorted(answer.who.gids),
        "Container": {"Engine": asked.target.engine, "Names": list(asked.target.names), "Image": asked.target.image},
        "User": {"Uid": asked.user.uid, "Gids": sorted({asked.user.gid, *asked.user.additional_gids})},
        "HostEquivalent": list(asked.host_equivalent),
        "Rules": [
            {
                "Id": rule.rule,
                "Applies": rule.applies,
                "Shows": rule.shows,
                "Failures": [{"Condition": key, "Reason": reason} for key, reason in rule.failures],
            }
            for rule in answer.rules
        ],
    }
    if isinstance(decision, Refusal):
        return document | {"Visible": decision.visible, "Message": decision.message}
    return document | {
        "Rule": decision.rule,
        "Timeout": decision.config.timeout,
        "IdleTimeout": decision.config.idle_timeout,
        "OnDisconnect": decision.config.on_disconnect,
        "MaxSessions": decision.max_sessions,
        "Record": decision.record,
        "RecordOrEnd": decision.record_or_end,
    }
