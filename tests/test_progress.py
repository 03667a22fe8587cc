"""The progress bar's rate is the work of this process."""

from rich.progress import Progress

from stdist.progress import Rate


def test_what_was_done_before_does_not_count() -> None:
    """A resumed command tells 1000 of 2000 at once, then does 30 in four seconds."""
    clock = [0.0]
    rate = Rate("cells")
    bar = Progress(rate, get_time=lambda: clock[0], disable=True)
    bar.add_task("forecast", total=None)
    (task,) = bar.tasks
    for clock[0], done in ((0.0, 1000), (2.0, 1010), (4.0, 1030)):
        bar.update(task.id, completed=done, total=2000)
        if done == 1000:
            assert rate.render(task).plain == ""
    assert rate.render(task).plain == "7.5 cells/s"
