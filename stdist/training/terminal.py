"""A stage on a terminal: its progress bar, and Ctrl-C as a request."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def loss_bar(name: str, total: int, done: int, hidden: bool) -> Iterator[Callable[[float], None]]:
    """A bar of ``total`` steps, ``done`` of them before; it moves with each call that is given a step's loss."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    # Standard output is for results.
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task(name, total=total, completed=done, loss=math.nan)
        yield lambda loss: progress.update(task, advance=1, loss=loss)


@contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that no step or checkpoint is cut in half; the second one kills."""
    pressed = False

    def remember(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread: the caller owns the signals
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
