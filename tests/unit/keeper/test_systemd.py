"""What the service manager passes and is told."""

import os

import pytest

from execgate.keeper.systemd import inherited


@pytest.mark.parametrize(
    ("variables"),
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "²", "LISTEN_PID": "me"},
     {"LISTEN_FDS": "-1", "LISTEN_PID": "me"},
     {"LISTEN_FDS": "", "LISTEN_PID": "me"}, {"LISTEN_FDS": "0", "LISTEN_PID": "me"}],
)  # fmt: skip
def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """And whatever was said is said to nobody else."""
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "LISTEN_FDNAMES": "x"}.items():
        monkeypatch.setenv(name, str(os.getpid()) if value == "me" else value)
    assert inherited(os.environ) == {}
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
