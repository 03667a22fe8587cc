"""An item of ``gpu.py``: the tests of one file that are marked ``gpu``, and their counts as one JSON object."""

import sys
from collections import Counter

import pytest

from stdist.files import to_json


class Outcomes:
    """Hears of every test: how many passed, failed, were skipped, which failed, and why others were skipped."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1


def main() -> None:
    outcomes = Outcomes()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", sys.argv[1]], plugins=[outcomes])
    counts = {name: outcomes.counts[name] for name in ("passed", "failed", "skipped")}
    print(to_json(counts | {"failures": outcomes.failed, "skipped_because": outcomes.reasons}))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
