"""The commands' way out: results on standard output, lines for people on standard error, and whatever stops a command
as one line that says what, where and what to do, with an exit code."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from stdist.errors import (
    DamageError,
    DivergenceError,
    InputError,
    Interrupted,
    ResourceError,
    of_the_system,
)
from stdist.files import to_json

Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
LONGEST = 1000
"""Characters of a line; of a longer one its middle is left out, since what to do stands at the end."""
CODES = ((DamageError, 4), (InputError, 2), (DivergenceError, 3), (ResourceError, 5), (Interrupted, 130))


def log(line: str) -> None:
    """Prints a line for people; standard output stays free for results."""
    print(line, file=sys.stderr, flush=True)


def finish(result: dict[str, Any], as_json: bool, line: str) -> None:
    """Prints a command's result: all of it as JSON, or ``line``."""
    print(to_json(result) if as_json else line, flush=True)


def ended(command: Callable[[], int | None], say: Callable[[str], None]) -> int:
    """Calls ``command`` and returns its exit code. An error that a user is meant to read is said in one line; any other
    one is a bug, and raised."""
    try:
        return command() or 0
    except typer.TyperException as error:
        problem: Exception = _wrong_usage(error)
    except tuple(kind for kind, _ in CODES) as error:
        problem = error
    except Exception as error:
        said = of_the_system(error)
        if said is None:
            raise
        problem = said
    say(f"{'interrupted' if isinstance(problem, Interrupted) else 'error'}: {one_line(str(problem))}")
    return next(code for kind, code in CODES if isinstance(problem, kind))


def one_line(text: str) -> str:
    """``text`` without what a terminal would obey, no longer than ``LONGEST``."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}"


def _wrong_usage(error: typer.TyperException) -> InputError:
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip().rstrip(".")
    return InputError(f"{message}; see `{context.command_path} --help`" if context else message)
