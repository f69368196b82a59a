"""`GET /events`: what is told of a session's life, to whom, and from when to when."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from contract.api import Api
from support.runtimes import TestContainer

IMAGE = "busybox:1.36"
ANNOTATIONS = {"team": "shop", "empty": "", "org.opencontainers.image.ref.name": IMAGE}
SECRET = "c0ffee-in-the-environment"


@pytest.fixture
def labelled(new_container: Callable[..., TestContainer]) -> TestContainer:
    """A container that has labels and an image's name."""
    return new_container(annotations=ANNOTATIONS)


def now() -> str:
    """This moment, as the docker CLI writes it."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{seconds}.{nanoseconds:09}"


def test_a_session_s_whole_life(api: Api, labelled: TestContainer) -> None:
    with api.events(filters={"container": [labelled.id]}) as events:
        session = api.run(labelled.id, "sh", "-c", "exit 3", Env=[f"TOKEN={SECRET}"])
        life = [next(events) for _ in range(3)]
    assert [event["Action"] for event in life] == ["exec_create: sh -c exit 3", "exec_start: sh -c exit 3", "exec_die"]
    for event in life:
        assert (event["Type"], event["scope"], event["Actor"]["ID"]) == ("container", "local", labelled.id)
        assert (event["status"], event["id"], event["from"]) == (event["Action"], labelled.id, IMAGE)
        assert event["timeNano"] // 10**9 == event["time"]
    expected = {**ANNOTATIONS, "name": labelled.id, "image": IMAGE, "execID": session["ID"]}
    assert [event["Actor"]["Attributes"] for event in life] == [expected, expected, expected | {"exitCode": "3"}]
    assert life == sorted(life, key=lambda event: event["timeNano"])
    assert SECRET not in json.dumps(life)


def test_a_failed_start_is_told_with_its_code(api: Api, container: TestContainer) -> None:
    with api.events(filters={"event": ["exec_start", "exec_die"], "container": [container.id]}) as events:
        session_id = api.create(container.id, "/none-such")
        assert api.start_detached(session_id).status == 400
        start, die = next(events), next(events)
    assert start["Action"] == "exec_start: /none-such"
    assert die["Actor"]["Attributes"]["exitCode"] == "127"


def test_a_detached_client_is_told(api: Api, labelled: TestContainer) -> None:
    with api.events(filters={"event": ["exec_detach"]}) as events:
        session_id = api.create_attached(labelled.id, "sh", "-c", "echo up; exec cat", Tty=True)
        with api.attach(session_id, Tty=True) as stream:
            stream.connection.read_until(b"up\r\n")
            stream.send(b"\x10\x11")
            stream.read_raw()
        event = next(events)
    assert event["Action"] == "exec_detach"
    assert event["Actor"]["Attributes"] == {
        **ANNOTATIONS,
        "name": labelled.id,
        "image": IMAGE,
        "execID": session_id,
    }


Filters = dict[str, list[str]]

PASSES: dict[str, Callable[[str], Filters]] = {
    "no filter": lambda _: {},
    "container by id": lambda name: {"container": [name]},
    "container by name": lambda name: {"container": [f"/{name}"]},
    "container by the beginning of its id": lambda name: {"container": [name[:-1]]},
    "one of two containers": lambda name: {"container": ["none-such", name]},
    "event without its command": lambda _: {"event": ["exec_create"]},
    "event with its command": lambda _: {"event": ["exec_create: true"]},
    "label": lambda _: {"label": ["team"]},
    "label with its value": lambda _: {"label": ["team=shop"]},
    "label with no value": lambda _: {"label": ["empty="]},
    "two labels": lambda _: {"label": ["team=shop", "empty"]},
    "image": lambda _: {"image": [IMAGE]},
    "type": lambda _: {"type": ["container"]},
    "scope": lambda _: {"scope": ["local"]},
    "daemon": lambda _: {"daemon": ["anything"]},
    "all at once": lambda name: {"container": [name], "event": ["exec_create"], "type": ["container"]},
    "no values": lambda _: {"event": []},
}

STOPS: dict[str, Filters] = {
    "another container": {"container": ["none-such"]},
    "no container": {"container": [""]},
    "another event": {"event": ["exec_die"]},
    "part of an event": {"event": ["exec"]},
    "another label": {"label": ["tea"]},
    "another value": {"label": ["team=sho"]},
    "one of two labels": {"label": ["team=shop", "none"]},
    "another image": {"image": ["busybox"]},
    "another type": {"type": ["image"]},
    "another scope": {"scope": ["swarm"]},
    "one of two filters": {"event": ["exec_create"], "type": ["image"]},
}


def _created(api: Api, container: TestContainer, filters: object) -> bool:
    """Whether a creation in `container` passes `filters`."""
    since = now()
    session_id = api.create(container.id, "true")
    with api.events(since=since, until=now(), filters=filters) as events:
        return any(event["Actor"]["Attributes"]["execID"] == session_id for event in events)


@pytest.mark.parametrize("case", PASSES)
def test_a_filter_lets_through(case: str, api: Api, labelled_runc: TestContainer) -> None:
    assert _created(api, labelled_runc, PASSES[case](labelled_runc.id))


@pytest.mark.parametrize("case", STOPS)
def test_a_filter_holds_back(case: str, api: Api, labelled_runc: TestContainer) -> None:
    assert not _created(api, labelled_runc, STOPS[case])


def test_the_older_form_of_filters(api: Api, labelled_runc: TestContainer) -> None:
    assert _created(api, labelled_runc, {"event": {"exec_create": True}})
    assert not _created(api, labelled_runc, {"event": {"exec_create": False, "exec_die": True}})


def test_since_replays_what_happened(api: Api, container: TestContainer) -> None:
    before = api.create(container.id, "before")
    since = now()
    after = api.create(container.id, "after")
    with api.events(since=since, filters={"container": [container.id]}) as events:
        event = next(events)
        assert (event["Action"], event["Actor"]["Attributes"]["execID"]) == ("exec_create: after", after)
        later = api.create(container.id, "later")
        assert next(events)["Actor"]["Attributes"]["execID"] == later, "then it follows what happens"
    assert before != after


@pytest.mark.parametrize("parameters", [{}, {"since": ""}, {"since": "0"}])
def test_without_since_nothing_is_replayed(parameters: dict[str, str], api: Api, runc_container: TestContainer) -> None:
    api.create(runc_container.id, "before")
    with api.events(filters={"container": [runc_container.id]}, **parameters) as events:
        api.create(runc_container.id, "after")
        assert next(events)["Action"] == "exec_create: after"


def test_until_in_the_past_ends_the_answer_at_once(api: Api, runc_container: TestContainer) -> None:
    since = now()
    api.create(runc_container.id, "inside")
    until = now()
    api.create(runc_container.id, "outside")
    with api.events(since=since, until=until, filters={"container": [runc_container.id]}) as events:
        assert [event["Action"] for event in events] == ["exec_create: inside"]


def test_until_in_the_future_ends_the_answer_then(api: Api, runc_container: TestContainer) -> None:
    until = time.time() + 0.5
    with api.events(
        until=f"{until:.6f}", filters={"container": [runc_container.id], "event": ["exec_create"]}
    ) as events:
        api.create(runc_container.id, "inside")
        assert [event["Action"] for event in events] == ["exec_create: inside"]
    assert time.time() > until - 0.01  # a loop's timers and the time of day are two clocks


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("since=2&until=1", "`since` time cannot be after `until` time"),
        ("since=yesterday", "invalid value for 'since': 'yesterday' is no Unix timestamp"),
        ("until=1.2.3", "invalid value for 'until': '1.2.3' is no Unix timestamp"),
        ("since=NaN", "invalid value for 'since': 'NaN' is no Unix timestamp"),
        ("since=1e30", "invalid value for 'since': '1e30' is no Unix timestamp"),
        ("filters=exec_die", "invalid filter: not a JSON object"),
        ("filters=[]", "invalid filter: not a JSON object"),
        ('filters={"volume":["x"]}', "invalid filter 'volume'"),
        ('filters={"event":"exec_die"}', "invalid filter 'event': its values must be strings"),
        ('filters={"event":[1]}', "invalid filter 'event': its values must be strings"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(target: str, message: str, api: Api) -> None:
    response = api.call("GET", f"/events?{target}")
    assert (response.status, response.message) == (400, message)


def test_all_who_listen_are_told_the_same(api: Api, container: TestContainer) -> None:
    filters: dict[str, Any] = {"container": [container.id]}
    with api.events(filters=filters) as one, api.events(filters=filters) as two:
        session_id = api.create(container.id, "true")
        first, second = next(one), next(two)
    assert first == second
    assert first["Actor"]["Attributes"]["execID"] == session_id


def test_a_listener_that_leaves_harms_nobody(api: Api, runc_container: TestContainer, no_leaks: None) -> None:
    with api.events(filters={"container": [runc_container.id]}) as staying:
        with api.events():
            pass
        api.create(runc_container.id, "true")
        assert next(staying)["Action"] == "exec_create: true"
