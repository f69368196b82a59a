"""The keeper: the small parent process that outlives the service and holds what must not be lost with it."""
