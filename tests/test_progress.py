"""The progress bar: what it draws on a terminal, and what it says elsewhere."""

import sys

from sd_jax.progress import Bar


def test_on_a_terminal_it_is_drawn_over_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Bar()
    bar(1, 3)
    bar(3, 3)
    assert capsys.readouterr().err == f"\r[{'#' * 10}{'.' * 20}] 1/3\r[{'#' * 30}] 3/3\n"


def test_elsewhere_it_says_a_line_for_each_tenth(capsys):
    for done in range(1, 51):
        Bar()(done, 50)
    assert capsys.readouterr().err.splitlines() == [f"step {i} of 50" for i in range(5, 51, 5)]


def test_nothing_is_said_of_what_is_soon_done(capsys):
    Bar("tensor", after=60)(1, 1)
    assert capsys.readouterr().err == ""
    Bar("tensor")(1, 1)
    assert capsys.readouterr().err == "tensor 1 of 1\n"
