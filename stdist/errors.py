"""The exceptions a user is meant to read, and what the operating system's own say: one line instead of a traceback."""

import errno
import os
import re


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do. Exit code 2."""


class DamageError(InputError):
    """A file is not as it was written: the message names it. Exit code 4."""


class DivergenceError(RuntimeError):
    """Training lost its way: the loss is no longer a finite number. Exit code 3."""


class ResourceError(RuntimeError):
    """The machine gave out: disk full, out of memory, a learner that no longer answers. Exit code 5."""


class MemoryFullError(ResourceError):
    """A device or the machine has no memory left for what was asked."""


class SilentLearner(ResourceError):
    """Another learner no longer answers: it died or hangs, and this one has nothing to do with it."""


class Interrupted(RuntimeError):
    """Ctrl-C, after the step in hand was finished and saved. Exit code 130."""


_PATHS = {
    errno.ENOENT: "does not exist; correct the path",
    errno.EACCES: "permission denied; change its permissions, or give another path",
    errno.EPERM: "permission denied; change its permissions, or give another path",
    errno.EROFS: "the file system is read-only; give a path on another",
    errno.EISDIR: "a folder where a file is needed; give another path",
    errno.ENOTDIR: "a part of the path is a file and no folder; correct it",
    errno.EEXIST: "a file is there already; remove it, or give another path",
    errno.ENOTEMPTY: "there already; remove it, or give another path",
    errno.ENAMETOOLONG: "the name is too long for the file system; give a shorter one",
    errno.ELOOP: "a symbolic link that leads back to itself; give another path",
    errno.EINVAL: "the file system takes no such path; give another",
}
"""The system's refusals of a path by number: what is wrong with it, and what to do."""
_MACHINE = {
    errno.ENOSPC: "no space is left; free some",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file would be larger than is allowed here; see `ulimit -f`, or write to another file system",
    errno.EMFILE: "too many files are open in this process; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close other programs",
    errno.ENOMEM: "out of memory; see `ulimit -v`, close other programs, or make the work smaller",
    errno.EAGAIN: "no thread or process can be started; see `ulimit -u` and `ulimit -v`",
}
_OUT_OF_MEMORY = ("can't allocate memory", "annot allocate memory", "failed to map segment", "out of memory")
_NUMBERED = re.compile(r"\(os error (\d+)\)|\bcode: (\d+), kind:")
"""Libraries in Rust put the system's number into a text."""


def of_the_system(error: BaseException) -> InputError | ResourceError | None:
    """Returns a refusal of the operating system, of a path or for want of room, memory, files or threads, as an error
    of one line; None for every other error."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError | OSError) and any(sign in text for sign in _OUT_OF_MEMORY)
    ):
        return ResourceError(_MACHINE[errno.ENOMEM] + (f" ({text})" if text else ""))
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return ResourceError(_MACHINE[errno.EAGAIN])
    number = error.errno if isinstance(error, OSError) else None
    path = os.fsdecode(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str | bytes) else ""
    if number is None and (said := _NUMBERED.search(text)):
        number, path = int(said[1] or said[2]), text[: said.start()].strip(" :(")
    if number is None:
        return ResourceError(text or type(error).__name__) if isinstance(error, OSError) else None
    if number in _PATHS:
        return InputError(f"{path}: {_PATHS[number]}" if path else text)
    what = _MACHINE.get(number, f"{os.strerror(number)}; see that the disk, the network and this machine are well")
    return ResourceError(f"{path}: {what}" if path else what)


def is_damage(error: BaseException) -> bool:
    """False where reading a file failed for a reason outside it: a permission, no memory, too many open files."""
    numbers = (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.EINVAL)
    return not isinstance(error, OSError) or (error.errno in numbers and not isinstance(error, TimeoutError))
