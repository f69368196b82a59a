"""The verbs beyond Docker's, first those about a session's life: list, kill, stop, wait, remove, create fields, run."""

import base64
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from contract.api import NO_SUCH_ID, Api
from contract.document import Document
from contract.verbs import (
    KEPT,
    LIBPOD,
    attached,
    begin,
    commands,
    force_remove,
    frames,
    listing,
    logs,
    message,
    opened,
    output,
    post,
    script,
    sent,
    wait,
)
from support.raw import request_bytes
from support.runtimes import TestContainer
from support.service import Service

pytestmark = pytest.mark.usefixtures("no_leaks")

NEVER = "0001-01-01T00:00:00Z"

# Ready, it says; then TERM or HUP make it end with codes of its own. `wait` is what a trap interrupts at once.
TRAPS = 'trap "exit 7" TERM; trap "exit 5" HUP; sleep {0} & echo $! ready; wait'


@pytest.fixture(params=["", LIBPOD], ids=["docker", "libpod"])
def tree(request: pytest.FixtureRequest) -> str:
    """The prefix of each tree in turn."""
    return str(request.param)


def await_output(api: Api, session_id: str, text: bytes) -> None:
    """Return once a captured session has written `text` in one piece."""
    with opened(api, "GET", f"/exec/{session_id}/logs?follow=1", upgrade=False) as stream:
        stream.connection.read_until(text)


# -- list ------------------------------------------------------------------------------------------------------------


def known_ids(api: Api) -> set[str]:
    """Return the ids of all sessions."""
    return {one["ID"] for one in api.call("GET", "/exec/json").json}


def test_list(tree: str, api: Api, container: TestContainer) -> None:
    labels = {"case": f"list {tree} {container.id}", "kind": "a=b"}
    created = api.create(container.id, "true", Labels=labels)
    running = begin(api, container, "sleep", "1000", Labels=labels)
    ended = begin(api, container, "true", Labels=labels)
    wait(api, ended)

    def found(**filters: list[str]) -> list[str]:
        mine = [f"case={labels['case']}", *filters.pop("label", [])]
        lists = [listing(api, f"{tree}/exec/json", container=[container.id], label=mine, **filters)]
        lists.append(listing(api, f"{tree}/containers/{container.id}/exec/json", label=mine, **filters))
        assert lists[0] == lists[1]
        for one in lists[0]:
            inspected = api.call("GET", f"{tree}/exec/{one['ID']}/json").json
            assert one == inspected
        return [one["ID"] for one in lists[0]]

    assert found() == [created, running, ended]
    assert found(state=["created"]) == [created]
    assert found(state=["running"]) == [running]
    assert found(state=["stopped"]) == [ended]
    assert found(state=["created", "stopped"]) == [created, ended]
    assert found(label=["kind"]) == [created, running, ended]
    assert found(label=["kind=a=b"]) == [created, running, ended]
    assert found(label=["kind=a"]) == found(label=["kin"]) == []
    everything = [one["ID"] for one in api.call("GET", f"{tree}/exec/json").json]
    assert [one for one in everything if one in (created, running, ended)] == [created, running, ended]
    force_remove(api, running)


def test_a_list_of_several_containers(api: Api, hosts: list[Any], container: TestContainer) -> None:
    other = hosts[0].run()
    label = f"several-{other.id}"
    here, there = (api.create(one.id, "true", Labels={label: ""}) for one in (container, other))
    both = listing(api, "/exec/json", container=[other.id, container.id, other.id], label=[label])
    assert [one["ID"] for one in both] == [here, there]
    assert [one["ID"] for one in listing(api, "/exec/json", container=[other.id])] == [there]
    other.delete()
    # It is gone; its sessions are known by its full id.
    assert [one["ID"] for one in listing(api, f"/containers/{other.id}/exec/json")] == [there]
    assert [one["ID"] for one in listing(api, "/exec/json", container=[other.id])] == [there]
    assert api.call("GET", f"/containers/{other.id[:-1]}/exec/json").status == 404


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ("{", "invalid filter: not a JSON object"),
        ("[]", "invalid filter: not a JSON object"),
        ('{"state": ["paused"]}', "invalid filter 'state': 'paused' is none of created, running, stopped"),
        ('{"state": "running"}', "invalid filter 'state': its values must be strings"),
        ('{"label": [1]}', "invalid filter 'label': its values must be strings"),
        ('{"name": ["x"]}', "invalid filter 'name'"),
    ],
)
def test_bad_filters(filters: str, said: str, tree: str, api: Api, runc_container: TestContainer) -> None:
    for path in ("/exec/json", f"/containers/{runc_container.id}/exec/json"):
        response = api.call("GET", f"{tree}{path}?filters={filters.replace(' ', '%20')}")
        assert (response.status, message(response)) == (400, said)


def test_a_container_s_list_has_no_filter_for_containers(api: Api, runc_container: TestContainer) -> None:
    response = api.call("GET", f"/containers/{runc_container.id}/exec/json?filters=%7B%22container%22:[]%7D")
    assert (response.status, message(response)) == (400, "invalid filter 'container'")


# -- kill ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["", "?signal=", "?signal=KILL", "?signal=SIGKILL", "?signal=sigkill", "?signal=9"])
def test_a_kill_is_answered_after_the_end(signal: str, tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1009")
    assert post(api, tree, session_id, f"kill{signal}").status == 204
    found = api.inspect(session_id)
    assert (found["Running"], found["ExitCode"], found["Pid"]) == (False, 137, 0)
    assert "sleep 1009" not in commands(container)


@pytest.mark.parametrize(
    ("signal", "number"),
    [
        ("TERM", 15), ("SIGTERM", 15), ("term", 15), ("SigTerm", 15), ("15", 15), ("HUP", 1), ("1", 1), ("USR2", 12),
        ("RTMIN%2B3", 37), ("SIGRTMAX-1", 63), ("rtmin", 34), ("40", 40),
    ],
)  # fmt: skip
def test_every_form_of_a_signal(signal: str, number: int, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "sleep", "1000")
    assert post(api, "", session_id, f"kill?signal={signal}").status == 204
    assert wait(api, session_id)["StatusCode"] == 128 + number


def test_a_signal_reaches_the_process_itself(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, TRAPS.format(1010), **KEPT)
    await_output(api, session_id, b"ready\n")
    assert post(api, tree, session_id, "kill?signal=HUP").status == 204
    assert wait(api, session_id)["StatusCode"] == 5
    assert "sleep 1010" in commands(container), "only KILL reaches the children"
    api.run(container.id, "kill", output(logs(api, session_id).body).split()[0].decode())


@pytest.mark.parametrize(
    "signal",
    ["0", "65", "32", "-9", "9.0", "999", "NOPE", "SIG", "SIGSIGKILL", "RTMIN%2B31", "RTMAX-40", "KILL%20", "%C3%9F"],
)
def test_a_bad_signal(signal: str, tree: str, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "sleep", "1000")
    response = post(api, tree, session_id, f"kill?signal={signal}")
    assert response.status == 400
    assert message(response).startswith("Invalid signal: ")
    assert api.inspect(session_id)["Running"]
    force_remove(api, session_id)


@pytest.mark.parametrize("verb", ["kill", "stop", "stdin", "attach"])
def test_what_does_not_run(verb: str, api: Api, container: TestContainer) -> None:
    created, ended = api.create(container.id, "true"), begin(api, container, "true")
    wait(api, ended)
    for session_id in (created, ended):
        said = f"exec command {session_id} is not running"
        assert (post(api, "", session_id, verb).message, 409) == (said, post(api, "", session_id, verb).status)
        response = post(api, LIBPOD, session_id, verb)
        assert response.status == 409
        assert response.json["message"] == f"exec session {session_id} is not running: exec session state improper"
        assert response.json["cause"] == "exec session state improper"


@pytest.mark.parametrize(
    ("method", "verb"),
    [("POST", "/kill"), ("POST", "/stop"), ("POST", "/wait"), ("POST", "/attach"), ("POST", "/stdin"),
     ("GET", "/logs"), ("DELETE", "")],
)  # fmt: skip
@pytest.mark.parametrize("session_id", [NO_SUCH_ID, "short", "..%2F..", NO_SUCH_ID[:-1] + "G"])
def test_an_unknown_session(method: str, verb: str, session_id: str, tree: str, api: Api) -> None:
    response = api.call(method, f"{tree}/exec/{session_id}{verb}")
    assert response.status == 404
    assert ("no exec session with ID" if tree else "No such exec instance: ") in message(response)


# Those that leave their parent, their session, or both; the last two are found by nothing but a cgroup.
FAMILY = """
sleep 1021 &
setsid sleep 1022 &
(trap '' HUP; exec sleep 1023) >/dev/null 2>&1 &
(sleep 1024 &)
setsid sh -c 'setsid sleep 1025 &' &
(setsid sh -c '(setsid sleep 1026 &)' &)
family() { for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done 2>/dev/null; }
until [ $(family | grep -c '^sleep 102') -ge 6 ]; do :; done
echo ready; wait; sleep 1020
"""


@pytest.mark.parametrize("verb", ["kill", "stop?t=0", "remove"])
def test_the_whole_tree_is_killed_and_nobody_else(verb: str, api: Api, container: TestContainer) -> None:
    other = begin(api, container, "sleep", "1030")
    session_id = script(api, container, FAMILY, **KEPT)
    await_output(api, session_id, b"ready\n")
    if verb == "remove":
        force_remove(api, session_id)
    else:
        assert post(api, "", session_id, verb).status == 204
    left = commands(container)
    assert not [one for one in left if one.startswith("sleep 102")]
    assert "sleep 1030" in left
    assert api.inspect(other)["Running"]
    force_remove(api, other)


def test_a_session_can_be_killed_as_soon_as_its_head_is_here(api: Api, container: TestContainer) -> None:
    """The head comes before the process: what follows it waits for the outcome of the start."""
    for _ in range(5):
        with api.attach(api.create_attached(container.id, "sleep", "1000")) as stream:
            session_id = listing(api, "/exec/json", container=[container.id], state=["running"])[-1]["ID"]
            assert post(api, "", session_id, "kill").status == 204
            assert stream.read_frames() == (b"", b"")
        assert api.inspect(session_id)["ExitCode"] == 137


# -- stop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "code"), [("", 143), ("?t=", 143), ("?t=30", 143), ("?t=12.5", 143), ("?t=0", 137), ("?t=0.0", 137)]
)
def test_stop(query: str, code: int, tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1031")
    assert post(api, tree, session_id, f"stop{query}").status == 204
    found = api.inspect(session_id)
    assert (found["Running"], found["ExitCode"], found["TimedOut"]) == (False, code, False)
    assert "sleep 1031" not in commands(container)


def test_a_stop_keeps_the_exit_code_of_who_obeys_and_kills_what_it_leaves(api: Api, container: TestContainer) -> None:
    session_id = script(api, container, TRAPS.format(1032), **KEPT)
    await_output(api, session_id, b"ready\n")
    assert post(api, "", session_id, "stop").status == 204
    assert api.inspect(session_id)["ExitCode"] == 7
    assert "sleep 1032" not in commands(container)


def test_a_stop_kills_who_does_not_obey(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, 'trap "" TERM; echo ready; sleep 1033', **KEPT)
    await_output(api, session_id, b"ready\n")
    assert post(api, tree, session_id, "stop?t=0.2").status == 204
    assert api.inspect(session_id)["ExitCode"] == 137


@pytest.mark.parametrize("t", ["x", "-1", "1e3", "nan", "inf", "1.2345", "9999999", "1%20", "%D9%A1"])
def test_a_bad_time_to_stop(t: str, tree: str, api: Api, runc_container: TestContainer) -> None:
    session_id = begin(api, runc_container, "sleep", "1000")
    response = post(api, tree, session_id, f"stop?t={t}")
    assert response.status == 400
    assert message(response).endswith("not a number of seconds")
    assert api.inspect(session_id)["Running"]
    force_remove(api, session_id)


# -- wait ------------------------------------------------------------------------------------------------------------


def test_wait_after_the_end(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "exit 3")
    for _ in range(2):
        response = post(api, tree, session_id, "wait")
        assert (response.status, response.json) == (200, {"StatusCode": 3, "TimedOut": False, "Error": ""})


def test_wait_for_a_start_that_fails(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "/none-such")
    with sent(api, "POST", f"{tree}/exec/{session_id}/wait") as waiting:
        assert api.start_detached(session_id).status == 400
        told = waiting.read_answer().json
    assert told["StatusCode"] == 127
    assert told["Error"].startswith("OCI runtime exec failed: ")
    assert told["Error"] == api.inspect(session_id)["Error"]


def test_several_wait_from_before_the_start_to_the_end(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "sleep", "1000")
    with contextlib.ExitStack() as stack:
        target = f"{tree}/exec/{session_id}/wait"
        waiting = [stack.enter_context(sent(api, "POST", target)) for _ in range(2)]
        api.start_detached(session_id)
        waiting += [stack.enter_context(sent(api, "POST", target)) for _ in range(2)]
        waiting[0].half_close()  # which is no farewell
        assert post(api, tree, session_id, "kill?signal=TERM").status == 204
        for connection in waiting:
            response = api.checked("POST", target, connection.read_answer())
            assert response.json == {"StatusCode": 143, "TimedOut": False, "Error": ""}


def test_a_client_that_does_not_wait_any_longer(api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1000")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(sent(api, "POST", f"/exec/{session_id}/wait"))
    assert api.inspect(session_id)["Running"]
    with sent(api, "POST", f"/exec/{session_id}/wait") as waiting:
        assert post(api, "", session_id, "kill").status == 204
        assert waiting.read_answer().json["StatusCode"] == 137


def test_who_waits_for_a_start_is_told_of_the_removal(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create(container.id, "true")
    with sent(api, "POST", f"{tree}/exec/{session_id}/wait") as waiting:
        waiting.socket.settimeout(30)
        # The wait is there once a second request on the same service was answered after it.
        assert api.inspect(session_id)["ExitCode"] is None
        assert api.call("DELETE", f"{tree}/exec/{session_id}").status == 204
        assert waiting.read_answer().status == 404


# -- remove ----------------------------------------------------------------------------------------------------------


def test_remove(tree: str, api: Api, container: TestContainer) -> None:
    created, ended = api.create(container.id, "true"), begin(api, container, "echo", "x", **KEPT)
    wait(api, ended)
    for session_id in (created, ended):
        assert api.call("DELETE", f"{tree}/exec/{session_id}").status == 204
        assert api.call("GET", f"{tree}/exec/{session_id}/json").status == 404
        assert logs(api, session_id, tree=tree).status == 404
        assert api.call("DELETE", f"{tree}/exec/{session_id}").status == 404


@pytest.mark.parametrize("query", ["", "?force=0", "?force=false", "?force="])
def test_what_runs_is_not_removed(query: str, tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1000")
    response = api.call("DELETE", f"{tree}/exec/{session_id}{query}")
    assert response.status == 409
    why = "as it is running: exec session state improper" if tree else "it is running; stop it, or use force"
    assert message(response) == f"cannot remove exec session {session_id}{'' if tree else ':'} {why}"
    assert api.inspect(session_id)["Running"]
    force_remove(api, session_id)


def test_remove_with_force(tree: str, api: Api, container: TestContainer) -> None:
    session_id = begin(api, container, "sleep", "1034")
    with sent(api, "POST", f"/exec/{session_id}/wait") as waiting:
        assert api.call("DELETE", f"{tree}/exec/{session_id}?force=1").status == 204
        assert waiting.read_answer().json["StatusCode"] == 137
    assert "sleep 1034" not in commands(container)
    assert api.call("GET", f"/exec/{session_id}/json").status == 404


# -- the fields of a creation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Timeout", "5"), ("Timeout", -1), ("Timeout", -0.5), ("Timeout", True), ("Timeout", []),
        ("Timeout", 365 * 86400 + 1), ("IdleTimeout", "5"), ("IdleTimeout", -1),
        ("Labels", []), ("Labels", "a"), ("Labels", {"a": 1}), ("Labels", {"a": None}),
        ("CaptureStdout", "yes"), ("CaptureStdout", 1), ("CaptureStderr", "false"), ("CaptureStderr", {}),
        ("OnDisconnect", "stay"), ("OnDisconnect", "KILL"), ("OnDisconnect", 1), ("OnDisconnect", True),
        ("PreserveFDs", "1"), ("PreserveFD", 3),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type(field: str, value: Any, tree: str, api: Api, runc_container: TestContainer) -> None:
    for path in ("exec", "exec/run"):
        body = {"Cmd": ["true"], field: value}
        response = api.call("POST", f"{tree}/containers/{runc_container.id}/{path}", body)
        assert response.status == 400
        assert message(response).startswith("invalid JSON: ")
        assert field.lower() in message(response).lower()


@pytest.mark.parametrize("number", [b"1e999", b"NaN", b"Infinity", b"-Infinity"])
def test_a_timeout_that_is_no_number(number: bytes, api: Api, runc_container: TestContainer) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"Cmd": ["true"], "Timeout": ' + number + b"}"
    assert api.call("POST", f"/containers/{runc_container.id}/exec", body, headers=headers).status == 400


@pytest.mark.parametrize("fields", [{"PreserveFDs": 1}, {"PreserveFD": [3]}, {"preservefds": 2, "PreserveFD": [5, 6]}])
def test_descriptors_do_not_come_over_http(
    fields: dict[str, Any], tree: str, api: Api, runc_container: TestContainer
) -> None:
    for path in ("exec", "exec/run"):
        response = api.call("POST", f"{tree}/containers/{runc_container.id}/{path}", {"Cmd": ["true"], **fields})
        assert response.status == 400
        assert message(response).startswith("descriptors cannot be preserved over HTTP")


def test_what_inspect_says_of_the_fields(tree: str, api: Api, container: TestContainer) -> None:
    plain = api.inspect(api.create(container.id, "true", PreserveFDs=0, PreserveFD=[], Timeout=None, Labels=None))
    names = ("Timeout", "IdleTimeout", "Labels", "CaptureStdout", "CaptureStderr", "OnDisconnect")
    assert [plain[name] for name in names] == [0, 0, {}, False, False, ""]
    fields = {"Timeout": 900.5, "IdleTimeout": 60.5, "Labels": {"a": "1", "": ""}, **KEPT, "OnDisconnect": "hup"}
    asked = api.create(container.id, "sh", "-c", "read x; echo $x; echo $x$x >&2", version=tree, **fields)
    before = api.inspect(asked)
    assert [before[name] for name in names] == [900.5, 60.5, {"a": "1", "": ""}, True, True, "hup"]
    assert before["StartedAt"] == before["FinishedAt"] == NEVER
    assert before["CreatedAt"] > NEVER
    assert (before["Pid"], before["ContainerPid"]) == (0, 0)


def test_what_inspect_says_of_the_course(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo $$; read x; echo $x; echo $x$x >&2")
    with api.attach(session_id) as stream:
        pid = int(stream.connection.read_until(b"\n")[8:])
        during = api.inspect(session_id)
        assert during["ContainerPid"] == pid
        assert during["Pid"] > 0
        assert during["CreatedAt"] <= during["StartedAt"]
        assert during["FinishedAt"] == NEVER
        assert during["StdoutBytes"] == len(f"{pid}\n")
        stream.send(b"abc\n")
        assert stream.read_frames() == (b"abc\n", b"abcabc\n")
    after = api.inspect(session_id)
    assert after["StartedAt"] == during["StartedAt"] <= after["FinishedAt"]
    assert (after["Pid"], after["ContainerPid"]) == (0, 0)
    bytes_moved = after["StdinBytes"], after["StdoutBytes"], after["StderrBytes"]
    assert bytes_moved == (4, len(f"{pid}\nabc\n"), 7)


def test_a_timeout_keeps_what_was_written(tree: str, api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "echo partial; echo so far >&2; sleep 1035", Timeout=1.5, **KEPT)
    response = post(api, tree, session_id, "wait")
    assert response.json == {"StatusCode": 143, "TimedOut": True, "Error": ""}
    assert api.inspect(session_id)["TimedOut"]
    assert logs(api, session_id, tree=tree).body
    assert sorted(frames(logs(api, session_id).body)) == [(1, b"partial\n"), (2, b"so far\n")]
    assert "sleep 1035" not in commands(container)


def test_a_timeout_keeps_the_exit_code_of_who_obeys(api: Api, container: TestContainer) -> None:
    session_id = script(api, container, TRAPS.format(1036), Timeout=1.5)
    assert wait(api, session_id) == {"StatusCode": 7, "TimedOut": True, "Error": ""}
    assert "sleep 1036" not in commands(container)


def test_a_timeout_kills_who_does_not_obey(
    new_service: Callable[..., Service], document: Document, container: TestContainer
) -> None:
    api = Api(new_service(env={"EXECGATE_TIMEOUT_GRACE_SECONDS": "0.2"}).socket, document)
    session_id = script(api, container, 'trap "" TERM; (setsid sleep 1037 &); sleep 1038', Timeout=1.5)
    assert wait(api, session_id) == {"StatusCode": 137, "TimedOut": True, "Error": ""}
    assert not [one for one in commands(container) if one in ("sleep 1037", "sleep 1038")]


def test_a_timeout_that_is_not_needed(api: Api, container: TestContainer) -> None:
    session_id = script(api, container, "exit 4", Timeout=600)
    assert wait(api, session_id) == {"StatusCode": 4, "TimedOut": False, "Error": ""}


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize(
    ("stdout", "stderr", "kept"),
    [(True, True, [(1, b"out\n"), (2, b"err\n")]), (True, False, [(1, b"out\n")]), (False, True, [(2, b"err\n")])],
)
def test_what_is_captured(
    stdout: bool, stderr: bool, kept: list[tuple[int, bytes]], attach: bool, api: Api, container: TestContainer
) -> None:
    fields: dict[str, Any] = {"CaptureStdout": stdout, "CaptureStderr": stderr}
    fields |= {"AttachStdout": attach, "AttachStderr": attach}
    session_id = api.create(container.id, "sh", "-c", "echo out; echo err >&2", **fields)
    if attach:
        with api.attach(session_id) as stream:
            assert stream.read_frames() == (b"out\n", b"err\n")
    else:
        api.start_detached(session_id)
        wait(api, session_id)
    assert sorted(frames(logs(api, session_id).body)) == kept


# -- OnDisconnect ----------------------------------------------------------------------------------------------------


def _start_and_leave(api: Api, session_id: str, *, reading: bool = True) -> None:
    """Start attached, wait until the process says that it is ready, and hang up."""
    with api.attach(session_id) as stream:
        if reading:
            stream.connection.read_until(b"ready\n")


@pytest.mark.parametrize("reading", [True, False], ids=["all read", "output unread"])
@pytest.mark.parametrize(("policy", "code"), [("hup", 5), ("kill", 137)])
def test_a_client_that_goes_takes_the_process_along(
    policy: str, code: int, reading: bool, api: Api, container: TestContainer
) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", TRAPS.format(1040), OnDisconnect=policy, **KEPT)
    with api.attach(session_id) as stream:
        if reading:
            stream.connection.read_until(b"ready\n")
        else:
            await_output(api, session_id, b"ready\n")
    assert wait(api, session_id)["StatusCode"] == code
    if policy == "kill":
        assert "sleep 1040" not in commands(container)
    else:
        api.run(container.id, "kill", output(logs(api, session_id).body).split()[0].decode())


def test_without_a_policy_only_stdin_ends(api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo ready; cat; exit 6", **KEPT)
    _start_and_leave(api, session_id)
    assert wait(api, session_id)["StatusCode"] == 6


def test_keep_leaves_stdin_open_for_who_comes_next(tree: str, api: Api, container: TestContainer) -> None:
    session_id = api.create_attached(container.id, "sh", "-c", "echo ready; cat", OnDisconnect="keep", **KEPT)
    _start_and_leave(api, session_id)
    assert post(api, tree, session_id, "stdin", b"from another\n").status == 204
    with attached(api, session_id, tree=tree, after=0) as stream:
        stream.connection.read_until(b"from another\n")
        stream.send(b"and a third\n")
        stream.connection.read_until(b"and a third\n")
    assert api.inspect(session_id)["Running"]
    assert post(api, tree, session_id, "stdin?eof=1", b"the end\n").status == 204
    assert wait(api, session_id)["StatusCode"] == 0
    assert output(logs(api, session_id).body) == b"ready\nfrom another\nand a third\nthe end\n"


def test_keep_without_capture(api: Api, container: TestContainer) -> None:
    session_id = begin(
        api, container, "cat", AttachStdin=True, AttachStdout=True, AttachStderr=True, OnDisconnect="keep"
    )
    with attached(api, session_id) as stream:
        stream.send(b"hello\n")
        stream.connection.read_until(b"hello\n")
        stream.half_close()
        assert stream.read_raw() == b""
    assert wait(api, session_id)["StatusCode"] == 0


def test_only_the_last_one_to_go_counts(api: Api, container: TestContainer) -> None:
    fields = {"OnDisconnect": "kill", **KEPT}
    session_id = api.create_attached(container.id, "sh", "-c", "echo ready; cat; sleep 1041", **fields)
    with api.attach(session_id) as first:
        first.connection.read_until(b"ready\n")
        with attached(api, session_id, after=0, stdin=0) as second:
            second.connection.read_until(b"ready\n")
        assert post(api, "", session_id, "stdin", b"still here\n").status == 204
        first.connection.read_until(b"still here\n")
        assert api.inspect(session_id)["Running"]
    assert wait(api, session_id)["StatusCode"] == 137


def test_to_detach_is_not_to_go(api: Api, container: TestContainer) -> None:
    fields = {"Tty": True, "OnDisconnect": "kill", "CaptureStdout": True}
    session_id = api.create_attached(container.id, "sh", "-c", "echo ready; read x; exit 8", **fields)
    with api.attach(session_id, Tty=True) as stream:
        stream.connection.read_until(b"ready")
        stream.send(b"\x10\x11")
        stream.read_raw()
    assert api.inspect(session_id)["Running"]
    assert post(api, "", session_id, "stdin", b"\n").status == 204
    assert wait(api, session_id)["StatusCode"] == 8


# -- run -------------------------------------------------------------------------------------------------------------


def run(api: Api, tree: str, container: TestContainer, *args: str, **fields: Any) -> Any:
    response = api.call("POST", f"{tree}/containers/{container.id}/exec/run", {"Cmd": args, **fields})
    assert response.status == 200, response
    return response.json


def test_run(tree: str, api: Api, container: TestContainer) -> None:
    told = run(api, tree, container, "sh", "-c", "cat; echo err >&2; exit 3", Stdin="gr\u00fc\u00dfe\n")
    found = api.inspect(told.pop("Id"))
    times = {"StartedAt": found["StartedAt"], "FinishedAt": found["FinishedAt"]}
    assert told == {
        "ExitCode": 3,
        "Stdout": "gr\u00fc\u00dfe\n",
        "Stderr": "err\n",
        "Encoding": "utf-8",
        "TimedOut": False,
        "Truncated": False,
        "Error": "",
        **times,
    }
    assert (found["Running"], found["ExitCode"]) == (False, 3)


def test_run_without_input_has_an_empty_stdin(tree: str, api: Api, container: TestContainer) -> None:
    assert run(api, tree, container, "cat", AttachStdin=True)["Stdout"] == ""


def test_run_with_bytes(tree: str, api: Api, container: TestContainer) -> None:
    data = bytes(range(256)) * 16
    told = run(api, tree, container, "cat", Stdin=base64.b64encode(data).decode(), Encoding="base64")
    assert told["Encoding"] == "base64"
    assert base64.b64decode(told["Stdout"], validate=True) == data
    assert told["Stderr"] == ""


def test_run_with_bytes_that_are_no_text(api: Api, container: TestContainer) -> None:
    assert run(api, "", container, "printf", r"a\377b")["Stdout"] == "a\ufffdb"


@pytest.mark.parametrize(
    ("limit", "stdout", "truncated"), [(0, "", True), (3, "abc", True), (6, "abcdef", False), (7, "abcdef", False)]
)
def test_run_with_a_limit(limit: int, stdout: str, truncated: bool, api: Api, container: TestContainer) -> None:
    told = run(api, "", container, "printf", "abcdef", OutputLimit=limit)
    assert (told["Stdout"], told["Truncated"], told["ExitCode"]) == (stdout, truncated, 0)


def test_run_reads_on_beyond_the_limit(api: Api, container: TestContainer) -> None:
    told = run(api, "", container, "sh", "-c", "head -c 3000000 /dev/zero; exit 9")
    assert (len(told["Stdout"]), told["Truncated"], told["ExitCode"]) == (1024 * 1024, True, 9)


def test_run_in_a_terminal(api: Api, container: TestContainer) -> None:
    told = run(api, "", container, "sh", "-c", "echo out; echo err >&2", Tty=True)
    assert (told["Stdout"], told["Stderr"]) == ("out\r\nerr\r\n", "")


@pytest.mark.parametrize(("program", "code"), [("/none-such", 127), ("/etc", 126)])
def test_run_of_what_cannot_be_started(program: str, code: int, tree: str, api: Api, container: TestContainer) -> None:
    told = run(api, tree, container, program)
    assert told["ExitCode"] == code
    assert told["Error"].startswith("OCI runtime exec failed: ")
    assert (told["Stdout"], told["Stderr"], told["TimedOut"]) == ("", "", False)


def test_run_with_a_timeout(tree: str, api: Api, container: TestContainer) -> None:
    told = run(api, tree, container, "sh", "-c", "echo begun; sleep 1042", Timeout=1.5)
    assert (told["ExitCode"], told["TimedOut"], told["Stdout"]) == (143, True, "begun\n")
    assert "sleep 1042" not in commands(container)


@pytest.mark.parametrize(
    "fields",
    [
        {"OutputLimit": -1}, {"OutputLimit": 16 * 2**20 + 1}, {"OutputLimit": "1"}, {"OutputLimit": 1.5},
        {"Encoding": "latin-1"}, {"Encoding": 1}, {"Stdin": 1}, {"Stdin": "\ud800"}, {"Cmd": []}, {"Cmd": "ls"},
        {"Stdin": "####", "Encoding": "base64"}, {"Stdin": "YQ", "Encoding": "base64"},
        {"Stdin": "\u00e9", "Encoding": "base64"}, {"User": "nobody9"},
    ],
)  # fmt: skip
def test_a_bad_run(fields: dict[str, Any], tree: str, api: Api, runc_container: TestContainer) -> None:
    before = known_ids(api)
    body = {"Cmd": ["true"], **fields}
    assert api.call("POST", f"{tree}/containers/{runc_container.id}/exec/run", body).status == 400
    assert known_ids(api) <= before  # old ones may be forgotten meanwhile


def test_a_run_s_client_that_goes_takes_the_tree_along(tree: str, api: Api, container: TestContainer) -> None:
    text = "setsid sleep 1043 & (setsid sh -c '(setsid sleep 1044 &)' &); sleep 1045"
    target, label = f"{tree}/containers/{container.id}/exec/run", f"leaver{tree}-{container.id}"
    with api.events(filters={"event": ["exec_start", "exec_die"], "container": [container.id]}) as events:
        with sent(api, "POST", target, {"Cmd": ["sh", "-c", text], "Labels": {label: ""}}):
            session_id = next(events)["Actor"]["Attributes"]["execID"]
        died = next(events)["Actor"]["Attributes"]
        assert (died["execID"], died["exitCode"]) in ((session_id, "137"), (session_id, "128"))
    assert not [one for one in commands(container) if one in ("sleep 1043", "sleep 1044", "sleep 1045")]


def test_a_run_s_client_that_half_closes_gets_its_answer(api: Api, container: TestContainer) -> None:
    body = b'{"Cmd": ["sh", "-c", "sleep 1; echo done"]}'
    headers = {"Content-Type": "application/json"}
    with api.connect() as connection:
        target = f"/containers/{container.id}/exec/run"
        connection.send(request_bytes("POST", target, headers=headers, body=body))
        connection.half_close()
        assert connection.read_answer().json["Stdout"] == "done\n"
