"""What goes wrong with the machine, as opposed to the thing under test."""


class HostError(Exception):
    """This host lacks something, or a program of it failed; the message says what to do."""
