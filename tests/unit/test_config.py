"""The configuration: which source wins, and what is said when something is wrong."""

from pathlib import Path

import pytest

from execgate import config as config_module
from execgate.config import Config, load
from execgate.http.listeners import Address
from execgate.model.errors import InvalidArgument


def write(path: Path, text: str) -> dict[str, object]:
    file = path / "execgate.toml"
    file.write_text(text)
    return {"config": str(file)}


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    flags = write(tmp_path, 'log_level = "error"\nlog_format = "json"\nevent_loop = "asyncio"\n')
    environ = {"EXECGATE_LOG_LEVEL": "warning", "EXECGATE_LOG_FORMAT": "text"}
    config = load({**flags, "log_level": "debug"}, environ)
    assert (config.log_level, config.log_format, config.event_loop) == ("debug", "text", "asyncio")
    assert config.max_sessions == Config().max_sessions


def test_a_flag_that_was_not_given_says_nothing(tmp_path: Path) -> None:
    assert load({"log_level": None, "config": None}, {"EXECGATE_LOG_LEVEL": "error"}).log_level == "error"


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    flags = write(tmp_path, "drain_seconds = 7\n")
    assert load({}, {"EXECGATE_CONFIG": str(flags["config"])}).drain_seconds == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("log_level = 'loud'", "log_level"),
        ("nonsense = 1", "nonsense"),
        ("start_timeout_seconds = 0", "start_timeout_seconds"),
        ("start_timeout_seconds = -1", "start_timeout_seconds"),
        ("start_timeout_seconds = nan", "start_timeout_seconds"),
        ("start_timeout_seconds = inf", "start_timeout_seconds"),
        ("max_sessions = 0", "max_sessions"),
        ("max_sessions = 1.5", "max_sessions"),
        ("socket_mode = '0888'", "socket_mode"),
        ("socket_mode = '4777'", "socket_mode"),
        ("listen = ['ftp://x']", "expected unix:///PATH"),
        ("listen = ['tcp://0.0.0.0:2375']", "only loopback"),
        ("listen = ['unix://']", "expected"),
        ("listen = 5", "listen"),
        ("runtimes = ['runc']", "NAME=PATH"),
        ("audit_max_bytes = -1", "audit_max_bytes"),
        ("audit_keep = 0", "audit_keep"),
        ("audit_strict = 'maybe'", "audit_strict"),
        ("state_dir = '/" + "x" * 200 + "'", "state_dir"),
    ],
)
def test_mistakes_are_named_with_their_source(tmp_path: Path, text: str, said: str) -> None:
    flags = write(tmp_path, text)
    with pytest.raises(InvalidArgument) as failure:
        load(flags, {})
    assert said in failure.value.message
    assert str(flags["config"]) in failure.value.message


def test_every_mistake_is_named_at_once() -> None:
    environ = {"EXECGATE_LOG_LEVEL": "loud", "EXECGATE_MAX_SESSIONS": "many"}
    with pytest.raises(InvalidArgument) as failure:
        load({"event_loop": "fast"}, environ)
    lines = failure.value.message.splitlines()
    assert len(lines) == 3
    assert {line.partition(":")[0] for line in lines} == {"environment", "command line"}


@pytest.mark.parametrize("content", [b"listen = [", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "execgate.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"execgate\.toml"):
        load({"config": str(file)}, {})


@pytest.mark.parametrize("name", ["nowhere.toml", "."])
def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=str(tmp_path)):
        load({"config": str(tmp_path / name)}, {})


def test_lists_and_tables_from_one_variable() -> None:
    config = load(
        {},
        {
            "EXECGATE_LISTEN": "unix:///run/a.sock, tcp://127.0.0.1:2375",
            "EXECGATE_RUNTIMES": "runc=/opt/runc crun=/opt/crun",
            "EXECGATE_RUNTIME_ROOTS": "runc=/a /b",
        },
    )
    assert config.addresses == [Address(path=Path("/run/a.sock")), Address(host="127.0.0.1", port=2375)]
    assert config.runtimes == {"runc": Path("/opt/runc"), "crun": Path("/opt/crun")}
    assert [(root.runtime_name, root.dir) for root in config.roots()] == [("runc", Path("/a")), (None, Path("/b"))]
    assert config.runtime_paths()["runc"] == Path("/opt/runc")


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load({"state_dir": "here"}, {}).state_dir == Path("/tmp/here")
    assert load({"state_dir": "~/there"}, {}).state_dir == Path("/home/somebody/there")


def test_an_empty_variable_is_a_mistake_and_not_a_default() -> None:
    with pytest.raises(InvalidArgument, match="environment: log_level"):
        load({}, {"EXECGATE_LOG_LEVEL": ""})


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of an administrator are, and nothing is yet."""
    monkeypatch.setattr(config_module, "config_dir", lambda: tmp_path)
    return tmp_path


def test_the_policy_is_the_one_that_is_named_else_the_default_one_if_it_is_there(etc: Path) -> None:
    assert load({}, {}).policy_path() is None
    (etc / "policy.toml").symlink_to("nowhere")  # it must be read, and that must fail
    assert load({}, {}).policy_path() == etc / "policy.toml"
    assert load({}, {"EXECGATE_POLICY": "/a"}).policy_path() == Path("/a")
    assert load({"policy": "/b"}, {"EXECGATE_POLICY": "/a"}).policy_path() == Path("/b")


def test_without_a_policy_power_is_given_by_a_word_and_only_by_one() -> None:
    assert (Config().allow_privileged, Config().allow_host_equivalent) == (False, False)
    assert load({}, {"EXECGATE_ALLOW_PRIVILEGED": "true"}).allow_privileged
    with pytest.raises(InvalidArgument, match="environment: allow_host_equivalent"):
        load({}, {"EXECGATE_ALLOW_HOST_EQUIVALENT": "perhaps"})


@pytest.mark.parametrize("name", ["privileged", "host_equivalent"])
def test_with_a_policy_its_rules_say_everything(etc: Path, name: str) -> None:
    flags = write(etc, f"allow_{name} = true\n")
    assert getattr(load(flags, {}), f"allow_{name}")
    with pytest.raises(
        InvalidArgument, match=rf"file {flags['config']}: allow_{name}: there is a policy, /p: write {name} ="
    ):
        load(flags, {"EXECGATE_POLICY": "/p"})
    (etc / "policy.toml").touch()
    with pytest.raises(InvalidArgument, match=rf"there is a policy, {etc}/policy\.toml"):
        load(flags, {})
    assert not getattr(load(flags, {f"EXECGATE_ALLOW_{name.upper()}": "false"}), f"allow_{name}")


def test_an_audit_log_is_what_is_asked_for(tmp_path: Path) -> None:
    assert not load({}, {}).audit().enabled
    assert not load({}, {"EXECGATE_AUDIT_FILE": ""}).audit().enabled
    assert load({}, {"EXECGATE_AUDIT_STDOUT": "true"}).audit().enabled
    flags = write(tmp_path, 'audit_file = "/var/log/execgate/audit.log"\naudit_strict = true\n')
    settings = load({**flags, "state_dir": "/run/x"}, {"EXECGATE_AUDIT_KEEP": "3"}).audit()
    assert (settings.path, settings.anchor) == (Path("/var/log/execgate/audit.log"), Path("/run/x/audit"))
    assert (settings.strict, settings.sync, settings.keep) == (True, False, 3)
