"""The one exception a user is meant to read, and other exceptions on one line."""


class UserError(ValueError):
    """Input that cannot be used: says what was wrong, what was expected and what to do.

    The command line prints it as one line and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
