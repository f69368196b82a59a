"""The command line: `execgate serve`, and everything that asks a service, or looks at what it keeps."""

from execgate.cli.command_line import EXIT_FAILURE, EXIT_USAGE, main

__all__ = ["EXIT_FAILURE", "EXIT_USAGE", "main"]
