"""What differs between the APIs that speak of the same exec sessions: data, not handlers.

Docker's API and Podman's own (libpod) are two trees of paths over one set of handlers. Whatever a handler would have
to ask about the tree that it was called in is a field here; how each tree shapes what it tells is in `http.answers`.
"""

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from aiohttp import web

from execgate import __version__
from execgate.http.answers import docker, libpod
from execgate.http.answers.subjects import Answers
from execgate.http.bodies import DockerStartBody, LibpodStartBody, StartBody
from execgate.model.errors import InvalidArgument
from execgate.wire import stdcopy

ApiVersion = tuple[int, ...]

_DOCKER_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}", re.ASCII)
_LIBPOD_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){0,2}", re.ASCII)
_LIBPOD_PATH = re.compile(r"(/v[^/]*)?/libpod(/|\Z)")

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"
DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"


class TtyOf(Enum):
    """Whose `Tty` decides how the output is framed."""

    CREATE = auto()
    START = auto()


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """How an error that is known only after the hijack is told: a line in the stream."""

    stream: int
    form: str
    """With one `{}` for the message, and the end of the line."""


@dataclass(frozen=True, slots=True)
class Rewording:
    """The words of one API for what the floors below say in Docker's.

    `said` matches a whole message; `form` is a template for `re.Match.expand`; `cause` is the root of the error, which
    is all that a client of libpod can tell errors by.
    """

    said: re.Pattern[str]
    form: str
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API: where its paths are, its versions, and what it does in its own way."""

    name: str
    prefix: str
    """What stands between the version and the path."""

    versioned_only: bool
    """Whether its paths exist with a version only."""

    version_form: re.Pattern[str]
    minimum: ApiVersion
    maximum: ApiVersion
    refuses_versions: bool
    """Whether a version outside minimum…maximum is a 400."""

    version_header: str
    """Where clients look for the newest version."""

    answers: Answers
    error_body: Callable[[int, str, str], Mapping[str, object]]
    """(status, message, cause) to the JSON of an error."""

    rewordings: tuple[Rewording, ...]
    checks_content_type: bool

    empty_disables_detach_keys: bool
    """Whether `DetachKeys: ""` means none; otherwise it means the default, as a missing one does everywhere."""

    start_body: type[StartBody]
    console_size_since: ApiVersion
    framed_by: TtyOf
    multiplexed_since: ApiVersion
    multiplexed_without_upgrade: bool
    """Whether a 200 names a multiplexed stream too."""

    error_line: ErrorLine
    tells_second_start_in_stream: bool
    """Whether an attached start of what was started already is hijacked first and then refused in the stream."""

    detached_answer: str
    """The body of the answer to a detached start."""

    resized_status: int
    resize_may_come_late: str
    """The query parameter that makes a resize of what no longer runs a success; empty: there is none."""

    def parse_version(self, text: str) -> ApiVersion:
        """Parse a version as it stands in a path. InvalidArgument."""
        if not self.version_form.fullmatch(text):
            raise InvalidArgument(f"invalid API version {text[:32]!r}")
        return tuple(map(int, text.split(".")))

    def version_of(self, request: web.Request) -> ApiVersion:
        """Return the version a request was made in; without one it is the newest. InvalidArgument out of range."""
        text = request.match_info.get("version")
        if text is None:
            return self.maximum
        version = self.parse_version(text)
        if not self.refuses_versions:
            return version
        if version < self.minimum:
            raise InvalidArgument(
                f"client version {text} is too old. Minimum supported API version is {dotted(self.minimum)}, "
                "please upgrade your client to a newer version"
            )
        if version > self.maximum:
            raise InvalidArgument(
                f"client version {text} is too new. Maximum supported API version is {dotted(self.maximum)}"
            )
        return version

    def headers(self) -> dict[str, str]:
        """Return what every answer carries."""
        return {
            "Api-Version": dotted(DOCKER.maximum),
            "Server": f"execgate/{__version__} ({platform.system().lower()})",
            "Ostype": platform.system().lower(),
            self.version_header: dotted(self.maximum),
        }

    def reworded(self, message: str) -> tuple[str, str]:
        """Return a message in this API's words, and its cause."""
        for rewording in self.rewordings:
            if found := rewording.said.fullmatch(message):
                return found.expand(rewording.form), rewording.cause
        return message, message


# The newest version whose exec, event and container answers are given here; from 1.52 on dockerd drops fields
# that older clients read. dockerd's own oldest is 1.24.
DOCKER = Dialect(
    name="docker",
    prefix="",
    versioned_only=False,
    version_form=_DOCKER_VERSION,
    minimum=(1, 24),
    maximum=(1, 51),
    refuses_versions=True,
    version_header="Api-Version",
    answers=docker.ANSWERS,
    error_body=docker.error_body,
    rewordings=(),
    checks_content_type=True,
    empty_disables_detach_keys=False,
    start_body=DockerStartBody,
    console_size_since=(1, 42),
    framed_by=TtyOf.START,
    multiplexed_since=(1, 42),
    multiplexed_without_upgrade=False,
    error_line=ErrorLine(stdcopy.STDOUT, "{}\r\n"),
    tells_second_start_in_stream=True,
    detached_answer="",
    resized_status=200,
    resize_may_come_late="",
)

# Podman refuses no version: a client of 5.x may ask a service of 4.x. What it looks at is Libpod-API-Version, which
# must be 4.0.0 or later, and from 4.8 on makes it remove the sessions that it has made.
LIBPOD = Dialect(
    name="libpod",
    prefix="/libpod",
    versioned_only=True,
    version_form=_LIBPOD_VERSION,
    minimum=(4, 0, 0),
    maximum=(5, 8, 0),
    refuses_versions=False,
    version_header="Libpod-API-Version",
    answers=libpod.ANSWERS,
    error_body=libpod.error_body,
    rewordings=(
        Rewording(
            re.compile(r"No such container: (.*)", re.DOTALL),
            r'no container with name or ID "\1" found: no such container',
            "no such container",
        ),
        Rewording(
            re.compile(r"No such exec instance: (.*)", re.DOTALL),
            r"no exec session with ID \1 found: no such exec session",
            "no such exec session",
        ),
        Rewording(
            re.compile(r"container (\S+) is not running"),
            r"container \1 is not running: container state improper",
            "container state improper",
        ),
        Rewording(
            re.compile(r"Container (\S+) is paused, unpause the container before exec"),
            r"cannot exec in container \1 as it is paused: container state improper",
            "container state improper",
        ),
        Rewording(
            re.compile(r"cannot remove exec session (\S+): it is running.*"),
            r"cannot remove exec session \1 as it is running: exec session state improper",
            "exec session state improper",
        ),
        Rewording(
            re.compile(r"exec command (\S+) (is already running|has already run|is not running|is running)"),
            r"exec session \1 \2: exec session state improper",
            "exec session state improper",
        ),
    ),
    checks_content_type=False,
    empty_disables_detach_keys=True,
    start_body=LibpodStartBody,
    console_size_since=(0,),
    framed_by=TtyOf.CREATE,
    multiplexed_since=(4, 7),
    multiplexed_without_upgrade=True,
    # On stderr, not on the stream 3 that podman has for it: podman fails with 125 at a frame of stream 3, where the
    # session's exit code would have been 126 or 127.
    error_line=ErrorLine(stdcopy.STDERR, "Error: {}\n"),
    tells_second_start_in_stream=False,
    detached_answer="\n",
    resized_status=201,
    resize_may_come_late="running",
)


def dialect_of(path: str) -> Dialect:
    """Return the API that a (decoded) path belongs to, whether or not there is such a path."""
    return LIBPOD if _LIBPOD_PATH.match(path) else DOCKER


def dialect_named(name: str) -> Dialect:
    """Return a dialect by its name. KeyError."""
    return {dialect.name: dialect for dialect in (DOCKER, LIBPOD)}[name]


def dotted(version: ApiVersion) -> str:
    """Return a version as clients write it."""
    return ".".join(map(str, version))


def upgrade_head(
    dialect: Dialect,
    version: ApiVersion,
    *,
    upgrade: bool,
    multiplexed: bool,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """Return the head that turns a connection into a stream, with further `headers`.

    Like moby this tests only whether the header `Upgrade` was present (`upgrade`). Without it the answer is a 200 whose
    body is the stream, with it a 101. `multiplexed` says what the stream is; the content type tells that to the
    clients that are new enough for the name.
    """
    named = multiplexed and version >= dialect.multiplexed_since and (upgrade or dialect.multiplexed_without_upgrade)
    content_type = MULTIPLEXED_STREAM if named else RAW_STREAM
    lines = ["HTTP/1.1 101 UPGRADED" if upgrade else "HTTP/1.1 200 OK", f"Content-Type: {content_type}"]
    if upgrade:
        lines += ["Connection: Upgrade", "Upgrade: tcp"]
    lines += [f"{name}: {value}" for name, value in {**dialect.headers(), **headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii")
