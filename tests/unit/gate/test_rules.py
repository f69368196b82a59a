"""What rules decide: a table of requests against one policy, and what holds for every policy."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.gate.globs import Globs
from execgate.gate.policy import parse_policy
from execgate.gate.rules import ALL_VERBS, Argv, Label, Policy, Refusal, Rule, Who
from execgate.model.access import Asked, Grant, Record, Target, Verb
from execgate.model.config import ExecConfig, OnDisconnect, ResolvedUser
from execgate.model.container import EngineName
from execgate.model.principal import PROGRAM, Method, Principal, certificate_name

POLICY = """
[[rule]]
id = "admins"
who = ["gid:27"]
privileged = true
host_equivalent = true
others = ["inspect", "attach", "logs", "kill", "remove"]

[[rule]]
id = "team-a"                       # a team, in its own containers, not as root
who = ["uid:1000", "uid:1001"]
containers = ["a-*", "prod/*/a-app"]
users = ["1000-1999", 65534]
max_time = "1h"
on_disconnect = ["hup", "kill"]

[[rule]]
id = "team-a-logs"                  # the same team, as root, but only to look at logs
who = ["uid:1000", "uid:1001"]
labels = ["team=a"]
argv = [["tail", "-n", "[0-9]*", "/var/log/**"], ["ls", "**"], ["git", "log", "**"], ["true"]]
tty = false

[[rule]]
id = "team-b"
who = ["cert:*@b.example.org", "cert:spiffe://example.org/b/**"]
labels = ["team=b", "tier"]
engines = ["docker", "podman"]
gids = ["100-199"]
env = ["APP_*", "LANG"]
workdirs = ["/srv/**", "/tmp"]

[[rule]]
id = "ci-privileged"
who = ["token:ci-main"]
images = ["ghcr.io/acme/*:*"]
privileged = true
tty = false
max_time = 300
idle_time = "30s"
max_sessions = 4
record = "output"
record_failure = "closed"

[[rule]]
id = "ci"
who = ["token:ci-*"]
images = ["ghcr.io/acme/**"]
tty = false
max_time = 60
verbs = ["exec", "inspect", "logs"]

[[rule]]
id = "auditor"
who = ["uid:1600"]
verbs = ["inspect"]
others = ["inspect", "logs"]

[[rule]]
id = "agent"
who = ["token:agent-*"]
containers = ["sandbox-*"]
on_disconnect = "kill"
idle_time = "5m"
tty = true
record = "all"

[[rule]]
id = "plain-disconnects"
who = ["uid:1700"]
on_disconnect = "docker"
env = ["A", "B"]
workdirs = ["**/data"]
"""

TEST_POLICY = parse_policy(POLICY.encode(), "policy.toml")


def unix(uid: int, *gids: int) -> Principal:
    return Principal(method=Method.UNIX, name=str(uid), names=frozenset({str(uid)}), uid=uid, gids=frozenset(gids))


def cert(*names: str) -> Principal:
    typed = [certificate_name(name) for name in names]
    return Principal(method=Method.CERTIFICATE, name=typed[0], names=frozenset(typed))


def token(name: str) -> Principal:
    return Principal(method=Method.TOKEN, name=name, names=frozenset({name}))


ROOT = unix(0, 0)
ADMIN = unix(1500, 1500, 27)
ALICE = unix(1000, 1000, 100)
BOB = unix(1001, 1001)
AUDITOR = unix(1600, 1600)
PLAIN = unix(1700, 1700)
STRANGER = unix(4000, 4000, 1000)  # a group of the number of a user
BEA = cert("bea@b.example.org")
BATCH = cert("batch.example.org", "spiffe://example.org/b/jobs/nightly")
OUTSIDER = cert("bea@b.example.org.evil", "b.example.org", "1000", "ci-main")
CI_MAIN = token("ci-main")
CI_PR = token("ci-pr-7")
AGENT = token("agent-1")


def container(engine: EngineName, *names: str, image: str = "", **labels: str) -> Target:
    return Target(engine=engine, names=names, image=image, labels=labels)


A_WEB = container(EngineName.DOCKER, "a-web", image="ghcr.io/acme/web:1.2", team="a", tier="web")
A_BARE = container(EngineName.OCI, "a-bare")
A_POD = container(EngineName.CONTAINERD, "a-app", "prod/pod-1/a-app", image="docker.io/library/nginx:1", team="a")
NO_POD = container(EngineName.CONTAINERD, "app", "prod/x/pod-1/a-app")
B_WEB = container(EngineName.DOCKER, "b-web", image="ghcr.io/acme/deep/er/web:1", team="b", tier="")
B_POD = container(EngineName.CONTAINERD, "b-pod", team="b", tier="web")
B_UNTIERED = container(EngineName.PODMAN, "b-untiered", team="b")
SANDBOX = container(EngineName.OCI, "sandbox-1")
A_HOST = container(EngineName.DOCKER, "a-host", team="a")


Request = dict[str, Any]


def ask(*args: str, uid: int = 0, gid: int = 0, gids: tuple[int, ...] = (), **config: Any) -> Request:
    """An exec: `config` are fields of ExecConfig; `uid`, `gid` and `gids` what its user comes to."""
    return {
        "config": ExecConfig(args=args or ("sh",), **config),
        "user": ResolvedUser(uid=uid, gid=gid, additional_gids=gids),
    }


def asked(target: Target, request: Request) -> Asked:
    why = ("it shares the pid namespace of the host",) if target is A_HOST else ()
    return Asked(target=target, host_equivalent=why, **request)


HIDDEN = "404"
"""The container does not exist for the principal."""

ROWS: Sequence[tuple[Principal, Target, Request, str]] = [
    # Who has no rule sees nothing: root neither.
    (ROOT, A_WEB, ask(), HIDDEN),
    (STRANGER, A_WEB, ask(), HIDDEN),
    (PROGRAM, A_WEB, ask(), HIDDEN),
    (token("1000"), A_WEB, ask(), HIDDEN),
    (cert("1000"), A_WEB, ask(), HIDDEN),
    # Groups.
    (ADMIN, A_WEB, ask(), "admins"),
    (ADMIN, B_WEB, ask(privileged=True), "admins"),
    (ADMIN, A_HOST, ask(), "admins"),
    (ADMIN, A_HOST, ask(privileged=True, tty=True, env=("X=1",), working_dir="/x"), "admins"),
    (ADMIN, SANDBOX, ask(timeout=1e6, on_disconnect=OnDisconnect.KEEP), "admins"),
    # Which containers: by name, further names, and not a part further down.
    (ALICE, A_WEB, ask(uid=1000, gid=1000), "team-a"),
    (BOB, A_WEB, ask(uid=1000, gid=1000), "team-a"),
    (ALICE, A_BARE, ask(uid=1000), "team-a"),
    (ALICE, A_POD, ask(uid=1000), "team-a"),
    (ALICE, NO_POD, ask(uid=1000), HIDDEN),
    (ALICE, B_WEB, ask(uid=1000), HIDDEN),
    (ALICE, SANDBOX, ask(uid=1000), HIDDEN),
    # As whom: the number counts, whatever was asked for.
    (ALICE, A_BARE, ask(), "team-a users"),
    (ALICE, A_BARE, ask(user="app"), "team-a users"),
    (ALICE, A_BARE, ask(user="app", uid=1999), "team-a"),
    (ALICE, A_BARE, ask(user="nobody", uid=65534), "team-a"),
    (ALICE, A_BARE, ask(uid=999), "team-a users"),
    (ALICE, A_BARE, ask(uid=2000), "team-a users"),
    (ALICE, A_BARE, ask(uid=65533), "team-a users"),
    # Without gids the groups are those of the user, whatever they are; none may be asked for.
    (ALICE, A_BARE, ask(user="1000", uid=1000, gid=0, gids=(0, 5)), "team-a"),
    (ALICE, A_BARE, ask(user="1000:", uid=1000), "team-a"),
    (ALICE, A_BARE, ask(user="1000:0", uid=1000, gid=0), "team-a gids"),
    (ALICE, A_BARE, ask(user="app:app", uid=1000, gid=1000), "team-a gids"),
    (ALICE, A_BARE, ask(user=":docker", uid=1000, gid=998), "team-a gids"),
    # Power is said, or it is not given.
    (ALICE, A_BARE, ask(uid=1000, privileged=True), "team-a privileged"),
    (ALICE, A_HOST, ask(uid=1000), "team-a host_equivalent, team-a-logs host_equivalent"),
    # Time: what is not asked for is the most, more is not allowed.
    (ALICE, A_BARE, ask(uid=1000, timeout=3600), "team-a"),
    (ALICE, A_BARE, ask(uid=1000, timeout=3600.5), "team-a max_time"),
    (ALICE, A_BARE, ask(uid=1000, timeout=0), "team-a"),
    (ALICE, A_BARE, ask(uid=1000, timeout=float("nan")), "team-a max_time"),
    (ALICE, A_BARE, ask(uid=1000, idle_timeout=1e6), "team-a"),
    # What becomes of a process whose client is gone.
    (ALICE, A_BARE, ask(uid=1000, on_disconnect=OnDisconnect.HUP), "team-a"),
    (ALICE, A_BARE, ask(uid=1000, on_disconnect=OnDisconnect.KILL), "team-a"),
    (ALICE, A_BARE, ask(uid=1000, on_disconnect=OnDisconnect.KEEP), "team-a on_disconnect"),
    # The second rule of the same team allows as root what the first does not; but no half of each.
    (ALICE, A_WEB, ask("ls", "-l", "/"), "team-a-logs"),
    (ALICE, A_WEB, ask("ls", "-l", "/", uid=1000), "team-a"),
    (ALICE, A_WEB, ask("ls"), "team-a-logs"),
    (ALICE, A_WEB, ask("git", "log", "-p"), "team-a-logs"),
    (ALICE, A_WEB, ask("git", "log"), "team-a-logs"),
    (ALICE, A_WEB, ask("git"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("true"), "team-a-logs"),
    (ALICE, A_WEB, ask("true", "x"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("lsof"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("/bin/ls"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("sh", "-c", "ls"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("tail", "-n", "20", "/var/log/app/x.log"), "team-a-logs"),
    (ALICE, A_WEB, ask("tail", "-n", "20", "/etc/shadow"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("tail", "-n", "20", "/var/log/../../etc/shadow"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("tail", "-n", "20", "/var/log/a", "/etc/shadow"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("tail", "-n", "20"), "team-a users, team-a-logs argv"),
    (ALICE, A_WEB, ask("ls", tty=True), "team-a users, team-a-logs tty"),
    (ALICE, A_WEB, ask("ls", privileged=True), "team-a users, team-a-logs privileged"),
    # With argv alone, nothing that would make another program of it.
    (ALICE, A_WEB, ask("ls", env=("PATH=/tmp",)), "team-a users, team-a-logs env"),
    (ALICE, A_WEB, ask("ls", env=("LD_PRELOAD",)), "team-a users, team-a-logs env"),
    (ALICE, A_WEB, ask("ls", working_dir="/tmp"), "team-a users, team-a-logs workdirs"),
    (ALICE, A_WEB, ask("ls", uid=1000, env=("PATH=/tmp",), working_dir="/tmp"), "team-a"),
    # Certificates: any of the names, the whole of it.
    (BEA, B_WEB, ask(gid=100), "team-b"),
    (BATCH, B_WEB, ask(gid=100), "team-b"),
    (OUTSIDER, B_WEB, ask(gid=100), HIDDEN),
    # All labels, and one that only must be there.
    (BEA, B_UNTIERED, ask(gid=100), HIDDEN),
    (BEA, A_WEB, ask(gid=100), HIDDEN),
    (BEA, B_POD, ask(gid=100), HIDDEN),
    # All groups of the user, asked for or not.
    (BEA, B_WEB, ask(user="0:100", gid=100, gids=(100, 199)), "team-b"),
    (BEA, B_WEB, ask(), "team-b gids"),
    (BEA, B_WEB, ask(gid=100, gids=(0, 100)), "team-b gids"),
    (BEA, B_WEB, ask(gid=200, gids=(100,)), "team-b gids"),
    # Variables by name, all of them.
    (BEA, B_WEB, ask(gid=100, env=("APP_MODE=x", "LANG=C", "APP_")), "team-b"),
    (BEA, B_WEB, ask(gid=100, env=("APP_MODE=x", "PATH=/tmp")), "team-b env"),
    (BEA, B_WEB, ask(gid=100, env=("LANG_X=1",)), "team-b env"),
    (BEA, B_WEB, ask(gid=100, env=("lang=1",)), "team-b env"),
    # Directories as they are, none asked for always.
    (BEA, B_WEB, ask(gid=100, working_dir="/srv"), "team-b"),
    (BEA, B_WEB, ask(gid=100, working_dir="//srv/./app//"), "team-b"),
    (BEA, B_WEB, ask(gid=100, working_dir="/tmp/"), "team-b"),
    (BEA, B_WEB, ask(gid=100, working_dir="/tmp/x"), "team-b workdirs"),
    (BEA, B_WEB, ask(gid=100, working_dir="/srvx"), "team-b workdirs"),
    (BEA, B_WEB, ask(gid=100, working_dir="/srv/../etc"), "team-b workdirs"),
    (BEA, B_WEB, ask(gid=100, working_dir="/"), "team-b workdirs"),
    (PLAIN, A_WEB, ask(working_dir="/x/y/data"), "plain-disconnects"),
    (PLAIN, A_WEB, ask(working_dir="/x/data/y"), "plain-disconnects workdirs"),
    # Tokens, images, and the first of two rules.
    (CI_MAIN, A_WEB, ask("make"), "ci-privileged"),
    (CI_MAIN, A_WEB, ask("make", privileged=True), "ci-privileged"),
    (CI_MAIN, A_WEB, ask("make", timeout=300, idle_timeout=30), "ci-privileged"),
    (CI_MAIN, A_WEB, ask("make", idle_timeout=31), "ci"),
    (CI_MAIN, A_WEB, ask("make", timeout=301), "ci-privileged max_time, ci max_time"),
    (CI_MAIN, A_WEB, ask("make", tty=True), "ci-privileged tty, ci tty"),
    (CI_MAIN, B_WEB, ask("make"), "ci"),
    (CI_MAIN, B_WEB, ask("make", privileged=True), "ci privileged"),
    (CI_MAIN, A_POD, ask("make"), HIDDEN),
    (CI_MAIN, A_BARE, ask("make"), HIDDEN),
    (CI_PR, A_WEB, ask("make"), "ci"),
    (CI_PR, A_WEB, ask("make", privileged=True), "ci privileged"),
    (CI_PR, A_WEB, ask("make", timeout=61), "ci max_time"),
    (token("ci"), A_WEB, ask("make"), HIDDEN),
    # A rule without exec shows, and that is all.
    (AUDITOR, A_WEB, ask(), "auditor verbs"),
    (AUDITOR, SANDBOX, ask(), "auditor verbs"),
    # A terminal that must be.
    (AGENT, SANDBOX, ask(tty=True), "agent"),
    (AGENT, SANDBOX, ask(), "agent tty"),
    (AGENT, SANDBOX, ask(tty=True, on_disconnect=OnDisconnect.KEEP), "agent on_disconnect"),
    (AGENT, SANDBOX, ask(tty=True, idle_timeout=300), "agent"),
    (AGENT, SANDBOX, ask(tty=True, idle_timeout=301), "agent idle_time"),
    (AGENT, A_WEB, ask(tty=True), HIDDEN),
    # Docker's manner alone, by its name.
    (PLAIN, A_WEB, ask(env=("A=1", "B")), "plain-disconnects"),
    (PLAIN, A_WEB, ask(env=("AB=1",)), "plain-disconnects env"),
    (PLAIN, A_WEB, ask(on_disconnect=OnDisconnect.KILL), "plain-disconnects on_disconnect"),
]


def outcome(decision: Grant | Refusal) -> str:
    """The rule, or of each rule that shows the container its first condition that does not hold."""
    if isinstance(decision, Grant):
        return decision.rule
    if not decision.visible:
        return HIDDEN
    return ", ".join(" ".join(reason.split(": ")[:2]) for reason in decision.hint.split("; "))


def name(row: tuple[Principal, Target, Request, str]) -> str:
    who, target, request, _ = row
    return f"{who.id} in {target.names[0]}: {' '.join(request['config'].args)}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_decisions(row: tuple[Principal, Target, Request, str]) -> None:
    who, target, request, expected = row
    assert outcome(TEST_POLICY.decide(who, asked(target, request))) == expected
    assert TEST_POLICY.shows(who, target) == (expected != HIDDEN)


def test_the_table_is_long_enough_and_reaches_every_rule_and_condition() -> None:
    assert len(ROWS) >= 80
    outcomes = " ".join(expected for *_, expected in ROWS)
    assert {rule.id for rule in TEST_POLICY.rules} <= set(re.split(r"[ ,]+", outcomes))
    conditions = {condition.key for rule in TEST_POLICY.rules for condition in rule.demands}
    assert conditions <= set(re.split(r"[ ,]+", outcomes))


def test_what_a_user_is_told_gives_no_rule_away() -> None:
    refusal = TEST_POLICY.decide(ALICE, asked(A_WEB, ask("sh", "-c", "x", env=("PASSWORD=secret",))))
    assert isinstance(refusal, Refusal)
    assert refusal.message == "permission denied: no rule allows unix:1000 this exec in container a-web"
    assert refusal.hint == (
        "team-a: users: uid 0 is not in 1000-1999, 65534; team-a-logs: argv: the command matches none of its patterns"
    )
    hidden = TEST_POLICY.decide(STRANGER, asked(A_WEB, ask()))
    assert isinstance(hidden, Refusal)
    assert hidden.hint == "no rule shows unix:4000 container a-web"


def test_no_reason_has_a_value_of_the_environment_or_an_escape() -> None:
    policy = parse_policy(b'[[rule]]\nid = "r"\nwho = ["uid:1"]\nenv = ["A"]', "p")
    evil = replace(A_WEB, names=("\x1b[31m\n",))
    request = ask(env=("\x1b[1m=secret", "B=secret"))
    refusal = policy.decide(unix(1), asked(evil, request))
    assert isinstance(refusal, Refusal)
    for text in (
        refusal.message,
        refusal.hint,
        *(one.reason for one in policy.explain(unix(1), asked(evil, request))[0].failures),
    ):
        assert text.isprintable()
        assert "secret" not in text


def test_a_refusal_by_many_rules_stays_short() -> None:
    rules = "".join(f'[[rule]]\nid = "r{n}"\nwho = ["uid:1"]\ntty = true\n' for n in range(1000))
    refusal = parse_policy(rules.encode(), "p").decide(unix(1), asked(A_WEB, ask()))
    assert isinstance(refusal, Refusal)
    assert refusal.hint.count("tty") == 20
    assert refusal.hint.endswith("; and 980 more rules")


# -- what a grant is ---------------------------------------------------------------------------------------------------


def granted(who: Principal, target: Target, request: Request) -> Grant:
    decision = TEST_POLICY.decide(who, asked(target, request))
    assert isinstance(decision, Grant), decision
    return decision


def test_a_grant_has_all_of_its_rule() -> None:
    grant = granted(CI_MAIN, A_WEB, ask("make", labels={"x": "y"}))
    assert grant == Grant(
        owner="token:ci-main",
        rule="ci-privileged",
        config=ExecConfig(args=("make",), labels={"x": "y"}, timeout=300, idle_timeout=30),
        max_sessions=4,
        record=Record.OUTPUT,
        record_or_end=True,
    )


def test_a_grant_without_bounds_is_what_was_asked() -> None:
    request = ask("make", tty=True, privileged=True, user="x:y", timeout=7, env=("A=1",))
    grant = granted(ADMIN, A_HOST, request)
    assert grant == Grant(owner="unix:1500", rule="admins", config=request["config"])


@pytest.mark.parametrize(
    ("who", "target", "request_", "timeout", "idle", "on_disconnect"),
    [
        (ALICE, A_BARE, ask(uid=1000), 3600, None, OnDisconnect.HUP),
        (ALICE, A_BARE, ask(uid=1000, timeout=0), 3600, None, OnDisconnect.HUP),
        (ALICE, A_BARE, ask(uid=1000, timeout=5, on_disconnect=OnDisconnect.KILL), 5, None, OnDisconnect.KILL),
        (ALICE, A_BARE, ask(uid=1000, idle_timeout=9), 3600, 9, OnDisconnect.HUP),
        (AGENT, SANDBOX, ask(tty=True), None, 300, OnDisconnect.KILL),
        (AGENT, SANDBOX, ask(tty=True, idle_timeout=20, timeout=10), 10, 20, OnDisconnect.KILL),
        (CI_MAIN, A_WEB, ask(idle_timeout=31), 60, 31, OnDisconnect.DOCKER),
        (PLAIN, A_WEB, ask(), None, None, OnDisconnect.DOCKER),
    ],
)
def test_bounds(
    who: Principal, target: Target, request_: Request, timeout: float, idle: float, on_disconnect: OnDisconnect
) -> None:
    config = granted(who, target, request_).config
    assert (config.timeout, config.idle_timeout, config.on_disconnect) == (timeout, idle, on_disconnect)


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "target", "own", "others"),
    [
        (ADMIN, A_WEB, ALL_VERBS, ALL_VERBS - {Verb.EXEC}),
        (ALICE, A_WEB, ALL_VERBS, {Verb.TOP}),
        (ALICE, B_WEB, set(), set()),
        (CI_PR, A_WEB, {Verb.EXEC, Verb.INSPECT, Verb.LOGS}, set()),
        (CI_MAIN, A_WEB, ALL_VERBS, {Verb.TOP}),
        (CI_MAIN, B_WEB, {Verb.EXEC, Verb.INSPECT, Verb.LOGS}, set()),
        (AUDITOR, A_WEB, {Verb.INSPECT}, {Verb.INSPECT, Verb.LOGS}),
        (STRANGER, A_WEB, set(), set()),
        (PROGRAM, A_WEB, set(), set()),
    ],
    ids=str,
)
def test_verbs(who: Principal, target: Target, own: set[Verb], others: set[Verb]) -> None:
    """The processes of a container are nobody's session: TOP goes by `verbs` always."""
    assert {verb for verb in Verb if TEST_POLICY.permits(who, target, verb, own=True)} == own
    assert {verb for verb in Verb if TEST_POLICY.permits(who, target, verb, own=False)} == others


def test_the_first_rule_that_permits_is_told() -> None:
    rule = TEST_POLICY.permits(CI_MAIN, A_WEB, Verb.ATTACH, own=True)
    assert rule is not None
    assert rule.id == "ci-privileged"


# -- explained ---------------------------------------------------------------------------------------------------------


def test_an_explanation_has_every_rule_and_everything_in_its_way() -> None:
    request = ask("sh", tty=True, privileged=True, user="0:5", gid=5, gids=(5, 7), env=("X=1",), working_dir="/x")
    explained = {one.rule: one for one in TEST_POLICY.explain(BEA, asked(A_HOST, request))}
    assert list(explained) == [rule.id for rule in TEST_POLICY.rules]
    ours = explained["team-b"]
    assert (ours.applies, ours.shows) == (True, False)
    assert [f"{key}: {reason}" for key, reason in ours.failures] == [
        "labels: the container has no label team=b, tier",
        "gids: gid 5, 7 is not in 100-199",
        "privileged: it is asked for",
        "host_equivalent: root in this container is root on the host: it shares the pid namespace of the host",
        "env: X may not be set",
        "workdirs: /x is not allowed",
    ]
    theirs = explained["ci-privileged"]
    assert not theirs.applies
    assert [failure.condition for failure in theirs.failures] == ["who", "images", "host_equivalent", "tty"]
    assert theirs.failures[0].reason == "cert:email:bea@b.example.org is not among token:ci-main"
    assert explained["agent"].failures[1].reason == "a-host does not match sandbox-*"
    assert explained["admins"].failures[0].condition == "who"


# -- what holds for every policy ---------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b", "a*", "b*", "*", "a/*", "**"])
GLOBS = st.lists(WORDS, min_size=1, max_size=2).map(lambda texts: Globs(tuple(texts)))
SOME_GLOBS = st.one_of(st.none(), GLOBS)
RANGES = st.one_of(st.none(), st.sampled_from([((0, 0),), ((1000, 1999),), ((0, 5), (1000, 1000))]))
TIMES = st.one_of(st.none(), st.sampled_from([1.0, 60.0, 3600.0]))
VERB_SETS = st.frozensets(st.sampled_from(list(Verb)))
WHOS = st.builds(
    Who,
    text=st.just("somebody"),
    uids=st.frozensets(st.sampled_from([0, 1000])),
    gids=st.frozensets(st.sampled_from([0, 1000])),
    certificates=GLOBS,
    tokens=GLOBS,
)
RULES = st.builds(
    Rule,
    id=st.just("rule"),
    who=WHOS,
    engines=st.one_of(st.none(), st.frozensets(st.sampled_from(list(EngineName)[:2]), min_size=1)),
    containers=SOME_GLOBS,
    labels=st.sampled_from([(), (Label("team"),), (Label("team", Globs(("a*",))),)]),
    images=SOME_GLOBS,
    users=RANGES,
    gids=RANGES,
    privileged=st.booleans(),
    host_equivalent=st.booleans(),
    tty=st.one_of(st.none(), st.booleans()),
    argv=st.one_of(st.none(), st.just((Argv((Globs(("a*",)),), rest=True), Argv((Globs(("b",)),))))),
    env=SOME_GLOBS,
    workdirs=st.one_of(st.none(), st.just(Globs(("/a/**",)))),
    max_time=TIMES,
    idle_time=TIMES,
    on_disconnect=st.sampled_from(
        [(), (OnDisconnect.KILL,), (OnDisconnect.DOCKER,), (OnDisconnect.HUP, OnDisconnect.KEEP)]
    ),
    verbs=VERB_SETS,
    others=VERB_SETS,
    max_sessions=st.one_of(st.none(), st.just(1)),
    record=st.sampled_from(list(Record)),
    record_or_end=st.booleans(),
)
POLICIES = st.lists(RULES, max_size=6).map(
    lambda rules: Policy(tuple(replace(rule, id=f"r{number}") for number, rule in enumerate(rules)))
)
PRINCIPALS = st.sampled_from([ROOT, unix(1000, 1000), unix(7, 1000), cert("a"), cert("b", "a/x"), token("a"), PROGRAM])
TARGETS = st.builds(
    Target,
    engine=st.sampled_from(list(EngineName)[:3]),
    names=st.lists(st.sampled_from(["a", "b", "a/x"]), min_size=1, max_size=2).map(tuple),
    image=st.sampled_from(["", "a", "a/b"]),
    labels=st.sampled_from([{}, {"team": "a"}, {"team": "b", "x": ""}]),
)
CONFIGS = st.builds(
    ExecConfig,
    args=st.sampled_from([("a",), ("a", "x", "y"), ("b",), ("c",)]),
    tty=st.booleans(),
    env=st.sampled_from([(), ("a=1",), ("b",), ("a=", "c=2")]),
    privileged=st.booleans(),
    user=st.sampled_from(["", "x", "x:y"]),
    working_dir=st.sampled_from(["", "/a/b/", "/a/../b", "/c"]),
    timeout=st.one_of(st.none(), st.sampled_from([0.0, 0.5, 60.0, 9e9])),
    idle_timeout=st.one_of(st.none(), st.sampled_from([0.0, 0.5, 60.0, 9e9])),
    on_disconnect=st.sampled_from(list(OnDisconnect)),
)
REQUESTS = st.builds(
    Asked,
    target=TARGETS,
    config=CONFIGS,
    user=st.builds(
        ResolvedUser,
        uid=st.sampled_from([0, 1000, 5000]),
        gid=st.sampled_from([0, 1000]),
        additional_gids=st.sampled_from([(), (0, 1000), (4,)]),
    ),
    host_equivalent=st.sampled_from([(), ("why",)]),
)


@given(POLICIES, RULES, st.integers(0, 6), PRINCIPALS, REQUESTS)
def test_a_rule_more_takes_nothing_away(policy: Policy, rule: Rule, place: int, who: Principal, request: Asked) -> None:
    more = Policy((*policy.rules[:place], rule, *policy.rules[place:]))
    target = request.target
    assert more.shows(who, target) >= policy.shows(who, target)
    if isinstance(policy.decide(who, request), Grant):
        assert isinstance(more.decide(who, request), Grant)
    for verb in Verb:
        for own in (True, False):
            if policy.permits(who, target, verb, own=own):
                assert more.permits(who, target, verb, own=own)


@given(POLICIES, st.randoms(use_true_random=False), PRINCIPALS, REQUESTS)
def test_the_order_of_rules_allows_and_denies_nothing(
    policy: Policy, random: Any, who: Principal, request: Asked
) -> None:
    rules = list(policy.rules)
    random.shuffle(rules)
    shuffled = Policy(tuple(rules))
    one, other = policy.decide(who, request), shuffled.decide(who, request)
    assert isinstance(one, Grant) == isinstance(other, Grant)
    assert policy.shows(who, request.target) == shuffled.shows(who, request.target)
    if isinstance(one, Refusal) and isinstance(other, Refusal):
        assert (one.message, one.visible) == (other.message, other.visible)


@given(POLICIES, PRINCIPALS, REQUESTS)
def test_without_a_rule_there_is_nothing(policy: Policy, who: Principal, request: Asked) -> None:
    others = Policy(tuple(rule for rule in policy.rules if not rule.who.is_one(who)))
    decision = others.decide(who, request)
    assert isinstance(decision, Refusal)
    assert not decision.visible
    assert not others.shows(who, request.target)
    assert not any(others.permits(who, request.target, verb, own=own) for verb in Verb for own in (True, False))


@given(POLICIES, PRINCIPALS, REQUESTS)
def test_a_grant_changes_bounds_only_and_never_widens(policy: Policy, who: Principal, request: Asked) -> None:
    decision = policy.decide(who, request)
    if isinstance(decision, Refusal):
        return
    asks, gets = request.config, decision.config
    assert gets == replace(asks, timeout=gets.timeout, idle_timeout=gets.idle_timeout, on_disconnect=gets.on_disconnect)
    rule = next(rule for rule in policy.rules if rule.id == decision.rule)
    for asked_for, got, most in (
        (asks.timeout, gets.timeout, rule.max_time),
        (asks.idle_timeout, gets.idle_timeout, rule.idle_time),
    ):
        assert got == (asked_for or most)
        assert most is None or (got is not None and got <= most)
    assert gets.on_disconnect is asks.on_disconnect or asks.on_disconnect is OnDisconnect.DOCKER
    assert not rule.on_disconnect or gets.on_disconnect in rule.on_disconnect
    assert decision.owner == who.id


@given(POLICIES, PRINCIPALS, REQUESTS)
def test_what_was_granted_is_granted_again(policy: Policy, who: Principal, request: Asked) -> None:
    """A start decides once more, on what was stored."""
    decision = policy.decide(who, request)
    if isinstance(decision, Grant):
        assert policy.decide(who, replace(request, config=decision.config)) == decision


@given(POLICIES, PRINCIPALS, REQUESTS)
def test_an_explanation_agrees_with_the_decision(policy: Policy, who: Principal, request: Asked) -> None:
    explained, decision = policy.explain(who, request), policy.decide(who, request)
    allowing = [one.rule for one in explained if not one.failures]
    assert allowing[:1] == ([decision.rule] if isinstance(decision, Grant) else [])
    assert any(one.shows for one in explained) == policy.shows(who, request.target)
    if isinstance(decision, Refusal):
        first = {one.rule: one.failures[0].condition for one in explained if one.shows}
        assert outcome(decision) == (", ".join(f"{rule} {key}" for rule, key in first.items()) or HIDDEN)


@given(POLICIES, st.lists(st.tuples(PRINCIPALS, TARGETS, st.integers(0, 3)), max_size=30))
def test_what_is_remembered_is_what_is_so(policy: Policy, looks: list[tuple[Principal, Target, int]]) -> None:
    for who, target, pid in looks:
        found = any(rule.who.is_one(who) and rule.shows(target) for rule in policy.rules)
        assert policy.shows(replace(who, pid=pid), target) == found


def test_what_is_remembered_ends_with_any_change() -> None:
    assert TEST_POLICY.shows(CI_MAIN, A_WEB)
    assert not TEST_POLICY.shows(CI_MAIN, replace(A_WEB, image="evil.example.org/web:1.2"))
    assert TEST_POLICY.shows(BEA, B_WEB)
    assert not TEST_POLICY.shows(BEA, replace(B_WEB, labels={"team": "b"}))
    assert not TEST_POLICY.shows(BEA, replace(B_WEB, engine=EngineName.OCI))
    assert TEST_POLICY.shows(unix(8, 27), A_WEB)
    assert not TEST_POLICY.shows(unix(8, 28), A_WEB)  # the same user, without the group
    assert TEST_POLICY.shows(cert("x", "bea@b.example.org"), B_WEB)
    assert not TEST_POLICY.shows(cert("x"), B_WEB)


def test_what_is_remembered_is_bounded() -> None:
    policy = TEST_POLICY
    for number in range(3000):
        policy.shows(unix(100_000 + number), A_WEB)
        policy.shows(replace(ADMIN, pid=number), replace(A_WEB, names=(f"c{number}",)))
    assert len(policy._mine) <= 64
    assert all(len(mine._showing) <= 1024 for mine in policy._mine.values())


def test_a_decision_is_cheap() -> None:
    """A thousand decisions by a hundred rules each take some 0.05 s, and must not take hundreds of times that."""
    rules = "".join(
        f'[[rule]]\nid = "r{n}"\nwho = ["uid:1000"]\ncontainers = ["a-*"]\nlabels = ["team=a"]\nusers = ["{n}"]\n'
        for n in range(1, 101)
    )
    policy = parse_policy(rules.encode(), "p")
    request = asked(A_WEB, ask())
    before = time.process_time()
    for _ in range(1000):
        policy.decide(ALICE, request)
    assert time.process_time() - before < 2
