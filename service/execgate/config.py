"""The configuration: flags over environment (`EXECGATE_*`) over a TOML file over defaults.

One model says what there is, with its bounds; the three sources are merged before it judges, so a mistake is
reported once and in the same words, wherever it was made.
"""

import os
import shutil
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from execgate.containers.catalog import LabelFilter
from execgate.containers.engines.oci import default_roots
from execgate.containers.engines.places import Places, find_places
from execgate.containers.states import RuntimeRoot
from execgate.gate.audit_log import AuditSettings
from execgate.http.certificates import TlsSettings
from execgate.http.listeners import Address, parse_address
from execgate.model.container import EngineName
from execgate.model.errors import InvalidArgument
from execgate.rootless import user_id
from execgate.runtime.directory import longest_state_dir

ENVIRONMENT_PREFIX = "EXECGATE_"
RUNTIMES = ("runc", "crun")
_PLACES = tuple(field.name for field in fields(Places) if field.name != "runtimes")


def runtime_dir() -> Path:
    """Return where sockets and state are by default: /run, for a user $XDG_RUNTIME_DIR."""
    uid = user_id()
    return Path("/run") if uid == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}")


def default_listen() -> str:
    """Return where the service listens, and its clients look, when nobody says otherwise."""
    return f"unix://{runtime_dir()}/execgate.sock"


def config_dir() -> Path:
    """Return where the files of an administrator are: /etc/execgate, for a user below $XDG_CONFIG_HOME."""
    if user_id() == 0:
        return Path("/etc/execgate")
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "execgate"


def default_file() -> Path:
    """Return the configuration that is read, if it is there, when nobody names another."""
    return config_dir() / "execgate.toml"


def default_policy_file() -> Path:
    """Return the policy that is read, if it is there, when nobody names another."""
    return config_dir() / "policy.toml"


def _split(value: object) -> object:
    """Read a list from one environment variable: its parts are separated by white space or commas."""
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _pairs(value: object) -> object:
    """Read `NAME=VALUE` items as a table."""
    items = _split(value)
    if not isinstance(items, list):
        return items
    pairs = [str(item).partition("=") for item in items]
    if not all(name and equals and rest for name, equals, rest in pairs):
        raise ValueError("expected NAME=PATH")
    return {name: rest for name, _, rest in pairs}


def _absolute(value: object) -> object:
    return Path(value).expanduser().absolute() if isinstance(value, str) and value else value


_Path = Annotated[Path, BeforeValidator(_absolute)]
_PathOrNone = Annotated[Path | None, BeforeValidator(lambda value: _absolute(value) or None)]
_List = Annotated[list[str], BeforeValidator(_split)]
_Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]


class Config(BaseModel):
    """Everything there is to configure. Field names are the keys of the file and, in upper case, of the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: _List = Field(default_factory=lambda: [default_listen()])
    state_dir: _Path = Field(default_factory=lambda: runtime_dir() / "execgate")
    runtime_roots: _List = []
    runtimes: Annotated[dict[str, _Path], BeforeValidator(_pairs)] = {}
    conmon: _Path | None = None
    engines: Annotated[list[EngineName], BeforeValidator(_split)] = list(EngineName)
    container_labels: _List = []
    rootless: Literal["auto", "off"] = "auto"
    tokens: _Path = Field(default_factory=lambda: config_dir() / "tokens")
    docker_data_root: _Path | None = None
    docker_exec_root: _Path | None = None
    containerd_root: _Path | None = None
    containerd_state: _Path | None = None
    containerd_runc_root: _Path | None = None
    nerdctl_root: _Path | None = None
    storage_graph_root: _Path | None = None
    storage_run_root: _Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    event_loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    standby: bool = True
    socket_mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] = "0660"
    socket_group: str = ""
    tls_certificate: _Path | None = None
    tls_key: _Path | None = None
    tls_client_ca: _Path | None = None
    tls_client_certificates: Literal["required", "optional"] = "required"
    tls_minimum: Literal["1.2", "1.3"] = "1.3"
    max_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    retention_seconds: _Seconds = 600.0
    created_lifetime_seconds: _Seconds = 3600.0
    start_timeout_seconds: _Seconds = 30.0
    drain_seconds: _Seconds = 2.0
    stop_timeout_seconds: Annotated[float, Field(ge=0, le=86400)] = 10.0
    timeout_grace_seconds: Annotated[float, Field(ge=0, le=86400)] = 5.0
    max_created: Annotated[int, Field(ge=1, le=1_000_000)] = 5_000
    max_sessions_per_container: Annotated[int, Field(ge=1, le=1_000_000)] = 5_000
    parallel_starts: Annotated[int, Field(ge=1, le=10_000)] = 64
    queued_starts: Annotated[int, Field(ge=0, le=1_000_000)] = 2_000
    capture_bytes: Annotated[int, Field(ge=64 * 1024, le=16 * 2**30)] = 16 * 2**20
    policy: _Path | None = None
    allow_privileged: bool = False
    allow_host_equivalent: bool = False
    audit_file: _PathOrNone = None
    audit_stdout: bool = False
    audit_max_bytes: Annotated[int, Field(ge=0, le=2**50)] = 100 * 2**20
    audit_keep: Annotated[int, Field(ge=1, le=1000)] = 10
    audit_strict: bool = False
    audit_sync: bool = False

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: list[str]) -> list[str]:
        for text in value:
            parse_address(text)
        return value

    @field_validator("state_dir")
    @classmethod
    def _check_state_dir(cls, value: Path) -> Path:
        if len(os.fsencode(value)) > longest_state_dir():
            raise ValueError(f"longer than {longest_state_dir()} bytes: a socket in it would exceed the kernel's limit")
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key need each other")
        if self.tls_certificate is None and any(address.tls for address in self.addresses):
            raise ValueError("listen: tls:// needs tls_certificate and tls_key")
        return self

    @property
    def tls(self) -> TlsSettings | None:
        """What TLS is spoken with; None: it is not configured."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return TlsSettings(
            certificate=self.tls_certificate,
            key=self.tls_key,
            client_ca=self.tls_client_ca,
            client_required=self.tls_client_certificates == "required",
            minimum=ssl.TLSVersion.TLSv1_3 if self.tls_minimum == "1.3" else ssl.TLSVersion.TLSv1_2,
        )

    @property
    def addresses(self) -> list[Address]:
        """Where to listen."""
        return [parse_address(text) for text in self.listen]

    def roots(self) -> list[RuntimeRoot]:
        """Return the state roots to look at: the configured ones, else the runtimes' usual places."""
        if not self.runtime_roots:
            return default_roots(os.environ, user=_is_user())
        return [_root(text) for text in self.runtime_roots]

    def places(self) -> Places:
        """Return where engines keep their files: where we are told, else where their own configuration says."""
        found = find_places(os.environ, user=_is_user())
        told = {name: getattr(self, name) for name in _PLACES if getattr(self, name) is not None}
        return replace(found, **told)

    def runtime_paths(self) -> dict[str, Path]:
        """Return each runtime's program: the configured one, else Podman's, else that on the PATH; without it, none."""
        found = {name: shutil.which(name) for name in RUNTIMES}
        on_path = {name: Path(path) for name, path in found.items() if path}
        return on_path | dict(self.places().runtimes) | self.runtimes

    def label_filters(self) -> list[LabelFilter]:
        """Return the labels that a container must have to be shown."""
        pairs = (text.partition("=") for text in self.container_labels)
        return [(name, value if equals else None) for name, equals, value in pairs]

    def policy_path(self) -> Path | None:
        """Return the policy's file: the configured one, else the default one if it is there; None without a policy."""
        # A link that leads nowhere is a policy, too: one that cannot be read.
        return self.policy or (default_policy_file() if os.path.lexists(default_policy_file()) else None)

    def audit(self) -> AuditSettings:
        """Return what is said of the audit log."""
        return AuditSettings(
            anchor=self.state_dir / "audit",
            path=self.audit_file,
            stdout=self.audit_stdout,
            max_bytes=self.audit_max_bytes,
            keep=self.audit_keep,
            strict=self.audit_strict,
            sync=self.audit_sync,
        )

    def conmon_path(self) -> Path | None:
        """Return conmon: the configured one, else the one on the PATH or where distributions put it."""
        found = shutil.which("conmon") or shutil.which("conmon", path="/usr/libexec/podman:/usr/lib/podman")
        return self.conmon or (Path(found) if found else None)


def load(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Merge the sources and check them. InvalidArgument names the source, the key and what is wrong.

    `flags` has the values of the command line by field name, None where not given, and `config`, the file's path.
    A file that was asked for must exist; the default one may be missing.
    """
    path = flags.get("config") or environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    sources = {
        f"file {path or default_file()}": _read_file(Path(path) if path else None),
        "environment": {
            name: environ[ENVIRONMENT_PREFIX + name.upper()]
            for name in Config.model_fields
            if ENVIRONMENT_PREFIX + name.upper() in environ
        },
        "command line": {name: flags[name] for name in Config.model_fields if flags.get(name) is not None},
    }
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in sources.items():
        merged |= values
        origin |= dict.fromkeys(values, source)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise InvalidArgument("\n".join(_explain(problem, origin) for problem in error.errors())) from error
    _check_policy(config, origin)
    return config


def _check_policy(config: Config, origin: Mapping[str, str]) -> None:
    """With a policy its rules say all that is allowed, and nothing beside them does."""
    path = config.policy_path()
    for name in ("allow_privileged", "allow_host_equivalent"):
        if path is not None and getattr(config, name):
            rule = name.removeprefix("allow_")
            raise InvalidArgument(f"{origin[name]}: {name}: there is a policy, {path}: write {rule} = true in a rule")


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None and not default_file().exists():
        return {}
    path = path or default_file()
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    except ValueError as error:  # no TOML, no UTF-8
        raise InvalidArgument(f"{path}: {error}") from error


def _explain(problem: Any, origin: Mapping[str, str]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    where = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{origin.get(name, 'configuration')}: {where}: {message}"


def _is_user() -> bool:
    """Return whether the containers of an unprivileged user are meant, who may be root of a user namespace by now."""
    return user_id() != 0


def _root(text: str) -> RuntimeRoot:
    name, equals, directory = text.rpartition("=")
    return RuntimeRoot(Path(directory).expanduser().absolute(), name if equals else None)
