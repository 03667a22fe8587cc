"""The exceptions a user is meant to read: the command line prints their one line instead of a traceback."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do. Exit code 2."""


class DamageError(InputError):
    """A file is not as it was written: the message names it. Exit code 4."""


class DivergenceError(RuntimeError):
    """Training lost its way: the loss is no longer a finite number. Exit code 3."""


class ResourceError(RuntimeError):
    """The machine gave out: disk full, out of memory, a learner that no longer answers. Exit code 5."""


class SilentLearner(ResourceError):
    """Another learner no longer answers: it died or hangs, and this one has nothing to do with it."""


class Interrupted(RuntimeError):
    """Ctrl-C, after the step in hand was finished and saved. Exit code 130."""
