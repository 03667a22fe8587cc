"""Fixtures every room of the test suite shares."""

import os
import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background makes them, and all that they start, deaf to the Ctrl-C some send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def real_data() -> Path:
    """Folder of real data, never part of the project; the test skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("STDIST_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set STDIST_TEST_DATA to its folder")
    return path
