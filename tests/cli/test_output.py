"""Tables on the terminal and in a pipe."""

import os

from saelens_ext.cli import output

ROWS = [
    {"name": "[bold]a", "n": 1234, "share": 0.123456, "why": "a long reason " * 6},
    {"name": "漢字", "n": None, "share": float("nan"), "why": ""},
]


def test_nothing_is_cut_or_read_as_markup_in_a_pipe():
    lines = output.table(ROWS).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["name", "[bold]a", "漢字"]
    assert lines[1].endswith("1,234  0.1235  " + ("a long reason " * 6).strip())
    assert lines[0].index("share") + len("share") == lines[1].index("0.1235") + len("0.1235")  # numbers to the right
    assert not output.table([])


def test_a_terminals_width_is_kept(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(output.sys, "__stdout__", Terminal())
    monkeypatch.setattr(output.shutil, "get_terminal_size", lambda: os.terminal_size((50, 20)))
    lines = output.table(ROWS).splitlines()
    assert max(map(len, lines)) <= 50 and len(lines) > 3
    assert " ".join(" ".join(lines).split()).count("reason") == 6
