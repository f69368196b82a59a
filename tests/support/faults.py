"""Runtimes that misbehave: scripts around a real one."""

import shlex
from dataclasses import replace
from pathlib import Path

from support.runtimes import RuntimeHost


def faulty_runtime(host: RuntimeHost, directory: Path, name: str, on_exec: str) -> RuntimeHost:
    """Return `host` with a program that runs the shell text `on_exec` in place of `exec`, and is itself otherwise.

    In `on_exec`, `"$REAL" "$@"` is what was asked for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / name
    script.write_text(
        "#!/bin/sh\n"
        f"REAL={shlex.quote(str(host.program))}\n"
        'case " $* " in\n'
        f"*' exec '*)\n{on_exec}\n;;\n"
        '*) exec "$REAL" "$@" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return replace(host, program=script)
