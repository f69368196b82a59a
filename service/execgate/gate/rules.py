"""Rules, and the decision: who may do what in which container. Pure: everything is looked up before.

The theory. Nothing is allowed but what a rule allows. A rule can only allow, so no rule takes anything from another,
and a policy can be read rule by rule. All conditions of a rule must hold, for the whole request; what two rules allow
in halves is not allowed. Of the rules that allow a request the first one of the file gives it its bounds.

A rule has three circles: *whose* it is, which containers it *shows*, and which execs in them it *allows*. Whoever has a
rule that shows a container sees it, and refusals; to everybody else the container does not exist.

What a condition that is not there means: anything, where it is about what a container's own image would allow. Where it
is about power, nothing: `privileged`, `host_equivalent`, `others`. And a condition that could be walked around by a
second one closes that one as well: `users` without `gids` allows no group that is asked for by itself (`1000:0`), and
`argv` without `env` or `workdirs` allows no variable (PATH) or directory (`./task`).
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from execgate.gate.globs import NO_GLOBS, Globs
from execgate.model.access import Asked, Grant, Record, Target, Verb
from execgate.model.config import ExecConfig, OnDisconnect
from execgate.model.container import EngineName
from execgate.model.principal import Method, Principal
from execgate.oci.text import shown

_PRINCIPALS = 64
"""Principals whose rules are known without a look at all rules: there are few, and each asks often."""

_CONTAINERS = 1024
"""Containers of which is known what of these rules shows them. What is known of more is forgotten at once."""

_HINTED = 20
"""Rules that a refusal speaks of; `execgate policy check` has them all."""

IdRange = tuple[int, int]
"""The first and the last of some uids or gids."""

ALL_VERBS = frozenset(Verb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """Whose a rule is; any of these. `text` is how the file says it."""

    text: str
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    certificates: Globs = NO_GLOBS
    tokens: Globs = NO_GLOBS

    def is_one(self, principal: Principal) -> bool:
        """Return whether the principal is one of these. A program that embeds the engine is nobody's subject."""
        if principal.method is Method.UNIX:
            return principal.uid in self.uids or not self.gids.isdisjoint(principal.gids)
        if principal.method is Method.CERTIFICATE:
            return any(self.certificates.match(name) for name in {principal.name, *principal.names})
        return principal.method is Method.TOKEN and self.tokens.match(principal.name)


@dataclass(frozen=True, slots=True)
class Label:
    """A label that a container must have; with `value`, one that it matches."""

    name: str
    value: Globs | None = None

    def is_in(self, labels: Mapping[str, str]) -> bool:
        """Return whether the container that has these labels has this one."""
        return self.name in labels and (self.value is None or self.value.match(labels[self.name]))

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class Argv:
    """A command line, argument by argument; with `rest` any further ones."""

    arguments: tuple[Globs, ...]
    rest: bool = False

    def match(self, args: Sequence[str]) -> bool:
        """Return whether a command line is this one."""
        more = len(args) - len(self.arguments)
        if more < 0 or (more and not self.rest):
            return False
        return all(map(Globs.match, self.arguments, args))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. None is a condition that is not there.

    `engines`, `containers`, `labels` (all of them) and `images` say which containers it shows; `users` and `gids` are
    ranges of numbers in the container, resolved ones; the `env` is that of the request, by name. Times are seconds.
    `on_disconnect`: what may be asked, the first of them also what is got by who asks nothing. `verbs` are for the
    principal's own sessions and for the container itself, `others` for the sessions of other principals.
    """

    id: str
    who: Who
    engines: frozenset[EngineName] | None = None
    containers: Globs | None = None
    labels: tuple[Label, ...] = ()
    images: Globs | None = None
    users: tuple[IdRange, ...] | None = None
    gids: tuple[IdRange, ...] | None = None
    privileged: bool = False
    host_equivalent: bool = False
    tty: bool | None = None
    argv: tuple[Argv, ...] | None = None
    env: Globs | None = None
    workdirs: Globs | None = None
    max_time: float | None = None
    idle_time: float | None = None
    on_disconnect: tuple[OnDisconnect, ...] = ()
    verbs: frozenset[Verb] = ALL_VERBS
    others: frozenset[Verb] = frozenset()
    max_sessions: int | None = None
    record: Record = Record.NOTHING
    record_or_end: bool = False
    demands: "tuple[_Condition, ...]" = field(init=False, repr=False, compare=False)
    """The conditions of an exec that can fail."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "demands", tuple(one for one in _EXEC_CONDITIONS if one.can_fail(self)))

    def shows(self, target: Target) -> bool:
        """Return whether those whose rule this is can see the container."""
        return (
            (self.engines is None or target.engine in self.engines)
            and (self.containers is None or any(map(self.containers.match, target.names)))
            and (self.images is None or self.images.match(target.image))
            and all(label.is_in(target.labels) for label in self.labels)
        )

    def allows(self, verb: Verb, *, own: bool) -> bool:
        """Return whether it allows a verb on a session: the principal's own, or another's."""
        return verb in (self.verbs if own or verb is Verb.TOP else self.others)

    def missed(self, exec_: "_Exec") -> "Iterator[_Condition]":
        """Yield the conditions of an exec, in a container that it shows, that do not hold."""
        return (condition for condition in self.demands if not condition.holds(self, exec_))

    def bounded(self, config: ExecConfig) -> ExecConfig:
        """Return an exec that it allows with its bounds in it."""
        on_disconnect = config.on_disconnect
        if on_disconnect is OnDisconnect.DOCKER and self.on_disconnect:
            on_disconnect = self.on_disconnect[0]
        timeout, idle_timeout = config.timeout or self.max_time, config.idle_timeout or self.idle_time
        if (timeout, idle_timeout, on_disconnect) == (config.timeout, config.idle_timeout, config.on_disconnect):
            return config  # nothing to add, as for most execs
        return replace(config, timeout=timeout, idle_timeout=idle_timeout, on_disconnect=on_disconnect)


class Failure(NamedTuple):
    """A condition that does not hold: its key in the file, and why, in words for the operator."""

    condition: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """No rule allows it: `message` is for the user and tells nothing of the rules, `hint` for the operator.

    `visible`: a rule shows the container. If none does, the answer must be that of a container that does not exist.
    """

    message: str
    hint: str
    visible: bool


@dataclass(frozen=True, slots=True)
class Explained:
    """What one rule says to a request: everything that keeps it from allowing it, nothing if it does.

    `applies`: it is the principal's, `shows`: it is, and it shows the container.
    """

    rule: str
    failures: tuple[Failure, ...]
    applies: bool
    shows: bool


class _Mine:
    """The rules of one principal, and which of them show a container."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)
        self._showing: dict[tuple[str, ...], tuple[Target, tuple[Rule, ...]]] = {}

    def showing(self, target: Target) -> tuple[Rule, ...]:
        """Return the rules that show a container, in their order."""
        known = self._showing.get(target.names)
        if known is not None and known[0] == target:  # else it has other labels now, or another one has its names
            return known[1]
        found = tuple(rule for rule in self._rules if rule.shows(target))
        if len(self._showing) >= _CONTAINERS:
            self._showing.clear()
        self._showing[target.names] = target, found
        return found


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules, in the order of their file."""

    rules: tuple[Rule, ...]
    _mine: dict[Hashable, _Mine] = field(default_factory=dict, init=False, repr=False, compare=False)

    def has(self, rule_id: str) -> bool:
        """Return whether there is a rule of that id."""
        return any(rule.id == rule_id for rule in self.rules)

    def shows(self, principal: Principal, target: Target) -> bool:
        """Return whether the container exists for a principal."""
        return bool(self._of(principal).showing(target))

    def permits(self, principal: Principal, target: Target, verb: Verb, *, own: bool) -> Rule | None:
        """Return the first rule that allows a verb on a session in a container: an own one, or another principal's.

        TOP is about the container, and no session. What an exec may be is `decide`'s.
        """
        return next((rule for rule in self._of(principal).showing(target) if rule.allows(verb, own=own)), None)

    def decide(self, principal: Principal, asked: Asked) -> Grant | Refusal:
        """Return what an exec gets by the first rule that allows all of it."""
        exec_ = _exec(asked)
        showing = self._of(principal).showing(asked.target)
        for rule in showing:
            for condition in rule.demands:  # `rule.missed`, without the calls: all rules may have to be asked
                if not condition.holds(rule, exec_):
                    break
            else:
                return _grant(principal, rule, asked)
        return _refusal(principal, exec_, showing)

    def explain(self, principal: Principal, asked: Asked) -> tuple[Explained, ...]:
        """Return what each rule says to an exec, with everything that is in its way."""
        exec_ = _exec(asked)
        return tuple(_explained(rule, principal, exec_) for rule in self.rules)

    def _of(self, principal: Principal) -> _Mine:
        # Not by pid: each process of a user would be a new principal.
        key = (principal.method, principal.name, principal.names, principal.uid, principal.gids)
        mine = self._mine.get(key)
        if mine is None:
            if len(self._mine) >= _PRINCIPALS:
                self._mine.clear()
            mine = self._mine[key] = _Mine(rule for rule in self.rules if rule.who.is_one(principal))
        return mine


def _grant(principal: Principal, rule: Rule, asked: Asked) -> Grant:
    return Grant(
        owner=principal.id,
        rule=rule.id,
        config=rule.bounded(asked.config),
        max_sessions=rule.max_sessions,
        record=rule.record,
        record_or_end=rule.record_or_end,
    )


def _refusal(principal: Principal, exec_: "_Exec", showing: Sequence[Rule]) -> Refusal:
    who, container = shown(principal.id), shown(exec_.asked.target.names[0])
    missed = [(rule, next(rule.missed(exec_))) for rule in showing[:_HINTED]]
    reasons = [f"{rule.id}: {one.key}: {one.reason(rule, exec_)}" for rule, one in missed]
    reasons += [f"and {len(showing) - _HINTED} more rules"] if len(showing) > _HINTED else []
    return Refusal(
        message=f"permission denied: no rule allows {who} this exec in container {container}",
        hint="; ".join(reasons) or f"no rule shows {who} container {container}",
        visible=bool(showing),
    )


def _explained(rule: Rule, principal: Principal, exec_: "_Exec") -> Explained:
    target = exec_.asked.target
    applies = rule.who.is_one(principal)
    who = [] if applies else [Failure("who", f"{shown(principal.id)} is not among {shown(rule.who.text)}")]
    container = [Failure(key, why) for key, judge in _TARGET_CONDITIONS if (why := judge(rule, target))]
    process = [Failure(one.key, one.reason(rule, exec_)) for one in rule.missed(exec_)]
    return Explained(rule.id, (*who, *container, *process), applies=applies, shows=applies and rule.shows(target))


# -- why a rule does not show a container: nothing for a condition that holds ------------------------------------------


def _engines(rule: Rule, target: Target) -> str:
    fine = rule.engines is None or target.engine in rule.engines
    return "" if fine else f"{target.engine} is not among {', '.join(sorted(rule.engines or ()))}"


def _containers(rule: Rule, target: Target) -> str:
    fine = rule.containers is None or any(map(rule.containers.match, target.names))
    return "" if fine else f"{_list(target.names)} does not match {shown(str(rule.containers))}"


def _labels(rule: Rule, target: Target) -> str:
    missing = [str(label) for label in rule.labels if not label.is_in(target.labels)]
    return f"the container has no label {_list(missing)}" if missing else ""


def _images(rule: Rule, target: Target) -> str:
    fine = rule.images is None or rule.images.match(target.image)
    return "" if fine else f"{shown(target.image) or 'an unknown image'} does not match {shown(str(rule.images))}"


_TARGET_CONDITIONS: tuple[tuple[str, Callable[[Rule, Target], str]], ...] = (
    ("engines", _engines),
    ("containers", _containers),
    ("labels", _labels),
    ("images", _images),
)


# -- the conditions of an exec -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Exec:
    """An exec as conditions look at it: what takes time is prepared once for all rules.

    `named_group`: a group is asked for by itself; `names` are those of the environment; `directory` has nothing in it
    that means nothing.
    """

    asked: Asked
    config: ExecConfig
    named_group: bool
    gids: frozenset[int]
    names: frozenset[str]
    directory: str


def _exec(asked: Asked) -> _Exec:
    config = asked.config
    return _Exec(
        asked,
        config,
        named_group=bool(config.user.partition(":")[2]),
        gids=frozenset((asked.user.gid, *asked.user.additional_gids)),
        names=frozenset(entry.partition("=")[0] for entry in config.env),
        directory=_normal_directory(config.working_dir) if config.working_dir else "",
    )


@dataclass(frozen=True, slots=True)
class _Condition:
    """A key of the file: whether a rule demands anything here, whether that holds, and, if not, why."""

    key: str
    can_fail: Callable[[Rule], bool]
    holds: Callable[[Rule, _Exec], bool]
    reason: Callable[[Rule, _Exec], str]


def _has(*keys: str) -> Callable[[Rule], bool]:
    """Return what tells whether a rule has any of these keys."""
    return lambda rule: any(getattr(rule, key) not in (None, ()) for key in keys)


def _strange_gids(rule: Rule, exec_: _Exec) -> Sequence[int]:
    return sorted(gid for gid in exec_.gids if not _within(gid, rule.gids or ()))


def _gids_hold(rule: Rule, exec_: _Exec) -> bool:
    return not exec_.named_group if rule.gids is None else not _strange_gids(rule, exec_)


def _gids_reason(rule: Rule, exec_: _Exec) -> str:
    if rule.gids is None:
        return "a group may not be asked for by itself"
    return f"gid {_list(map(str, _strange_gids(rule, exec_)))} is not in {_ranges(rule.gids)}"


def _strange_names(rule: Rule, exec_: _Exec) -> Sequence[str]:
    return sorted(name for name in exec_.names if rule.env is None or not rule.env.match(name))


def _argv_holds(rule: Rule, exec_: _Exec) -> bool:
    args = exec_.config.args
    for argv in rule.argv or ():  # noqa: SIM110  (any() takes twice as long)
        if argv.match(args):
            return True
    return False


def _workdir_holds(rule: Rule, exec_: _Exec) -> bool:
    return not exec_.directory or (rule.workdirs is not None and rule.workdirs.match(exec_.directory))


def _disconnect_holds(rule: Rule, exec_: _Exec) -> bool:
    asks = exec_.config.on_disconnect
    return asks is OnDisconnect.DOCKER or asks in rule.on_disconnect


def _is_within(most: float | None, asks: float | None) -> bool:
    return most is None or not asks or asks <= most


_EXEC_CONDITIONS = (
    _Condition(
        "verbs",
        lambda rule: Verb.EXEC not in rule.verbs,
        lambda *_: False,
        lambda *_: "exec is not among them",
    ),
    _Condition(
        "users",
        _has("users"),
        lambda rule, exec_: _within(exec_.asked.user.uid, rule.users or ()),
        lambda rule, exec_: f"uid {exec_.asked.user.uid} is not in {_ranges(rule.users or ())}",
    ),
    _Condition("gids", _has("gids", "users"), _gids_hold, _gids_reason),
    _Condition(
        "privileged",
        lambda rule: not rule.privileged,
        lambda _, exec_: not exec_.config.privileged,
        lambda *_: "it is asked for",
    ),
    _Condition(
        "host_equivalent",
        lambda rule: not rule.host_equivalent,
        lambda _, exec_: not exec_.asked.host_equivalent,
        lambda _, exec_: f"root in this container is root on the host: {_list(exec_.asked.host_equivalent)}",
    ),
    _Condition(
        "tty",
        _has("tty"),
        lambda rule, exec_: rule.tty is exec_.config.tty,
        lambda rule, _: "it must have a terminal" if rule.tty else "it may not have a terminal",
    ),
    _Condition("argv", _has("argv"), _argv_holds, lambda *_: "the command matches none of its patterns"),
    _Condition(
        "env",
        _has("env", "argv"),
        lambda rule, exec_: not _strange_names(rule, exec_),
        lambda rule, exec_: f"{_list(_strange_names(rule, exec_))} may not be set",
    ),
    _Condition(
        "workdirs",
        _has("workdirs", "argv"),
        _workdir_holds,
        lambda _, exec_: f"{shown(exec_.config.working_dir)} is not allowed",
    ),
    _Condition(
        "max_time",
        _has("max_time"),
        lambda rule, exec_: _is_within(rule.max_time, exec_.config.timeout),
        lambda rule, exec_: f"{exec_.config.timeout:g} s are asked for, {rule.max_time:g} s are the most",
    ),
    _Condition(
        "idle_time",
        _has("idle_time"),
        lambda rule, exec_: _is_within(rule.idle_time, exec_.config.idle_timeout),
        lambda rule, exec_: f"{exec_.config.idle_timeout:g} s are asked for, {rule.idle_time:g} s are the most",
    ),
    _Condition(
        "on_disconnect",
        _has("on_disconnect"),
        _disconnect_holds,
        lambda _, exec_: f"{exec_.config.on_disconnect} is not allowed",
    ),
)


def _normal_directory(path: str) -> str:
    """Return an absolute path without what means nothing: `//`, `.`, a slash at the end. `..` may mean something."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _within(number: int, ranges: Collection[IdRange]) -> bool:
    for first, last in ranges:  # noqa: SIM110  (any() takes three times as long)
        if first <= number <= last:
            return True
    return False


def _ranges(ranges: Collection[IdRange]) -> str:
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _list(texts: Iterable[str]) -> str:
    return shown(", ".join(texts), 400)
