"""The one exception that a user is meant to read."""


class NecoError(Exception):
    """Something the user can put right: says what was wrong, its value, where it came from and what to do.

    `python -m neco` prints the message without a traceback and exits with code 2.
    """
