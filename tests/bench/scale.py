"""`python -m bench.scale`: what one request costs when the host has ten containers, and when it has a thousand.

Each request is timed at the client, over a unix socket, in turns between the two services; the medians and their
ratio are printed. A lookup by name, by id, by a prefix of the id, of a name that nobody has, and a whole exec of
`true` in a real container; and the same look-ups without HTTP. The list grows with what it lists.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path

from bench import machine
from execgate.config import load
from execgate.containers import proc
from execgate.containers.catalog import Catalog
from execgate.engine import catalog_of
from execgate.model.errors import NotFound
from execgate.model.process import ProcessIdentity
from support.async_raw import RawClient
from support.population import Population, populate
from support.runtimes import RuntimeHost, runc_host
from support.service import Service

COUNTS = (10, 1000)
_ROUNDS = 200
_EXEC_ROUNDS = 60


def main() -> int:
    """Measure and print; return the exit code."""
    if os.geteuid() != 0:
        print("bench: containers of runc need root: run as root", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="eg-scale-") as name, contextlib.ExitStack() as cleanup:
        host = runc_host(Path(name) / "r")
        served = [(count, *cleanup.enter_context(_serving(Path(name) / str(count), host, count))) for count in COUNTS]
        print(f"load {machine.load()}; medians in ms at the client, with {' and '.join(map(str, COUNTS))} containers")
        for what, rounds, request in _REQUESTS:
            times: dict[int, list[float]] = {count: [] for count in COUNTS}
            for _ in range(rounds):
                for count, service, population in served:
                    begin = time.perf_counter()
                    asyncio.run(request(RawClient(service.socket), population))
                    times[count].append(time.perf_counter() - begin)
            _print(what, *(statistics.median(times[count]) for count in COUNTS))
        catalogs = [(catalog_of(load({}, population.environment)), population) for _, _, population in served]
        for catalog, _ in catalogs:
            catalog.list()
        for what, look_up in _LOOK_UPS:
            _print(what, *(_median(partial(look_up, catalog, population)) for catalog, population in catalogs))
    return 0


def _print(what: str, few: float, many: float) -> None:
    print(f"{what:<28} {few * 1000:8.2f} {many * 1000:8.2f}   x {many / few:.2f}", flush=True)


def _median(ask: Callable[[], object]) -> float:
    took = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        with contextlib.suppress(NotFound):
            ask()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


@contextlib.contextmanager
def _serving(directory: Path, host: RuntimeHost, count: int) -> Iterator[tuple[Service, Population]]:
    alive = ProcessIdentity(os.getpid(), proc.start_time(os.getpid()) or 0)
    population = populate(directory / "host", host, count, alive, real_ones=2)
    try:
        service = Service.start(directory / "s", [host], env=population.environment)
        try:
            yield service, population
        finally:
            service.stop()
    finally:
        population.delete()


async def _ping(raw: RawClient, _population: Population) -> None:
    assert (await raw.call("GET", "/_ping")).status == 200


async def _inspect(raw: RawClient, ref: str, status: int = 200) -> None:
    answer = await raw.call("GET", f"/containers/{ref}/json")
    assert answer.status == status, answer


async def _exec(raw: RawClient, population: Population) -> None:
    answer = await raw.call("POST", f"/containers/{population.real[0].name}/exec/run", {"Cmd": ["true"]})
    assert answer.status == 200, answer


async def _list(raw: RawClient, population: Population) -> None:
    assert len((await raw.call("GET", "/containers/json?all=1")).json()) == population.count


Request = Callable[[RawClient, Population], Coroutine[None, None, None]]

_REQUESTS: tuple[tuple[str, int, Request], ...] = (
    ("ping", _ROUNDS, _ping),
    ("inspect by name (docker)", _ROUNDS, lambda raw, one: _inspect(raw, one.names[0])),
    ("inspect by name (podman)", _ROUNDS, lambda raw, one: _inspect(raw, one.names[1])),
    ("inspect by name (pod)", _ROUNDS, lambda raw, one: _inspect(raw, one.names[2])),
    ("inspect by id", _ROUNDS, lambda raw, one: _inspect(raw, one.real[0].plan.id)),
    ("inspect by prefix", _ROUNDS, lambda raw, one: _inspect(raw, one.real[0].plan.id[:12])),
    ("inspect of nobody", _ROUNDS, lambda raw, _: _inspect(raw, "nosuch", 404)),
    ("exec and wait", _EXEC_ROUNDS, _exec),
    ("list all", 20, _list),
)

LookUp = Callable[[Catalog, Population], object]

_LOOK_UPS: tuple[tuple[str, LookUp], ...] = (
    ("find by name", lambda catalog, one: catalog.find(one.names[0])),
    ("find by id", lambda catalog, one: catalog.find(one.real[0].plan.id)),
    ("find by prefix", lambda catalog, one: catalog.find(one.real[0].plan.id[:12])),
    ("find by a short prefix", lambda catalog, one: catalog.find(one.real[0].plan.id[:5])),
    ("find nobody", lambda catalog, _: catalog.find("nosuch")),
)

if __name__ == "__main__":
    sys.exit(main())
