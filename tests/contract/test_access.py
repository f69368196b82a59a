"""Two users, two rule sets, ten containers: to each of them what is the other's does not exist.

By every way in: as users of the host at the unix socket, by token over TCP, by certificate over TLS.
"""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contract.api import NO_SUCH_ID
from execgate.gate.tokens import revoke_token
from support.access import EVERYTHING, User, UserApi, bearer, rule, write_policy
from support.api import OUTPUT, RawApi, start_bytes
from support.clients import DockerCli
from support.faults import faulty_runtime
from support.programs import find_program
from support.raw import Answer, request_bytes
from support.runtimes import RuntimeHost, TestContainer
from support.service import TOKENS, Service
from support.tls import Authority, TlsTarget
from support.tls_service import free_port

RED, BLUE = User(4001, 4001), User(4002, 4002, groups=(4444,))
NOBODY = User(4999, 4999)
COUNT = 5

POLICY = (
    rule("red", ["uid:4001", "token:red", "cert:red@example.org"], labels=["team=red"], users=["0", "1000-1999"]),
    rule("blue", ["gid:4444", "token:blue", "cert:blue.example.org"], labels=["team=blue"], users=["0", "1000-1999"]),
    rule("audit", ["token:auditor"], labels=["team=red"], verbs=["inspect", "top"], others=["inspect", "logs"]),
    rule("root", ["token:root"], **EVERYTHING),
)


@dataclass(frozen=True, slots=True)
class Party:
    """One user, the containers that are its own, and those that are not."""

    api: RawApi
    own: Sequence[TestContainer]
    others: Sequence[TestContainer]


@dataclass(frozen=True, slots=True)
class Scene:
    """A service with a policy, and everybody who uses it."""

    service: Service
    red: Party
    blue: Party
    root: RawApi
    auditor: RawApi
    nobody: RawApi


@pytest.fixture(scope="module")
def prefix() -> str:
    return f"{secrets.token_hex(4)}-"


@pytest.fixture(scope="module")
def teams(runc: RuntimeHost, prefix: str) -> Iterator[dict[str, list[TestContainer]]]:
    made = {
        team: [runc.run(f"{prefix}{team}-{number}", annotations={"team": team}) for number in range(COUNT)]
        for team in ("red", "blue")
    }
    yield made
    for container in (*made["red"], *made["blue"]):
        container.delete()


@pytest.fixture(scope="module")
def authority(host_dir: Path) -> Authority:
    return Authority.make(host_dir / "access-ca")


@pytest.fixture(scope="module", params=["unix", "tcp", "tls"])
def scene(
    request: pytest.FixtureRequest,
    host_dir: Path,
    hosts: list[RuntimeHost],
    event_loop_name: str,
    teams: dict[str, list[TestContainer]],
    authority: Authority,
) -> Iterator[Scene]:
    directory = host_dir / f"access-{request.param}"
    write_policy(directory, *POLICY)
    tokens = {name: bearer(directory, name) for name in ("red", "blue", "auditor", "root", "nobody")}
    port, tls_port = free_port(), free_port()
    server = authority.server(f"server-{request.param}", "127.0.0.1")
    env = {
        "EXECGATE_TLS_CERTIFICATE": str(server.certificate),
        "EXECGATE_TLS_KEY": str(server.key),
        "EXECGATE_TLS_CLIENT_CA": str(authority.ca),
    }
    addresses = [f"unix://{directory}/execgate.sock", f"tcp://127.0.0.1:{port}", f"tls://127.0.0.1:{tls_port}"]
    flags = [*(f"--listen={address}" for address in addresses), "--socket-mode=0666"]
    host_dir.chmod(0o711)  # the users have to get there
    directory.chmod(0o711)
    service = Service.start(directory, hosts, flags=flags, env=env, event_loop=event_loop_name)
    by_token = {name: RawApi(("127.0.0.1", port), headers=header) for name, header in tokens.items()}
    if request.param == "unix":
        apis: list[RawApi] = [UserApi(service.socket, user) for user in (RED, BLUE, NOBODY)]
    elif request.param == "tls":
        names = ("red@example.org", "blue.example.org", "DNS:red.example.org")
        clients = [authority.client(f"client-{number}", name) for number, name in enumerate(names)]
        apis = [RawApi(TlsTarget(tls_port, authority.ca, client)) for client in clients]
    else:
        apis = [by_token[name] for name in ("red", "blue", "nobody")]
    red, blue, nobody = apis
    yield Scene(
        service,
        Party(red, teams["red"], teams["blue"]),
        Party(blue, teams["blue"], teams["red"]),
        by_token["root"],
        by_token["auditor"],
        nobody,
    )
    service.stop()


@pytest.fixture(params=["red", "blue"])
def party(request: pytest.FixtureRequest, scene: Scene) -> Party:
    """Each of the two in turn."""
    found = getattr(scene, request.param)
    assert isinstance(found, Party)
    return found


@pytest.fixture
def other(party: Party, scene: Scene) -> Party:
    """The other one."""
    return scene.blue if party is scene.red else scene.red


def ids(answer: Answer, key: str = "Id") -> set[str]:
    assert answer.status == 200, answer
    return {one[key] for one in answer.json}


def same_but(answer: Answer, secret: str, control: Answer, nothing: str) -> None:
    """Fail unless two answers differ in nothing but the name that was asked for."""
    assert (answer.status, answer.reason) == (control.status, control.reason), answer
    assert answer.body.replace(secret.encode(), nothing.encode()) == control.body
    differing = {"date", "content-length"}
    assert {k: v for k, v in answer.headers.items() if k not in differing} == {
        k: v for k, v in control.headers.items() if k not in differing
    }


# -- containers


def test_each_lists_its_own(party: Party) -> None:
    own = {container.id for container in party.own}
    assert ids(party.api.call("GET", "/containers/json?all=1")) == own
    assert ids(party.api.call("GET", "/v5.0.0/libpod/containers/json?all=true")) == own
    info = party.api.call("GET", "/info").json
    assert (info["Containers"], info["ContainersRunning"]) == (COUNT, COUNT)


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/containers/{}/json", None),
        ("GET", "/containers/{}/top", None),
        ("POST", "/containers/{}/exec", {"Cmd": ["true"]}),
        ("POST", "/containers/{}/exec", {"Cmd": ["true"], "User": "nosuchuser"}),
        ("POST", "/containers/{}/exec/run", {"Cmd": ["true"]}),
        ("GET", "/containers/{}/exec/json", None),
        ("GET", '/exec/json?filters={{"container":["{}"]}}', None),
        ("GET", "/v5.0.0/libpod/containers/{}/exists", None),
        ("GET", "/v5.0.0/libpod/containers/{}/json", None),
        ("POST", "/v5.0.0/libpod/containers/{}/exec", {"Cmd": ["true"]}),
    ],
)
def test_what_is_anothers_is_as_if_it_was_not_there(party: Party, method: str, target: str, body: object) -> None:
    def ask(ref: str) -> Answer:
        return party.api.call(method, target.format(ref).replace('"', "%22"), body)

    foreign, nothing = party.others[0].id, "nosuch-" + "x" * (len(party.others[0].id) - 7)
    for hidden in (foreign, f"oci:{foreign}"):
        absent = hidden.replace(foreign, nothing)
        same_but(ask(hidden), hidden, ask(absent), absent)
    assert ask(foreign).status == 404
    assert ask(party.own[0].id).status < 400 or "nosuchuser" in str(body)


def test_no_prefix_tells_of_what_is_anothers(party: Party, prefix: str) -> None:
    """Of ten that begin so, five are the party's: the error tells of no more, and a prefix of one is that one."""
    assert "multiple IDs" in party.api.call("GET", f"/containers/{prefix}/json").message
    foreign = party.others[0].id
    assert party.api.call("GET", f"/containers/{foreign[:-1]}/json").status == 404
    own = party.own[3].id
    assert party.api.call("GET", f"/containers/{own}/json").json["Id"] == own


def test_a_prefix_that_only_hidden_ones_share_with_one_is_that_one(
    scene: Scene, runc: RuntimeHost, teams: dict[str, list[TestContainer]]
) -> None:
    """What makes a prefix ambiguous for root is not there for red."""
    stem = teams["red"][0].id[:-1]
    twin = runc.run(f"{stem}0x{secrets.token_hex(2)}", annotations={"team": "blue"})
    try:
        assert scene.root.call("GET", f"/containers/{stem}0x/json").status == 200
        found = scene.red.api.call("GET", f"/containers/{stem}0/json")
        assert found.json["Id"] == teams["red"][0].id
        assert scene.red.api.call("GET", f"/containers/{twin.id}/json").status == 404
    finally:
        twin.delete()


# -- sessions


SESSION_REQUESTS: list[tuple[str, str, object]] = [
    ("GET", "/exec/{}/json", None),
    ("POST", "/exec/{}/start", {"Detach": True}),
    ("POST", "/exec/{}/start", {"Detach": False}),
    ("POST", "/exec/{}/resize?h=10&w=10", None),
    ("POST", "/exec/{}/kill", None),
    ("POST", "/exec/{}/kill?signal=HUP", None),
    ("POST", "/exec/{}/stop", None),
    ("POST", "/exec/{}/wait", None),
    ("DELETE", "/exec/{}", None),
    ("DELETE", "/exec/{}?force=1", None),
    ("GET", "/exec/{}/logs", None),
    ("GET", "/exec/{}/logs?follow=1", None),
    ("GET", "/exec/{}/result", None),
    ("POST", "/exec/{}/attach", None),
    ("POST", "/exec/{}/attach?after=0", None),
    ("POST", "/exec/{}/stdin?eof=1", b"exit\n"),
    ("GET", "/v5.0.0/libpod/exec/{}/json", None),
    ("POST", "/v5.0.0/libpod/exec/{}/start", {"Detach": True}),
    ("POST", "/v5.0.0/libpod/exec/{}/resize?h=10&w=10", None),
    ("POST", "/v5.0.0/libpod/exec/{}/remove", {"Force": True}),
]


@pytest.mark.parametrize("state", ["created", "running", "stopped"])
def test_a_session_belongs_to_who_created_it(party: Party, other: Party, state: str) -> None:
    """Whatever another one asks of it, the answer is that of a session that never was, and nothing happens to it."""
    command = ("true",) if state == "stopped" else ("sh", "-c", "read line; exit 7")
    keep: dict[str, Any] = {"AttachStdin": True, "CaptureStdout": True, "OnDisconnect": "keep"}
    session = party.api.create(party.own[0].id, *command, **OUTPUT, **keep)
    try:
        if state != "created":
            assert party.api.start_detached(session).status == 200
        if state == "stopped":
            party.api.ended(session)
        before = party.api.inspect(session)
        for method, target, body in SESSION_REQUESTS:
            answer = other.api.call(method, target.format(session), body)
            control = other.api.call(method, target.format(NO_SUCH_ID), body)
            same_but(answer, session, control, NO_SUCH_ID)
            assert answer.status == 404, answer
        assert party.api.inspect(session) == before
        if state == "running":
            assert party.api.call("POST", f"/exec/{session}/stdin?eof=1", b"\n").status == 204
            assert party.api.ended(session) == 7
    finally:
        party.api.call("DELETE", f"/exec/{session}?force=1")


def test_nobody_sees_anothers_session_anywhere(scene: Scene, party: Party, other: Party) -> None:
    session = party.api.create(party.own[1].id, "sleep", "1000", OnDisconnect="keep")
    assert party.api.start_detached(session).status == 200
    try:
        assert session in ids(party.api.call("GET", "/exec/json"), "ID")
        assert session in party.api.call("GET", f"/containers/{party.own[1].id}/json").json["ExecIDs"]
        assert session in ids(scene.root.call("GET", "/exec/json"), "ID")
        for stranger in (other.api, scene.nobody):
            assert session not in ids(stranger.call("GET", "/exec/json"), "ID")
    finally:
        assert party.api.call("POST", f"/exec/{session}/kill").status == 204


def test_a_session_in_ones_own_container_that_is_anothers(scene: Scene, teams: dict[str, list[TestContainer]]) -> None:
    """To see the container is not to see what somebody else does in it."""
    container = teams["red"][2].id
    session = scene.root.create(container, "sleep", "1000")
    assert scene.root.start_detached(session).status == 200
    red = scene.red.api
    try:
        assert red.call("GET", f"/exec/{session}/json").status == 404
        assert red.call("POST", f"/exec/{session}/kill").status == 404
        assert session not in ids(red.call("GET", f"/containers/{container}/exec/json"), "ID")
        assert not red.call("GET", f"/containers/{container}/json").json["ExecIDs"]
    finally:
        assert scene.root.call("DELETE", f"/exec/{session}?force=1").status == 204


def test_events_of_ones_own_alone(scene: Scene, party: Party, other: Party) -> None:
    since = time.time() - 1
    with party.api.events() as events, other.api.events() as strange:
        mine = party.api.create(party.own[0].id, "echo", "mine")
        assert party.api.start_detached(mine).status == 200
        party.api.ended(mine)
        theirs = other.api.create(other.own[0].id, "echo", "theirs")
        seen = [next(events)["Actor"]["Attributes"]["execID"] for _ in range(3)]
        assert seen == [mine] * 3
        assert next(strange)["Actor"]["Attributes"]["execID"] == theirs
    past = party.api.call("GET", f"/events?since={since}&until={time.time()}")
    assert mine.encode() in past.body
    assert theirs.encode() not in past.body
    assert party.api.call("DELETE", f"/exec/{mine}").status == 204  # forgotten: only its owner's history has it
    for api, sees in ((party.api, True), (other.api, False), (scene.root, False)):
        assert (mine.encode() in api.call("GET", f"/events?since={since}&until={time.time()}").body) is sees


# -- who sees, and may not


def test_an_auditor_looks_and_does_nothing(scene: Scene) -> None:
    """What may be seen and not be done is a 403, which says so; what may not be seen is a 404."""
    red, auditor = scene.red, scene.auditor
    session = red.api.create(red.own[0].id, "echo", "seen", CaptureStdout=True, AttachStdout=True)
    blue = scene.blue.api.create(scene.blue.own[0].id, "true")
    assert red.api.start_detached(session).status == 200
    red.api.ended(session)
    assert auditor.inspect(session)["ExitCode"] == 0
    assert auditor.call("GET", f"/exec/{session}/logs").body[8:] == b"seen\n"
    assert auditor.call("GET", f"/containers/{red.own[0].id}/top").status == 200
    for method, target, body in SESSION_REQUESTS:
        answer = auditor.call(method, target.format(blue), body)
        assert answer.status == 404, (target, answer)
    for target in ("kill", "stop", "attach", "stdin", "resize?h=1&w=1"):
        answer = auditor.call("POST", f"/exec/{session}/{target}", b"")
        assert answer.status == 403, (target, answer)
        assert "you may see exec" in answer.json["message"]
    assert auditor.call("DELETE", f"/exec/{session}").status == 403
    refused = auditor.call("POST", f"/containers/{red.own[0].id}/exec", {"Cmd": ["true"]})
    assert refused.status == 403
    assert "no rule allows token:auditor" in refused.message
    assert auditor.call("POST", f"/containers/{scene.blue.own[0].id}/exec", {"Cmd": ["true"]}).status == 404


def test_who_may_not_exec_does_not_see_the_environment(scene: Scene) -> None:
    container = scene.red.own[0].id
    assert scene.red.api.call("GET", f"/containers/{container}/json").json["Config"]["Env"]
    assert scene.auditor.call("GET", f"/containers/{container}/json").json["Config"]["Env"] == []
    libpod = scene.auditor.call("GET", f"/v5.0.0/libpod/containers/{container}/json").json
    assert libpod["Config"]["Env"] == []


def test_to_whom_no_rule_speaks_nothing_is_there(scene: Scene, teams: dict[str, list[TestContainer]]) -> None:
    assert scene.nobody.call("GET", "/containers/json?all=1").json == []
    assert scene.nobody.call("GET", "/exec/json").json == []
    assert scene.nobody.call("GET", "/_ping").body == b"OK"
    for container in (*teams["red"], *teams["blue"]):
        assert scene.nobody.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]}).status == 404


# -- what is decided on is what runs


@pytest.mark.parametrize(
    "fields",
    [
        {"User": "2000"},
        {"User": "2000:2000"},
        {"User": "65534"},
        {"Privileged": True},
        {"User": "0:0"},
    ],
)
def test_what_no_rule_allows_is_refused(party: Party, fields: dict[str, Any]) -> None:
    before = ids(party.api.call("GET", "/exec/json"), "ID")
    answer = party.api.call("POST", f"/containers/{party.own[0].id}/exec", {"Cmd": ["true"], **fields})
    assert answer.status == 403, answer
    assert "no rule allows" in answer.message
    assert ids(party.api.call("GET", "/exec/json"), "ID") == before


def test_the_rule_is_on_record(scene: Scene, party: Party) -> None:
    session = party.api.create(party.own[0].id, "true")
    try:
        record = party.api.inspect(session)
        assert record["Rule"] == ("red" if party is scene.red else "blue")
        assert record["Owner"].startswith(("unix:", "token:", "cert:"))
    finally:
        party.api.call("DELETE", f"/exec/{session}")


# -- over TCP


def test_plain_tcp_without_a_token_is_refused(scene: Scene) -> None:
    port = scene.root.target[1] if isinstance(scene.root.target, tuple) else 0
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic cm9vdDpyb290"},
        {"Authorization": scene.root.headers["Authorization"] + "x"},
        {"Authorization": scene.root.headers["Authorization"].replace("execgate", "Execgate")},
    ):
        api = RawApi(("127.0.0.1", port), headers=headers)
        for method, target in (
            ("GET", "/_ping"),
            ("GET", "/containers/json"),
            ("GET", "/nosuch"),
            ("POST", "/exec/x/start"),
        ):
            answer = api.call(method, target, b"{}" if method == "POST" else None)
            assert answer.status == 401, (headers, answer)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.json["message"]


def test_a_void_token_is_refused_at_the_unix_socket_too(scene: Scene) -> None:
    """Who shows a token is what it says: the socket's own peer does not make up for it."""
    api = UserApi(scene.service.socket, RED)
    assert api.call("GET", "/_ping").status == 200
    assert api.call("GET", "/_ping", headers={"Authorization": "Bearer x"}).status == 401
    as_blue = scene.blue.api.headers or None
    if as_blue:
        assert ids(api.call("GET", "/containers/json", headers=as_blue)) == {one.id for one in scene.blue.own}


def test_the_docker_cli_with_a_token(scene: Scene, tmp_path: Path) -> None:
    """Its configuration can have headers, and then it works as ever, stdin and half-close too."""
    host, port = scene.root.target if isinstance(scene.root.target, tuple) else ("", 0)
    (tmp_path / "config.json").write_text(json.dumps({"HttpHeaders": scene.root.headers}))
    docker = DockerCli(f"tcp://{host}:{port}", tmp_path, find_program("docker"))
    done = docker("exec", "-i", scene.red.own[0].id, "sh", "-c", "cat; exit 3", input=b"through")
    assert (done.stdout, done.returncode) == (b"through", 3)
    without = DockerCli(f"tcp://{host}:{port}", tmp_path / "without", find_program("docker"))
    assert b"bearer token is needed" in without("ps").stderr


# -- rules that change


def test_a_reload_brings_new_rules(new_service: Callable[..., Service], host_dir: Path, runc: RuntimeHost) -> None:
    """A session that was created under the old ones is decided on by the new ones when it starts."""
    directory = host_dir / "access-reload"
    container = runc.run(annotations={"team": "red"})
    try:
        write_policy(directory, rule("red", ["uid:0"], labels=["team=red"]))
        service = new_service(directory)
        api = RawApi(service.socket)
        session, other = api.create(container.id, "true"), api.create(container.id, "sleep", "1000")
        assert api.start_detached(other).status == 200
        write_policy(directory, rule("less", ["uid:0"], labels=["team=red"], argv=[["echo", "**"]]))
        assert api.call("GET", "/exec/json").status == 200
        service.reload()
        assert api.start_detached(session).status == 403
        assert api.create(container.id, "echo")
        assert api.call("POST", f"/exec/{other}/kill").status == 204

        # One that cannot be read changes nothing, and everybody is told.
        write_policy(directory, "[[rule]]\nid = 1\n")
        reloaded = subprocess.run(
            [sys.executable, "-m", "execgate", "reload", f"--state-dir={service.state_dir}"],
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert reloaded.returncode == 1, reloaded
        assert "policy.toml" in service.log()
        assert api.create(container.id, "echo", "still")
        assert api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]}).status == 403

        # Nor does it when the worker dies: the rules that were in force stay so, and it says that.
        service.crash()
        assert api.create(container.id, "echo", "still")
        assert api.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]}).status == 403
        assert "the policy that was in force stays so" in service.log()
    finally:
        container.delete()


def test_a_run_whose_turn_comes_behind_a_reload_is_decided_on_by_the_new_rules(
    new_service: Callable[..., Service], host_dir: Path, runc: RuntimeHost, runc_container: TestContainer
) -> None:
    mark = host_dir / "turn-mark"
    mark.touch()
    slow = f'while [ -e {mark} ]; do sleep 0.05; done\nexec "$REAL" "$@"'
    faulty = faulty_runtime(runc, host_dir / "turn-runc", "runc", slow)
    directory = host_dir / "turn"
    write_policy(directory, rule("free", ["uid:0"]))
    service = new_service(directory, flags=[f"--runtime=runc={faulty.program}"], env={"EXECGATE_PARALLEL_STARTS": "1"})
    api = RawApi(service.socket)
    path = f"/containers/{runc_container.id}/exec/run"
    first = api.create(runc_container.id, "true")
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(api.start_detached, first)
        try:
            _await(lambda: [one["ID"] for one in api.call("GET", "/exec/json").json if one["Running"]] == [first])
            answer = pool.submit(api.call, "POST", path, {"Cmd": ["touch", "/tmp/turn-has-come"]})
            _await(lambda: len(api.call("GET", "/exec/json").json) == 2)
            write_policy(directory, rule("less", ["uid:0"], argv=[["echo"]]))
            service.reload()
        finally:
            mark.unlink()
        assert answer.result().status == 403, answer.result()
        assert starting.result().status == 200
    assert not (runc_container.rootfs / "tmp/turn-has-come").exists()
    assert [one["ID"] for one in api.call("GET", "/exec/json").json] == [first]


def _await(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("bound", [{"max_time": "1h"}, {"on_disconnect": ["kill"]}, {"record": "all"}])
def test_what_was_created_before_new_bounds_does_not_start_without_them(
    new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer, bound: dict[str, Any]
) -> None:
    directory = host_dir / f"bound-{next(iter(bound))[:4]}"
    write_policy(directory, rule("free", ["uid:0"]))
    service = new_service(directory)
    api = RawApi(service.socket)
    session = api.create(runc_container.id, "sleep", "1000")
    write_policy(directory, rule("free", ["uid:0"], **bound))
    service.reload()
    assert api.start_detached(session).status == 403
    assert api.call("DELETE", f"/exec/{session}").status == 204
    anew = api.create(runc_container.id, "true")
    assert api.start_detached(anew).status == 200
    api.ended(anew)


def test_who_may_start_for_others_needs_the_others_rule_yet(
    new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer
) -> None:
    """What somebody has created whose rule is gone is started by nobody."""
    directory = host_dir / "access-others"
    starter = rule("starter", ["uid:0"], verbs=["inspect"], others=["exec", "inspect"])
    write_policy(directory, starter, rule("creator", ["token:t"]))
    creator = bearer(directory, "t")
    service = new_service(directory)
    api, theirs = RawApi(service.socket), RawApi(service.socket, headers=creator)
    first, second = (theirs.create(runc_container.id, "true") for _ in range(2))
    assert api.start_detached(first).status == 200
    write_policy(directory, starter)
    service.reload()
    refused = api.start_detached(second)
    assert refused.status == 403, refused
    assert "does not hold any more" in refused.message
    assert api.inspect(second)["ExitCode"] is None


def test_without_a_policy_only_the_owner(new_service: Callable[..., Service], runc_container: TestContainer) -> None:
    service = new_service(flags=["--socket-mode=0666"], env={"EXECGATE_ALLOW_PRIVILEGED": "false"})
    service.directory.parent.chmod(0o711)
    service.directory.chmod(0o711)
    owner, stranger = RawApi(service.socket), UserApi(service.socket, RED)
    assert owner.pipe(runc_container.id, "echo", "hi").stdout == b"hi\n"
    assert stranger.call("GET", "/containers/json").json == []
    assert stranger.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]}).status == 404
    refused = owner.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"], "Privileged": True})
    assert refused.status == 403
    assert "privileged" in service.log() or "no rule allows" in refused.message


def test_a_host_equivalent_container_needs_an_explicit_yes(
    new_service: Callable[..., Service], runc: RuntimeHost
) -> None:
    """Whoever is root in it is root here: without a word of the operator nobody gets in, the owner included."""
    mounts = [{"destination": "/host", "type": "bind", "source": "/", "options": ["rbind", "ro"]}]
    container = runc.run(mounts=mounts)
    try:
        careful = RawApi(new_service(env={"EXECGATE_ALLOW_HOST_EQUIVALENT": "false"}).socket)
        refused = careful.call("POST", f"/containers/{container.id}/exec", {"Cmd": ["true"]})
        assert refused.status == 403, refused
        told = RawApi(new_service(env={"EXECGATE_ALLOW_HOST_EQUIVALENT": "true"}).socket)
        assert told.pipe(container.id, "ls", "/host/etc/passwd").exit_code == 0
    finally:
        container.delete()


def test_max_sessions_of_a_rule(
    new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer
) -> None:
    directory = host_dir / "access-most"
    write_policy(
        directory,
        rule("few", ["uid:0"], max_sessions=2, max_time="1h", on_disconnect=["kill"]),
        rule("some", ["token:t"], max_sessions=1),
    )
    header = bearer(directory, "t")
    api = RawApi(new_service(directory).socket)
    first, second = (api.create(runc_container.id, "true") for _ in range(2))
    refused = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]})
    assert refused.status == 429, refused
    assert "retry-after" in refused.headers
    assert api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]}, headers=header).status == 201
    assert api.start_detached(first).status == 200
    api.ended(first)
    third = api.create(runc_container.id, "sleep", "1000")  # the first one is over
    assert api.call("DELETE", f"/exec/{second}").status == 204
    record = api.inspect(third)
    assert (record["Timeout"], record["OnDisconnect"]) == (3600, "kill")
    asked = {"Cmd": ["true"], "Timeout": 3601}
    assert api.call("POST", f"/containers/{runc_container.id}/exec", asked).status == 403
    asked = {"Cmd": ["true"], "OnDisconnect": "keep"}
    assert api.call("POST", f"/containers/{runc_container.id}/exec", asked).status == 403


def test_each_request_of_a_connection_is_its_own_senders(
    new_service: Callable[..., Service], host_dir: Path, runc_container: TestContainer
) -> None:
    """What one request has proven says nothing of the next one, and a token that was revoked meanwhile is void."""
    directory = host_dir / "pipelined"
    write_policy(directory, rule("pipelined", ["token:a", "token:b"]), rule("me", ["uid:0"], verbs=["inspect"]))
    headers = [bearer(directory, name) for name in ("a", "b")]
    api = RawApi(new_service(directory).socket)
    made = api.call("POST", f"/containers/{runc_container.id}/exec", {"Cmd": ["true"]}, headers=headers[0])
    path = f"/exec/{made.json['Id']}/json"
    with api.connect() as connection:
        asked = [headers[0], headers[1], {}, {"Authorization": "Bearer execgate_x"}, headers[0]]
        connection.send(b"".join(request_bytes("GET", path, headers=one) for one in asked))
        assert [connection.read_answer().status for _ in asked] == [200, 404, 404, 401, 200]
        revoke_token(directory / TOKENS, "a")
        connection.send(request_bytes("GET", path, headers=headers[0]))
        assert connection.read_answer().status == 401


def test_a_start_that_is_refused_holds_no_bytes_as_http(scene: Scene) -> None:
    """What stands behind a start that may not be is thrown away, as behind any start that fails."""
    session = scene.red.api.create(scene.red.own[0].id, "cat", AttachStdin=True, **OUTPUT)
    smuggled = b"DELETE /exec/%s HTTP/1.1\r\nHost: x\r\n\r\n" % session.encode()
    try:
        with scene.blue.api.connect() as connection:
            connection.send(start_bytes(session, headers=scene.blue.api.headers) + smuggled)
            assert connection.read_answer().status == 404
            assert connection.read_until_closed() == b""
        assert scene.red.api.inspect(session)["ID"] == session
    finally:
        scene.red.api.call("DELETE", f"/exec/{session}")
