"""What differs between the APIs that speak of the same exec sessions: data, not handlers."""

import platform
import re
from dataclasses import dataclass

from aiohttp import web

from execgate import __version__
from execgate.model.errors import InvalidArgument

ApiVersion = tuple[int, int]

_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}", re.ASCII)

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API: its range of versions, and from which version it does what."""

    minimum: ApiVersion
    maximum: ApiVersion
    console_size_since: ApiVersion
    multiplexed_since: ApiVersion

    def version_of(self, request: web.Request) -> ApiVersion:
        """Return the version a request was made in; without one it is the newest. InvalidArgument out of range."""
        text = request.match_info.get("version")
        if text is None:
            return self.maximum
        version = parse_version(text)
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
            "Api-Version": dotted(self.maximum),
            "Server": f"execgate/{__version__} ({platform.system().lower()})",
            "Ostype": platform.system().lower(),
        }


# The newest version whose exec, event and container answers are given here; from 1.52 on dockerd drops fields
# that older clients read. dockerd's own oldest is 1.24.
DOCKER = Dialect(minimum=(1, 24), maximum=(1, 51), console_size_since=(1, 42), multiplexed_since=(1, 42))


def parse_version(text: str) -> ApiVersion:
    """Parse `major.minor`. InvalidArgument."""
    if not _VERSION.fullmatch(text):
        raise InvalidArgument(f"invalid API version {text[:32]!r}")
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def dotted(version: ApiVersion) -> str:
    """Return a version as clients write it."""
    return f"{version[0]}.{version[1]}"


def upgrade_head(dialect: Dialect, version: ApiVersion, *, upgrade: bool, multiplexed: bool) -> bytes:
    """Return the head that turns a connection into a stream.

    moby tests only whether the header `Upgrade` is present. Without it the answer is a 200 whose body is the
    stream, always called raw; with it a 101 that names multiplexed streams from API 1.42 on.
    """
    content_type = (
        MULTIPLEXED_STREAM if upgrade and multiplexed and version >= dialect.multiplexed_since else RAW_STREAM
    )
    lines = ["HTTP/1.1 101 UPGRADED" if upgrade else "HTTP/1.1 200 OK", f"Content-Type: {content_type}"]
    if upgrade:
        lines += ["Connection: Upgrade", "Upgrade: tcp"]
    lines += [f"{name}: {value}" for name, value in dialect.headers().items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii")
