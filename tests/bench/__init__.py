"""The benchmark: this service, the bare runtime and the engines of the machine, side by side."""
