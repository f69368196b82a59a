"""execgate: the Docker exec API for the OCI containers of a host."""

__version__ = "0.1.0"
