"""What holds for every test."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own SIGINT handler, which a test run that a shell put into the background lacks.

    Programs that tests start inherit it as "not ignored".
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
