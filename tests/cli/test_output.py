"""Tables on the terminal and in a pipe."""

import csv
import os

import pandas as pd

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


def test_any_text_survives_a_csv_file(tmp_path):
    texts = ["a\rb", "a\nb", 'a"b', "a\\b", "a,b", "", "\x0b\u2028", "漢字"]
    texts_and_worse = pd.Series([*texts, "a\0b", "a\ud800b", None], dtype=object)
    table = pd.DataFrame({"text": texts_and_worse, "n": range(len(texts) + 3)})
    output.write_csv(table, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["text", *texts, "a\ufffdb", "a\ufffdb", ""]
    assert pd.read_csv(tmp_path / "t.csv", keep_default_na=False)["n"].tolist() == table["n"].tolist()
