"""Bytes to events and back: every protocol that execgate speaks, without a socket. No I/O, no asyncio."""
