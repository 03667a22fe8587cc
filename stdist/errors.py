"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do.

    The command line prints it as ``error: …`` and exits with code 2; everything else is a bug and keeps its traceback.
    """
