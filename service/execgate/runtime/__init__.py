"""One exec'd process: the conmon driver, the process's streams, pidfds, and reads from a container's root."""
