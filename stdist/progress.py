"""A progress bar on a terminal's standard error: standard output is for results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.text import Text

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


class Rate(ProgressColumn):
    """Units done lately in a second. The first call does not count: it tells what a resumed command had already."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {self.unit}/s" if task.speed else "")


@contextmanager
def progress_bar(name: str, unit: str | None = None) -> Iterator[Progress]:
    """``unit``: of what is counted; with it the bar shows numbers and a rate too."""
    console = Console(stderr=True)
    more = (MofNCompleteColumn(), Rate(unit)) if unit else ()
    with Bar(
        *Bar.get_default_columns(), *more, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
