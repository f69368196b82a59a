"""What each API says of containers, sessions and the host: pure functions from what is known to JSON objects."""
