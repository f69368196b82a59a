"""From a container's bundle to the process of an exec: users, capabilities, process.json. Pure; no I/O."""
