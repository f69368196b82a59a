"""Request bodies: read once, bounded, parsed into one model; that object is decided on and that object is executed.

Go's decoder, which Docker's clients are used to, matches the names of fields in any case, takes null for a field's zero
value, and ignores unknown fields. So does this. Where Go silently takes the last of two equal keys, this refuses: two
readers of one body must never read two different requests (CVE-2024-41110 and its kind). The keys of labels are no
names of fields: their case is the client's.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_pascal

from execgate.model.config import ConsoleSize
from execgate.model.errors import InvalidArgument

_UINT32 = 2**32 - 1
# Rows and columns are 16 bits in the kernel's struct winsize.
_WINSIZE_MAX = 2**16 - 1

MAX_OUTPUT = 16 * 1024 * 1024
"""Bytes of output that one answer can hold."""

_Uint32 = Annotated[int, Field(ge=0, le=_UINT32)]
_Dimension = Annotated[int, Field(ge=0, le=_WINSIZE_MAX)]
_Box = Annotated[list[Annotated[int, Field(ge=0, le=_UINT32)]], Field(min_length=2, max_length=2)]


class Body(BaseModel):
    """The base of all bodies; an empty body means the defaults."""

    model_config = ConfigDict(strict=True, extra="ignore", alias_generator=lambda name: name.replace("_", "").lower())


class CreateBody(Body):
    """`POST /containers/{name}/exec`."""

    user: str = ""
    privileged: bool = False
    tty: bool = False
    console_size: _Box | None = None
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    detach_keys: str | None = None
    env: list[str] = Field(default_factory=list)  # pydantic would copy a plain default deeply, each time
    working_dir: str = ""
    cmd: list[str] = Field(default_factory=list)
    # Podman's preserved descriptors, which no HTTP request can carry.
    preserve_fds: _Uint32 = 0
    preserve_fd: list[_Uint32] = Field(default_factory=list)
    # Beyond Docker's.
    timeout: Annotated[float, Field(ge=0, le=365 * 86400)] = 0
    idle_timeout: Annotated[float, Field(ge=0, le=365 * 86400)] = 0
    labels: dict[str, str] = Field(default_factory=dict)
    capture_stdout: bool = False
    capture_stderr: bool = False
    on_disconnect: Literal["", "keep", "hup", "kill"] = ""


class RunBody(CreateBody):
    """`POST /containers/{name}/exec/run`. `encoding` is that of stdin here and of the output in the answer."""

    stdin: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    output_limit: Annotated[int, Field(ge=0, le=MAX_OUTPUT)] = 1024 * 1024


class StartBody(Body):
    """`POST /exec/{id}/start`, as far as the APIs agree."""

    detach: bool = False
    tty: bool = False

    @abstractmethod
    def size(self) -> ConsoleSize | None:
        """Return the size that the terminal shall begin with. InvalidArgument when no terminal has it."""


class DockerStartBody(StartBody):
    """Docker's: a size is `[height, width]`, each a uint32."""

    console_size: _Box | None = None

    def size(self) -> ConsoleSize | None:
        """See StartBody."""
        return console_size(self.console_size)


class LibpodStartBody(StartBody):
    """Podman's: a size is two uint16."""

    h: _Dimension = 0
    w: _Dimension = 0

    def size(self) -> ConsoleSize | None:
        """See StartBody."""
        return console_size((self.h, self.w))


class RemoveBody(Body):
    """`POST /libpod/exec/{id}/remove`."""

    force: bool = False


_Model = TypeVar("_Model", bound=Body)


async def read_body(request: web.Request, model: type[_Model], *, typed: bool = True) -> _Model:
    """Return the request's JSON body as `model`. InvalidArgument; TooLarge comes from the server.

    `typed` refuses a body that is not declared as JSON.
    """
    if typed:
        check_content_type(request)
    data = await request.read()
    return parse_body(data, model) if data else model()


def check_content_type(request: web.Request) -> None:
    """Accept JSON only. A missing Content-Type is fine as long as there is no body (moby: CheckForJSON)."""
    value = request.headers.get("Content-Type", "")
    if not value and (not request.can_read_body or request.content_length == 0):
        return
    if value.partition(";")[0].strip().lower() != "application/json":
        raise InvalidArgument(f"unsupported Content-Type header ({value}): must be 'application/json'")


def parse_body(data: bytes, model: type[_Model]) -> _Model:
    """Parse `data` as `model`. InvalidArgument for what is no JSON, no object, or has the wrong types."""
    try:
        value = _DECODER.decode(data.decode())
    except InvalidArgument:
        raise
    except RecursionError:
        raise InvalidArgument("invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(f"invalid JSON: {error}") from error
    if value is None:
        return model()
    if not isinstance(value, dict):
        raise InvalidArgument("invalid JSON: the body must be an object")
    fields = _unique([(_folded(key), item) for key, item in value.items()])
    try:
        return model.model_validate({key: item for key, item in fields.items() if item is not None})
    except ValidationError as error:
        raise InvalidArgument(f"invalid JSON: {_explain(error, model)}") from error


def console_size(box: Sequence[int] | None) -> ConsoleSize | None:
    """Return Docker's `[height, width]` as a size; the CLI's `[0, 0]` means that it does not know."""
    if box is None or not all(box):
        return None
    if max(box) > _WINSIZE_MAX:
        raise InvalidArgument(f"invalid ConsoleSize {list(box)}: value out of range")
    return ConsoleSize(height=box[0], width=box[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise InvalidArgument("invalid JSON: a key is given twice")
    return unique


def _folded(name: str) -> str:
    """Return the name of a field as Go compares it: in lower case, and U+017F is an s (encoding/json: foldName)."""
    return name.lower().replace("\u017f", "s")


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidArgument(f"invalid JSON: {name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _explain(error: ValidationError, model: type[Body]) -> str:
    """Name the first thing that is wrong, with the field in Docker's spelling."""
    names = {field.alias: to_pascal(name) for name, field in model.model_fields.items()}
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(names.get(str(part), str(part)) for part in first["loc"])
    return f"{where}: {first['msg']}"
