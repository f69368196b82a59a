"""The document read by a machine: requests that it allows and requests that it forbids, hundreds for each operation.

Schemathesis makes them up, from the document and nothing else, and judges the answers: no error of the server's, no
status, header or body that the document does not have, nothing forbidden that is accepted, nothing allowed that is
refused. Each request is sent twice: as it came, which mostly means a container or a session that does not exist, and
once more for ones that do.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
import requests
import schemathesis
from docker.transport import UnixHTTPAdapter  # type: ignore[import-untyped]
from schemathesis import Case, CheckFunction
from schemathesis.checks import CHECKS

from contract.api import Api
from contract.document import PATH, Document
from support.raw import TIMEOUT, Answer
from support.runtimes import RuntimeHost, TestContainer
from support.service import Service

EXAMPLES = 5
"""Requests made up at random for each operation. Before them come those at the edges of each parameter and field."""

ADDRESS = "http://execgate"
"""Stands for the unix socket."""

TWINS = (
    r"^/libpod/(exec/json|exec/\{id\}/(kill|stop|wait|result|logs|attach|stdin)|containers/\{name\}/exec/(run|json))$"
)
"""What neither Docker nor Podman offers is in both trees, with the same parameters and bodies; here it is in one."""

SCHEMA = schemathesis.openapi.from_path(PATH).exclude(path_regex=TWINS)

TIMESTAMP = re.compile(Document.load().raw["components"]["schemas"]["Timestamp"]["pattern"])

HIJACKS = "/start", "/attach"
"""What they answer for sessions that exist is no HTTP any more: `test_start.py` and `test_output.py` read that."""

READERS = "/json", "/wait", "/logs", "/result", "/stdin"
"""They are asked of a session that has ended, or some would wait for it."""

RUN_EVERY = 6
"""Of the requests to run something, each so many-th is run: that starts a process, or looks for one to start."""


def checks(*names: str) -> list[CheckFunction]:
    """Return checks of Schemathesis."""
    return cast("list[CheckFunction]", CHECKS.get_by_names(names))


ABOUT_ANSWERS = checks(
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"
)
ABOUT_BODIES = checks("response_schema_conformance")
ABOUT_REFUSALS = checks("negative_data_rejection", "positive_data_acceptance")
"""Those that the document can foresee: not of sessions and containers that exist, where the state decides.

Of Schemathesis's other checks `unsupported_method` is the one that would fail: like dockerd, the service has 404 for a
method that a path does not know, not 405.
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A service, a container in it, and a session of that container that has ended and was captured."""

    api: Api
    session: requests.Session
    container: TestContainer
    ended: str

    def send(self, case: Case[Any]) -> Any:
        """Send a request; with `/libpod` before its path, in a version."""
        base = f"{ADDRESS}/v4.3.1" if case.path.startswith("/libpod") else ADDRESS
        response = case.call(base_url=base, session=self.session, timeout=TIMEOUT)
        self.judge(case, response)
        return response

    def judge(self, case: Case[Any], response: Any) -> None:
        """Hold an answer to the document as the other tests do, which allows no unknown fields."""
        if case.method.lower() == case.operation.method:  # else it was made up to see what another one gets
            headers = {name.lower(): ", ".join(values) for name, values in response.headers.items()}
            self.api.checked(case.method, case.path, Answer(response.status_code, "", headers, response.content))

    def new_session(self) -> str:
        """Create a session that nobody has started."""
        return self.api.create(self.container.id, "true", AttachStdout=True)


@pytest.fixture(scope="module")
def stage(
    host_dir: Path, hosts: list[RuntimeHost], runc: RuntimeHost, event_loop_name: str, document: Document
) -> Iterator[Stage]:
    """A service of its own: it ends up with thousands of sessions."""
    service = Service.start(host_dir / "schemathesis", hosts, event_loop=event_loop_name)
    container = runc.run()
    api = Api(service.socket, document)
    captured = {"CaptureStdout": True, "CaptureStderr": True}
    with requests.Session() as session:
        session.mount(ADDRESS, UnixHTTPAdapter(str(service.socket)))
        ended = api.run(container.id, "sh", "-c", "echo out; echo err >&2", **captured)
        yield Stage(api, session, container, ended["ID"])
    service.stop()
    container.delete()


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, derandomize=True, database=None)
def test_generated(case: Case[Any], stage: Stage) -> None:
    end_events(case)
    case.body = without_integral_floats(case.body)
    # Events are JSON, too, but one a line: `Stage.judge` reads them so.
    about_bodies = [] if case.path.endswith("/events") else ABOUT_BODIES
    case.validate_response(stage.send(case), checks=[*ABOUT_ANSWERS, *about_bodies, *ABOUT_REFUSALS])
    if can_be_real(case):
        make_real(case, stage)
        case.validate_response(stage.send(case), checks=[*ABOUT_ANSWERS, *ABOUT_BODIES])


def end_events(case: Case[Any]) -> None:
    """Let a stream of events that would have no end, or one in the future, end at once."""
    if not case.path.endswith("/events"):
        return
    times = {name: case.query.get(name, "") for name in ("since", "until")}
    if all(isinstance(text, str) and (not text or TIMESTAMP.fullmatch(text)) for text in times.values()):
        case.query["until"] = "1"
        if float(times["since"] or 0) > 1:
            del case.query["since"]


def without_integral_floats(value: Any) -> Any:
    """Return a body with 2 for 2.0: JSON Schema calls both an integer, Go's decoder and so this service do not."""
    if isinstance(value, dict):
        return {name: without_integral_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_integral_floats(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def can_be_real(case: Case[Any]) -> bool:
    """Return whether a request is sent once more for what exists."""
    if case.path.endswith("/exec/run"):
        return zlib.crc32(repr(case.body).encode(errors="replace")) % RUN_EVERY == 0
    return bool(case.path_parameters) and not case.path.endswith(HIJACKS)


def make_real(case: Case[Any], stage: Stage) -> None:
    """Put a container or a session that exists into the path."""
    if "name" in case.path_parameters:
        case.path_parameters["name"] = stage.container.id
    if "id" in case.path_parameters:
        case.path_parameters["id"] = stage.ended if case.path.endswith(READERS) else stage.new_session()
    if case.path.endswith("/exec/run") and isinstance(case.body, dict):
        case.body["Timeout"] = 0.1  # or what reads from a terminal would read for ever
