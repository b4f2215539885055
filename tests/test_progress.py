"""The progress bar: shown on a terminal, silent elsewhere."""

import io

from cuda_int4.progress import progress


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def run(monkeypatch, stderr: io.StringIO) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    with progress("quantising to int4", 8) as advance:
        for _ in range(4):
            advance(2)
    return stderr.getvalue()


def test_a_terminal_sees_the_description_and_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = run(monkeypatch, Terminal())
    assert "quantising to int4" in shown and "100%" in shown


def test_a_file_gets_nothing(monkeypatch):
    assert run(monkeypatch, io.StringIO()) == ""
