"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Input that cannot be used: says what was wrong, what was expected and what to do.

    The command line prints it as one line and exits with code 2.
    """
