"""The words of execgate: ids, configurations, states, errors, events. Pure data; no I/O, no asyncio."""
