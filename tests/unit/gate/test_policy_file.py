"""The file of a policy: what it means, every mistake in words, who may write it, and the copy for after a crash."""

import contextlib
import grp
import json
import logging
import os
import pwd
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.gate.globs import Globs
from execgate.gate.policy import COPY, MAX_FILE, default_policy, load_policy, parse_policy, policy_in_force
from execgate.gate.rules import ALL_VERBS, Argv, Label, Policy, Refusal, Rule, Who
from execgate.gate.tables import RuleTable
from execgate.model.access import Asked, Grant, Record, Target, Verb
from execgate.model.config import ExecConfig, OnDisconnect, ResolvedUser
from execgate.model.container import EngineName
from execgate.model.errors import InvalidArgument
from execgate.model.principal import Method, Principal

GOOD = '[[rule]]\nid = "r"\nwho = ["uid:1000"]\n'
OTHER = '[[rule]]\nid = "other"\nwho = ["uid:1001"]\n'
SOMEBODY = pwd.getpwuid(1)
SOME_GROUP = grp.getgrgid(1)


def parse(text: str) -> Policy:
    return parse_policy(text.encode(), "p.toml")


def mistakes(text: str) -> list[str]:
    with pytest.raises(InvalidArgument) as failure:
        parse(text)
    return failure.value.message.splitlines()


def globs(*texts: str) -> Globs:
    return Globs(texts)


def test_every_key() -> None:
    named = [f"user:{SOMEBODY.pw_name}", f"group:{SOME_GROUP.gr_name}"]
    who = [*named, "uid:7", "gid:8", "cert:*.example.org", "token:ci-*"]
    policy = parse(f"""
[[rule]]
id = "every-key"
who = {json.dumps(who)}
engines = ["docker", "crio"]
containers = ["web", "db-*"]
labels = ["team=a*", "tier", "x="]
images = ["ghcr.io/acme/**"]
users = [0, "1000-1999", "65534"]
gids = ["5"]
privileged = true
host_equivalent = true
tty = false
argv = [["ls", "**"], ["cat", "/etc/hostname"]]
env = ["LANG", "APP_*"]
workdirs = ["/srv/**", "/"]
max_time = "1.5h"
idle_time = 2.5
max_sessions = 3
on_disconnect = ["kill", "docker"]
verbs = ["exec", "inspect"]
others = []
record = "all"
record_failure = "closed"
""")
    assert policy.rules == (
        Rule(
            id="every-key",
            who=Who(
                text=", ".join(who),
                uids=frozenset({1, 7}),
                gids=frozenset({1, 8}),
                certificates=globs("dns:*.example.org"),
                tokens=globs("ci-*"),
            ),
            engines=frozenset({EngineName.DOCKER, EngineName.CRIO}),
            containers=globs("web", "db-*"),
            labels=(Label("team", globs("a*")), Label("tier"), Label("x", globs(""))),
            images=globs("ghcr.io/acme/**"),
            users=((0, 0), (1000, 1999), (65534, 65534)),
            gids=((5, 5),),
            privileged=True,
            host_equivalent=True,
            tty=False,
            argv=(Argv((globs("ls"),), rest=True), Argv((globs("cat"), globs("/etc/hostname")))),
            env=globs("LANG", "APP_*"),
            workdirs=globs("/srv/**", "/"),
            max_time=5400,
            idle_time=2.5,
            max_sessions=3,
            on_disconnect=(OnDisconnect.KILL, OnDisconnect.DOCKER),
            verbs=frozenset({Verb.EXEC, Verb.INSPECT}),
            others=frozenset(),
            record=Record.ALL,
            record_or_end=True,
        ),
    )


def test_what_no_key_means() -> None:
    assert parse(GOOD).rules == (Rule(id="r", who=Who(text="uid:1000", uids=frozenset({1000}))),)
    rule = parse(GOOD).rules[0]
    assert (rule.privileged, rule.host_equivalent, rule.others, rule.verbs) == (False, False, frozenset(), ALL_VERBS)


def test_one_text_is_a_list_of_one() -> None:
    rule = parse(
        '[[rule]]\nid = "r"\nwho = "uid:1"\ncontainers = "web"\nusers = 5\nengines = "oci"\nverbs = "exec"'
    ).rules[0]
    assert rule.containers == globs("web")
    assert rule.users == ((5, 5),)
    assert (rule.engines, rule.verbs) == (frozenset({EngineName.OCI}), frozenset({Verb.EXEC}))


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ('"30s"', 30),
        ('"1.5s"', 1.5),
        ('"5m"', 300),
        ('"2h"', 7200),
        ('"1d"', 86400),
        ('"90"', 90),
        ('"500ms"', 0.5),
        ('"30d"', 2592000),
        ("2592000", 2592000),
    ],
)
def test_times(written: str, seconds: float) -> None:
    assert parse(f"{GOOD}max_time = {written}").rules[0].max_time == seconds


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('max_time = ""', "max_time: '' is no span of time"),
        ('max_time = "5 m"', "max_time: '5 m' is no span of time"),
        ('max_time = "5m1h"', "max_time: '5m1h' is no span of time"),
        ("max_time = [5]", "max_time: a number of seconds is expected"),
        ('max_time = "٣s"', "max_time: '٣s' is no span of time"),
        ("max_time = true", "max_time: a number of seconds is expected"),
        ("max_time = 0", "max_time: more than 0 and at most 30 days"),
        ("max_time = -1", "max_time: more than 0"),
        ("max_time = nan", "max_time: more than 0"),
        ("max_time = inf", "max_time: more than 0"),
        (f"max_time = {'9' * 400}", "max_time: more than 0"),
        ('idle_time = "31d"', "idle_time: more than 0 and at most 30 days"),
        ('users = ["app"]', "users: 'app' is neither a number nor a range like 1000-1999 (names are the container's"),
        ('users = ["1000-"]', "users: '1000-' is neither"),
        ('users = ["-1"]', "users: '-1' is neither"),
        ("users = [-1]", "users: '-1' is neither"),
        ("users = [true]", "users: 'True' is neither"),
        ("users = [1.5]", "users: '1.5' is neither"),
        ('users = ["2000-1000"]', "users: '2000-1000' is no range within 0-4294967294"),
        ("users = [4294967295]", "users: '4294967295' is no range"),
        (f"users = [0x{'f' * 5000}]", "users: "),
        ("users = []", "users: an empty list would allow nothing"),
        ('gids = ["wheel"]', "gids: 'wheel' is neither"),
        ("containers = []", "containers: an empty list would allow nothing; leave the key out if anything is meant"),
        ('containers = [""]', "containers: an empty text matches nothing"),
        ("containers = [5]", "containers: a list of texts is expected"),
        ('containers = ["web**"]', "containers: 'web**': `**` stands for whole parts"),
        ('containers = ["[a"]', "containers: '[a': a `[` without its `]`"),
        ('images = ["x/../*"]', "images: 'x/../*': `..`"),
        ('labels = ["=x"]', "labels: '=x': KEY or KEY=GLOB is expected"),
        ('engines = ["dockr"]', "engines[0]: input should be 'docker', 'podman', 'containerd', 'crio' or 'oci'"),
        ("engines = []", "engines: "),
        ('privileged = "yes"', "privileged: input should be a valid boolean"),
        ("privileged = 1", "privileged: input should be a valid boolean"),
        ('host_equivalent = "true"', "host_equivalent: input should be a valid boolean"),
        ('tty = "yes"', 'tty: true, false or "any" is expected'),
        ("tty = 1", "tty: true, false"),
        ("argv = []", "argv: a list of lists is expected"),
        ('argv = ["ls"]', "argv: a list of lists is expected"),
        ("argv = [[]]", "argv: a list of lists is expected"),
        ('argv = [["ls", 5]]', "argv: a list of texts is expected"),
        ('argv = [["ls", "**", "x"]]', "argv: `**` by itself means any further arguments, and must be the last"),
        ('argv = [["**"]]', "argv: the program is missing"),
        ('env = ["A**"]', "env: 'A**': `**`"),
        ('workdirs = ["srv"]', "workdirs: 'srv' is not absolute"),
        ('workdirs = ["/srv/"]', "workdirs: '/srv/': write it without"),
        ('workdirs = ["/srv/../x"]', "workdirs: '/srv/../x': write it without `..`"),
        ("max_sessions = 0", "max_sessions: input should be greater than or equal to 1"),
        ('max_sessions = "3"', "max_sessions: input should be a valid integer"),
        ("max_sessions = 1.0", "max_sessions: input should be a valid integer"),
        ('on_disconnect = "stop"', "on_disconnect: 'stop' is none of docker, keep, hup, kill"),
        ('on_disconnect = [""]', "on_disconnect: '' is none of"),
        ('verbs = ["run"]', "verbs[0]: input should be 'exec', 'inspect'"),
        ('others = ["top"]', "others: top is about a container and not a session: it belongs to verbs"),
        ('record = "yes"', "record: input should be 'output' or 'all'"),
        ('record_failure = "closed"', "record_failure: nothing is recorded without record"),
        ('continers = ["x"]', "continers: a rule has no such key; is containers meant?"),
        ("zzz = 1", "zzz: a rule has no such key"),
        ('"\\u001b[31m" = 1', "\\x1b[31m: a rule has no such key"),
    ],
)
def test_mistakes_of_a_key(line: str, said: str) -> None:
    (mistake,) = mistakes(GOOD + line)
    number = 4 if line[0].isalpha() else 1  # a key in quotes is not looked for
    assert mistake.startswith(f"p.toml: rule r (line {number}): {said}")
    assert mistake.isprintable()
    assert len(mistake) < 600


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("[]", "an empty list would allow nothing"),
        ('["*"]', "'*': user:NAME, uid:N, group:NAME, gid:N, cert:GLOB or token:GLOB is expected; there is none for"),
        ('["anyone"]', "'anyone': user:NAME"),
        ('["root"]', "'root': user:NAME"),
        ('["uid:"]', "'uid:': user:NAME"),
        ('["program:self"]', "'program:self': user:NAME"),
        ('["unix:1000"]', "'unix:1000': user:NAME"),
        ('["uid:root"]', "'root' is no number within 0-4294967294; names are user:NAME and group:NAME"),
        ('["uid:*"]', "'*' is no number"),
        ('["uid:4294967295"]', "'4294967295' is no number"),
        ('["uid:٣"]', "'٣' is no number"),
        ('["user:nobody-has-this-name"]', "this host has no user 'nobody-has-this-name'"),
        ('["user:a\\u0000b"]', "this host has no user"),
        ('["group:nobody-has-this-name"]', "this host has no group 'nobody-has-this-name'"),
        ('["cert:[a"]', "'dns:[a': a `[` without its `]`"),
        ("5", "a list of texts is expected"),
    ],
)
def test_mistakes_of_who(who: str, said: str) -> None:
    (mistake,) = mistakes(f'[[rule]]\nid = "r"\nwho = {who}\n')
    assert mistake.startswith(f"p.toml: rule r (line 3): who: {said}")
    assert mistake.isprintable()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "p.toml: no [[rule]] in it: nobody could do anything"),
        ("# nothing\n", "p.toml: no [[rule]] in it"),
        ("rule = []", "p.toml: no [[rule]] in it"),
        ("rule = 5", "p.toml: rule: write [[rule]] above each rule"),
        ('[rule]\nid = "r"', "p.toml: rule: write [[rule]] above each rule"),
        ("rule = [5]", "p.toml: rule: write [[rule]] above each rule"),
        ("[[rules]]\n", "p.toml: rules: there is nothing but [[rule]] in a policy"),
        (f"default = 'allow'\n{GOOD}", "p.toml: default: there is nothing but [[rule]]"),
        ("[[rule]\n", "p.toml: Expected ']]' at the end of an array declaration (at line 1, column 7)"),
        (f"{GOOD}id = 'again'", "p.toml: Cannot overwrite a value"),
        (f"{GOOD}labels = {'[' * 5000}", "p.toml: "),
        ("[[rule]]\nwho = ['uid:1']", "p.toml: rule number 1 (line 1): id: every rule needs it"),
        ("[[rule]]\nid = 'r'", "p.toml: rule r (line 1): who: every rule needs it"),
        ("[[rule]]\nid = 'R'\nwho = 'uid:1'", "p.toml: rule R (line 2): id: small letters, digits, and . _ - behind"),
        ("[[rule]]\nid = '-r'\nwho = 'uid:1'", "p.toml: rule -r (line 2): id: small letters"),
        ("[[rule]]\nid = ''\nwho = 'uid:1'", "p.toml: rule  (line 2): id: small letters"),
        ('[[rule]]\nid = "r\\n"\nwho = "uid:1"', "p.toml: rule r\\n (line 2): id: small letters"),
        (f"[[rule]]\nid = '{'r' * 65}'\nwho = 'uid:1'", "p.toml: rule rrrr"),
        ("[[rule]]\nid = 5\nwho = 'uid:1'", "p.toml: rule number 1 (line 2): id: input should be a valid string"),
        (GOOD + GOOD, "p.toml: 2 rules have the id r"),
        ("rule = [{id = 'r'}]", "p.toml: rule r: who: every rule needs it"),
    ],
)
def test_mistakes_of_a_file(text: str, said: str) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(said)


def test_all_mistakes_are_named_at_once_each_with_its_line() -> None:
    text = """
[[rule]]
id = "a"
who = ["uid:x"]
users = ["root"]

[[rule]]   # another
who = ["uid:1"]
max_time = "long"
nonsense = 1
[[rule]]
id = "a"
who = ["uid:1"]
"""
    assert [": ".join(mistake.split(": ")[1:3]) for mistake in mistakes(text)] == [
        "rule a (line 4): who",
        "rule a (line 5): users",
        "rule number 2 (line 7): id",
        "rule number 2 (line 9): max_time",
        "rule number 2 (line 10): nonsense",
        "2 rules have the id a",
    ]


def test_very_many_mistakes_are_counted() -> None:
    found = mistakes("".join(f'[[rule]]\nid = "r{n}"\nwho = ["uid:x"]\n' for n in range(200)))
    assert len(found) == 51
    assert found[-1] == "p.toml: and 150 more"


def test_too_many_rules() -> None:
    assert mistakes("[[rule]]\n" * 10_001) == ["p.toml: 10001 rules, 10000 at most"]


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(InvalidArgument, match=r"^p\.toml: 'utf-8' codec"):
        parse_policy(b"\xff", "p.toml")


VALUES: Any = st.recursive(
    st.one_of(
        st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["*", "**", "uid:1", "1-2"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value if not 0xD800 <= ord(c) <= 0xDFFF) + '"'
    return str(value)


KEYS = st.sampled_from([field for field in Rule.__dataclass_fields__ if field[0] != "_"] + ["record_failure", "x"])


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_is_written_is_a_policy_or_a_mistake(keys: dict[str, object]) -> None:
    text = "[[rule]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())
    said = ""
    try:
        assert len(parse(text).rules) == 1
    except InvalidArgument as error:
        said = error.message
    assert all(line.startswith("p.toml: ") and line.isprintable() for line in said.split("\n") if said)


def test_ten_thousand_rules_are_read_in_seconds() -> None:
    rule = '[[rule]]\nid = "r{n}"\nwho = ["uid:{n}"]\ncontainers = ["c{n}-*"]\nargv = [["ls", "*"]]\n'
    text = "".join(rule.replace("{n}", str(n)) for n in range(10_000))
    assert len(text) < MAX_FILE
    before = time.process_time()
    assert len(parse(text).rules) == 10_000
    assert time.process_time() - before < 60


# -- what the documentation shows --------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/policy.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def nobody_in_particular(_kind: str, _name: str) -> int:
    """Their users and groups are not those of this host."""
    return 7


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_page_are_policies(example: str) -> None:
    text = example if "[[rule]]" in example else GOOD + example
    assert parse_policy(text.encode(), "p.toml", nobody_in_particular).rules


def test_the_page_has_every_key_and_no_other() -> None:
    assert len(EXAMPLES) >= 6
    keys = PAGE.partition("## The keys of a rule")[2].partition("### Who")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == set(RuleTable.model_fields)


def test_the_policy_to_begin_with_is_one_with_its_comments_too() -> None:
    text = (ROOT / "deploy/policy.toml").read_text(encoding="utf-8")
    assert [rule.id for rule in parse_policy(text.encode(), "p.toml", nobody_in_particular).rules] == ["admins"]
    everything = re.sub(r"^# (?=\[\[|\w+ = )", "", text, flags=re.MULTILINE)
    assert len(parse_policy(everything.encode(), "p.toml", nobody_in_particular).rules) == 3


# -- who may write it --------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    path.chmod(0o644)
    return path


def refused(path: Path) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as failure:
        load_policy(path)
    assert failure.value.message.startswith(f"{path}: ")
    return failure.value


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o644, 0o755, 0o1644])
def test_modes_that_are_trusted(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert load_policy(file).rules[0].id == "r"


@pytest.mark.parametrize("mode", [0o660, 0o664, 0o646, 0o622, 0o777])
def test_modes_that_let_others_write(file: Path, mode: int) -> None:
    file.chmod(mode)
    error = refused(file)
    assert error.message == f"{file}: its mode {mode:04o} lets others write it"
    assert error.hint == f"chmod go-w {file}"
    os.system(error.hint)  # it is what helps
    assert load_policy(file).rules


def test_a_file_of_somebody_else(file: Path) -> None:
    os.chown(file, 1000, 0)
    error = refused(file)
    assert error.message == f"{file}: it belongs to uid 1000, who could change it"
    os.system(error.hint)
    assert load_policy(file).rules


@contextlib.contextmanager
def effective_user(uid: int) -> Iterator[None]:
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_file_of_the_user_of_the_service() -> None:
    """Root's, and that user's own, and nobody else's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        file = Path(directory) / "policy.toml"
        file.write_text(GOOD)
        for owner in (0, 1000):
            os.chown(file, owner, 0)
            with effective_user(1000):
                assert load_policy(file).rules
        os.chown(file, 1001, 0)
        with effective_user(1000):
            assert "uid 1001" in refused(file).message


def test_a_link_is_as_good_as_what_it_leads_to(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert load_policy(link).rules
    file.chmod(0o666)
    assert "0666" in refused(link).message
    file.unlink()
    assert refused(link).message == f"{link}: No such file or directory"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/null")):
        assert refused(path).message == f"{path}: not a regular file"


def test_a_file_that_is_too_large(file: Path) -> None:
    file.write_text(GOOD + "#" * (MAX_FILE - len(GOOD)))
    assert load_policy(file).rules
    file.write_text(GOOD + "#" * (MAX_FILE - len(GOOD) + 1))
    assert refused(file).message == f"{file}: larger than {MAX_FILE} bytes"


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name of a file"):
        load_policy(Path("/a\0b"))


# -- without one -------------------------------------------------------------------------------------------------------

WEB = Target(engine=EngineName.DOCKER, names=("web",))


def peer(uid: int) -> Principal:
    return Principal(method=Method.UNIX, name=str(uid), names=frozenset({str(uid)}), uid=uid, gids=frozenset({uid}))


def decide(policy: Policy, uid: int, *, privileged: bool = False, why: tuple[str, ...] = ()) -> Grant | Refusal:
    config = ExecConfig(args=("sh",), privileged=privileged, user="x:y", env=("A=1",), timeout=1e6)
    return policy.decide(
        peer(uid), Asked(target=WEB, config=config, user=ResolvedUser(uid=0, gid=0), host_equivalent=why)
    )


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("host_equivalent", [False, True])
def test_without_a_policy_the_owner_may_do_all_but_what_is_not_allowed(privileged: bool, host_equivalent: bool) -> None:
    policy = default_policy(1000, allow_privileged=privileged, allow_host_equivalent=host_equivalent)
    assert isinstance(decide(policy, 1000), Grant)
    assert isinstance(decide(policy, 1000, privileged=True), Grant) == privileged
    assert isinstance(decide(policy, 1000, why=("it is",)), Grant) == host_equivalent
    assert all(policy.permits(peer(1000), WEB, verb, own=own) for verb in Verb for own in (True, False))
    for other in (0, 1001):
        refusal = decide(policy, other)
        assert isinstance(refusal, Refusal)
        assert not refusal.visible


# -- what is in force --------------------------------------------------------------------------------------------------


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return path


def in_force(path: Path | None, state_dir: Path, *, restarted: bool = False) -> str | None:
    """Return the first rule of the policy that a worker goes by whose time comes; None for one without a policy."""
    found = policy_in_force(path, state_dir, restarted=restarted)
    found.keep(state_dir)
    return found.policy.rules[0].id if found.policy else None


def test_a_start_keeps_what_it_reads(file: Path, state_dir: Path) -> None:
    assert in_force(file, state_dir) == "r"
    copy = state_dir / COPY
    assert copy.read_text() == GOOD
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [one.name for one in state_dir.iterdir()] == [COPY]
    file.write_text(OTHER)
    assert in_force(file, state_dir) == "other"
    assert copy.read_text() == OTHER


@pytest.mark.parametrize("content", ["", "[[rule", '[[rule]]\nid = "r"\nwho = ["user:nobody-has-this-name"]\n'])
def test_a_start_or_a_reload_with_a_broken_file_fails(file: Path, state_dir: Path, content: str) -> None:
    assert in_force(file, state_dir) == "r"
    file.write_text(content)
    with pytest.raises(InvalidArgument):
        in_force(file, state_dir)
    assert (state_dir / COPY).read_text() == GOOD  # of the one that goes on


def test_what_is_only_read_is_not_in_force(file: Path, state_dir: Path) -> None:
    """The worker of a reload may fail for another reason yet, and then the old one goes on."""
    in_force(file, state_dir)
    file.write_text(OTHER)
    policy_in_force(file, state_dir, restarted=False)
    assert in_force(file, state_dir, restarted=True) == "r"


def test_after_a_crash_the_policy_is_the_one_that_was_in_force(
    file: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever has become of its file: a change of it is not in force before somebody reloads it."""
    in_force(file, state_dir)
    assert in_force(file, state_dir, restarted=True) == "r"
    assert not caplog.records
    changes: list[Callable[[], object]] = [
        lambda: file.write_text(OTHER),
        lambda: file.write_text("[[rule"),
        lambda: file.chmod(0o666),
        file.unlink,
    ]
    for change in changes:
        change()
        for _ in range(2):  # each time
            caplog.clear()
            assert in_force(file, state_dir, restarted=True) == "r"
            (record,) = caplog.records
            assert record.levelno == logging.ERROR
            assert record.getMessage().startswith(f"the policy that was in force stays so: {file}")


def test_after_a_crash_a_policy_that_is_gone_is_not_no_policy(
    file: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_force(file, state_dir)
    assert in_force(None, state_dir, restarted=True) == "r"
    assert "its file is gone" in caplog.text
    assert in_force(None, state_dir) is None  # but who starts the service, or reloads it, can mean that
    assert in_force(None, state_dir, restarted=True) is None


def test_after_a_crash_without_a_policy_there_is_none_either(file: Path, state_dir: Path) -> None:
    """Somebody was writing the first one."""
    assert in_force(None, state_dir) is None
    for text in (GOOD, "[[rule"):
        file.write_text(text)
        assert in_force(file, state_dir, restarted=True) is None
    with pytest.raises(InvalidArgument):
        in_force(file, state_dir)


def test_after_a_crash_without_a_copy_it_is_that_of_a_start(file: Path, state_dir: Path) -> None:
    assert in_force(file, state_dir, restarted=True) == "r"
    (state_dir / COPY).unlink()
    file.write_text("[[rule")
    with pytest.raises(InvalidArgument, match=str(file)):
        in_force(file, state_dir, restarted=True)


def test_a_copy_that_others_could_write_is_none(file: Path, state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_force(file, state_dir)
    (state_dir / COPY).chmod(0o666)
    file.write_text(OTHER)
    assert in_force(file, state_dir, restarted=True) == "other"
    assert "lets others write it" in caplog.text
    (state_dir / COPY).chmod(0o666)
    file.unlink()
    with pytest.raises(InvalidArgument, match=str(file)):
        in_force(file, state_dir, restarted=True)
    with pytest.raises(InvalidArgument, match="is lost"):  # and who could do all without a policy cannot now
        in_force(None, state_dir, restarted=True)


def test_after_a_crash_a_user_who_is_gone_is_nobody(
    file: Path, state_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was good when it was read must not keep the next worker from coming."""
    file.write_text(f'[[rule]]\nid = "r"\nwho = ["user:{SOMEBODY.pw_name}", "uid:7"]\n')
    in_force(file, state_dir)

    def gone(_name: str) -> pwd.struct_passwd:
        raise KeyError("gone")

    monkeypatch.setattr(pwd, "getpwnam", gone)
    policy = policy_in_force(file, state_dir, restarted=True).policy
    assert policy is not None
    assert policy.rules[0].who.uids == {7}
    assert f"the policy speaks of nobody: this host has no user '{SOMEBODY.pw_name}'" in caplog.text
    assert not policy.shows(peer(1), WEB)


def test_a_state_directory_that_is_not_there_is_made(file: Path, state_dir: Path) -> None:
    below = state_dir / "new"
    assert in_force(file, below) == "r"
    assert stat.S_IMODE(below.stat().st_mode) == 0o700


def test_a_copy_that_cannot_be_kept_is_no_reason_not_to_serve(
    file: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (state_dir / f"{COPY}.new").mkdir()
    assert in_force(file, state_dir) == "r"
    assert "the policy cannot be kept" in caplog.text


def test_a_policy_that_cannot_be_kept_does_not_bring_an_older_one_back(file: Path, state_dir: Path) -> None:
    assert in_force(file, state_dir) == "r"
    file.write_text(OTHER)
    (state_dir / f"{COPY}.new").mkdir()
    assert in_force(file, state_dir) == "other"
    assert in_force(file, state_dir, restarted=True) == "other"
