"""The state files of runc and crun, as parsed from what the runtimes wrote."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execgate.containers.formats import (
    MalformedError,
    RuntimeState,
    parse_container_id,
    parse_crun,
    parse_runc,
)
from execgate.model.ids import ContainerId
from execgate.model.process import ProcessIdentity

DEMO = ContainerId("demo")
RUNC: dict[str, Any] = {
    "id": "demo",
    "init_process_pid": 5191,
    "init_process_start": 106322,
    "created": "2026-11-23T19:08:07.493415791Z",
    "config": {"rootfs": "/b/rootfs", "labels": ["x=y", "bundle=/b", "bundle=/later"]},
    "cgroup_paths": {},
}
CRUN: dict[str, Any] = {
    "pid": 5637,
    "process-start-time": 109763,
    "cgroup-path": "/cd",
    "bundle": "/b/crun",
    "created": "2026-11-23T19:08:41.916917Z",
}
MISSING = object()


def test_runc() -> None:
    created = datetime(2026, 11, 23, 19, 8, 7, 493415, UTC).timestamp()
    assert parse_runc(DEMO, RUNC) == RuntimeState(ProcessIdentity(5191, 106322), Path("/b"), created)


def test_crun() -> None:
    created = datetime(2026, 11, 23, 19, 8, 41, 916917, UTC).timestamp()
    assert parse_crun(DEMO, CRUN) == RuntimeState(ProcessIdentity(5637, 109763), Path("/b/crun"), created)


@pytest.mark.parametrize("value", [MISSING, None, 0, -1, "5", True, 1.5, 2**63, [], {}])
@pytest.mark.parametrize("field", ["init_process_pid", "init_process_start"])
def test_a_process_is_a_pid_and_a_start_time(field: str, value: object) -> None:
    state = {k: v for k, v in (RUNC | {field: value}).items() if v is not MISSING}
    with pytest.raises(MalformedError, match=field):
        parse_runc(DEMO, state)


@pytest.mark.parametrize("config", [None, {}, {"labels": None}, {"labels": [1]}, {"labels": ["bundle=rel"]}])
def test_runc_without_a_bundle(config: object) -> None:
    with pytest.raises(MalformedError, match="bundle"):
        parse_runc(DEMO, RUNC | {"config": config})


@pytest.mark.parametrize("bundle", [None, "", "relative", 7, "/nul\0"])
def test_crun_without_a_bundle(bundle: object) -> None:
    with pytest.raises(MalformedError, match="bundle"):
        parse_crun(DEMO, CRUN | {"bundle": bundle})


def test_runcs_id_is_that_of_the_directory() -> None:
    with pytest.raises(MalformedError, match="id"):
        parse_runc(ContainerId("other"), RUNC)


@pytest.mark.parametrize("created", [None, "", "yesterday", 5, "2026-13-01T00:00:00Z", "9999-12-31T23:59:59-23:59"])
def test_an_unreadable_time_breaks_nothing(created: object) -> None:
    assert parse_crun(DEMO, CRUN | {"created": created}).created == 0.0


@pytest.mark.parametrize("created", ["2026-11-23T20:08:41+01:00", "2026-11-23T19:08:41"])
def test_zones(created: str) -> None:
    assert parse_crun(DEMO, CRUN | {"created": created}).created == 1795460921.0


@pytest.mark.parametrize("name", ["demo", "a" * 64, "A_b.c+d-e", "_x", "0"])
def test_container_ids(name: str) -> None:
    assert parse_container_id(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-r", "a/b", "../x", "a\0", "a b", "a\n", "\u00e9", "x" * 10_240, "%2f"]
)
def test_what_is_no_container_id(name: str) -> None:
    assert parse_container_id(name) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*RUNC, *CRUN, "labels"]), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*RUNC, *CRUN]), _JSON))
def test_no_object_raises_anything_else(document: dict[str, Any]) -> None:
    for parse, good in ((parse_runc, RUNC), (parse_crun, CRUN)):
        try:
            state = parse(DEMO, good | document)
        except MalformedError:
            continue
        assert state.init.pid > 0
        assert state.bundle.is_absolute()
