"""A thousand containers of four engines, ten of which really run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from execgate.containers import proc
from execgate.model.process import ProcessIdentity
from support.async_raw import RawClient
from support.population import Population, populate
from support.runtimes import RuntimeHost
from support.service import Service

pytestmark = pytest.mark.soak

_COUNT = 1000
_REAL = 10


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory, runc: RuntimeHost) -> Iterator[Population]:
    alive = ProcessIdentity(os.getpid(), proc.start_time(os.getpid()) or 0)
    made = populate(tmp_path_factory.mktemp("host"), runc, _COUNT, alive, real_ones=_REAL)
    yield made
    made.delete()


async def test_all_are_known_and_the_real_ones_can_be_entered(
    population: Population, new_service: Callable[..., Service], host_dir: Path
) -> None:
    service = new_service(host_dir / "thousand", env=population.environment)
    raw = RawClient(service.socket)
    listed = (await raw.call("GET", "/containers/json?all=1")).json()
    assert len(listed) == _COUNT
    assert {one["Engine"] for one in listed} == {"docker", "podman", "containerd", "oci"}
    for name in population.names:
        found = await raw.call("GET", f"/containers/{name}/json")
        assert found.status == 200, (name, found)
        assert found.json()["Name"] == f"/{name}"
    for placed in population.real:
        answer = await raw.call(
            "POST",
            f"/containers/{placed.name}/exec/run",
            {"Cmd": ["sh", "-c", "echo $1; exit 7", "sh", placed.plan.id]},
        )
        assert answer.status == 200, answer
        assert (answer.json()["ExitCode"], answer.json()["Stdout"]) == (7, f"{placed.plan.id}\n")
        assert (await raw.call("GET", f"/containers/{placed.plan.id[:12]}/json")).json()["Engine"] == "docker"
    assert (await raw.call("GET", "/containers/nosuch/json")).status == 404
