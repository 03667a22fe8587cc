"""What commands have in common: where they print what, and ``--json``."""

import sys
from typing import Annotated, Any

import typer

from stdist.files import to_json

Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]


def log(line: str) -> None:
    """A line for people; standard output stays free for results."""
    print(line, file=sys.stderr, flush=True)


def finish(result: dict[str, Any], as_json: bool, line: str) -> None:
    print(to_json(result) if as_json else line, flush=True)
