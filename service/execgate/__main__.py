"""The program: `execgate`, and `python -m execgate`.

`execgate serve` is two processes, and this one becomes the small one: it imports nothing of the service, but runs the
same command line once more as a worker, which finds the way to its keeper in the environment.
"""

import gc
import os
import sys


def main() -> int:
    """Run the command line; return its exit code."""
    from execgate.keeper.protocol import ENVIRONMENT  # noqa: PLC0415  (the imports are what this module is about)

    if sys.argv[1:2] == ["serve"] and ENVIRONMENT not in os.environ:
        from execgate.keeper.keeper import run  # noqa: PLC0415

        return run([sys.executable, "-m", "execgate", *sys.argv[1:]])
    gc.disable()  # until everything is imported, which is most of what a short command does
    from execgate.cli import main as command_line  # noqa: PLC0415

    gc.enable()
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
