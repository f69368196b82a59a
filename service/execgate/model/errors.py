"""The categories of failure.

Code below the HTTP layer raises a category; `http.errors` maps each to a status once, for every dialect.
`message` is for the user who sent the request, in the words Docker uses where Docker has words; `hint` is for
the operator, goes to the log, and may name host paths. Foreign exceptions (OSError, sqlite3.Error,
ValidationError) are translated at the edge of the adapter that met them, with the cause chained.
"""


class ExecgateError(Exception):
    """The root of every error that this project raises on purpose."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidArgument(ExecgateError):
    """The request itself is wrong; sent again it will be wrong again."""


class Unauthenticated(ExecgateError):
    """Nobody knows who asks."""


class Forbidden(ExecgateError):
    """It is known who asks, and what is asked of, and no rule permits it."""


class NotFound(ExecgateError):
    """No such container, session or page."""


class Conflict(ExecgateError):
    """The thing exists, and its present state does not allow this."""


class TooLarge(ExecgateError):
    """A body, a header or a field is larger than its bound."""


class Exhausted(ExecgateError):
    """A configured cap is reached; the caller may try again in about `retry_after` seconds."""

    def __init__(self, message: str, *, hint: str = "", retry_after: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Unavailable(ExecgateError):
    """The host cannot serve this now: no memory, no descriptors, no space, no processes."""


class Internal(ExecgateError):
    """Something that should not happen did, and is not the caller's fault."""


class StartFailed(ExecgateError):
    """The runtime could not start the process.

    `exit_code` is 126, 127 or 128 by the rule of `runtime.failures`.
    """

    def __init__(self, message: str, exit_code: int, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
