"""What must hold after every fault, whatever it was."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from support.api import RawApi
from support.faults import fifo
from support.leaks import assert_no_leaks, footprint, resident_bytes
from support.runtimes import TestContainer
from support.service import Service

MEMORY_BOUND = 64 * 1024 * 1024
"""Bytes by which a service may have grown after any of this (reliability: "within 64 MB")."""


@dataclass(slots=True)
class Watched:
    """Who is held to it: a test that starts the service anew on its directory says so here."""

    service: Service


@contextlib.contextmanager
def unharmed_service(
    service: Service, bystander: TestContainer, *, dies: Literal["", "worker", "service"] = "", **fields: Any
) -> Iterator[Watched]:
    """Hold a service to the promises that survive every fault.

    A session of `bystander`, created with `fields`, runs all along and must notice nothing. If the worker `dies`, its
    client attaches again; if the keeper does with it, and so the session's stdin, it has no client. At the end there
    are no more descriptors, processes or directories than before, memory is bounded, and the log shows no traceback.
    """
    watched = Watched(service)
    assert RawApi(service.socket).call("GET", "/_ping").status == 200
    before, memory, logged = footprint(service), resident_bytes(service), len(service.log())
    with (_without_client if dies == "service" else _with_client)(watched, bystander, dies == "worker", fields):
        yield watched
    service = watched.service
    assert_no_leaks(service, before)
    grown = resident_bytes(service) - memory
    assert grown < MEMORY_BOUND, f"the service grew by {grown >> 20} MiB"
    log = service.log()[logged:]
    signs = ("Traceback", "was never", "was destroyed")
    assert not any(sign in log for sign in signs), f"the service logged:\n{log}"


@contextlib.contextmanager
def _with_client(
    watched: Watched, bystander: TestContainer, comes_back: bool, fields: Mapping[str, Any]
) -> Iterator[None]:
    api = RawApi(watched.service.socket)
    if comes_back:
        fields = {**fields, "OnDisconnect": "keep"}
    with contextlib.ExitStack() as streams:
        control = streams.enter_context(api.open(bystander.id, "cat", stdin=True, **fields))
        assert control.echo(b"before\n") == b"before\n"
        yield
        if comes_back:
            control = streams.enter_context(api.reattach(control.id))
        assert control.echo(b"after\n") == b"after\n"
        control.half_close()
        assert control.finish() == (b"", b"")
        assert control.exit_code() == 0


@contextlib.contextmanager
def _without_client(
    watched: Watched, bystander: TestContainer, _comes_back: bool, fields: Mapping[str, Any]
) -> Iterator[None]:
    with fifo(bystander, "bystander") as end:
        api = RawApi(watched.service.socket)
        session = api.create(bystander.id, "sh", "-c", "read line < /tmp/bystander; exit 42", **fields)
        assert api.start_detached(session).status == 200
        pid = api.inspect(session)["Pid"]
        yield
        api = RawApi(watched.service.socket)
        assert api.inspect(session)["Pid"] == pid
        end()
        assert api.wait_stopped(session)["ExitCode"] == 42


class WatchedServices:
    """Services of the test's own that are held to `unharmed_service` up to the end of the test."""

    def __init__(
        self, new_service: Callable[..., Service], bystander: TestContainer, checks: contextlib.ExitStack
    ) -> None:
        self._new_service = new_service
        self._bystander = bystander
        self._checks = checks
        self._watched: dict[Path, Watched] = {}

    def __call__(self, *, dies: Literal["", "worker", "service"] = "", **options: Any) -> Service:
        """Start one: `options` are those of `new_service`, `dies` is that of `unharmed_service`."""
        service = self._new_service(**options)
        check = unharmed_service(service, self._bystander, dies=dies)
        self._watched[service.directory] = self._checks.enter_context(check)
        return service

    def again(self, ended: Service, **options: Any) -> Service:
        """Start the next one on the directory of one that has ended."""
        service = self._watched[ended.directory].service = self._new_service(ended.directory, **options)
        return service
