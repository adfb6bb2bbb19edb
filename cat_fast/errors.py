"""The exception for unusable input, and one-line messages of other exceptions."""


class UserError(ValueError):
    """Unusable input; the message names the problem, the expected value and a remedy.

    The command line prints it on one line and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
