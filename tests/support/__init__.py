"""Real parts for tests, the demo and the benchmark: containers, the service, its clients.

Nothing here imports pytest: `scripts/demo` and `tests/bench` build on the same modules.
"""
