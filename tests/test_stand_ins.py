"""A stub of another shape than the function that it replaces fails."""

import pytest

from saelens_ext.cli.tour import tour
from saelens_ext.runner import runner
from saelens_ext.runner.checkpoints import Checkpoint
from tests.stand_ins import alike


def test_a_result_of_another_kind(monkeypatch, tmp_path):
    monkeypatch.setattr("saelens_ext.cli.tour.tour.run_demo", lambda output, max_tokens, say: output)
    with pytest.raises(AssertionError, match="The stub of run_demo gave .* which gives tuple"):
        tour.run_demo(tmp_path, 3, print)


def test_arguments_that_the_original_does_not_take(monkeypatch):
    monkeypatch.setattr(runner, "eval_windows", lambda *arguments, **options: None)
    assert runner.eval_windows(None, 0, 1, 1) is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        runner.eval_windows(None, 0, 1, 1, size=1)


def test_a_method_and_what_is_no_function(monkeypatch):
    monkeypatch.setattr(Checkpoint, "save", lambda self, folder: "a text")
    with pytest.raises(AssertionError, match=r"Checkpoint\.save gave 'a text'"):
        Checkpoint.save(None, None)
    monkeypatch.setattr(tour, "CONTEXT_SIZE", 7)
    assert tour.CONTEXT_SIZE == 7 and alike(len, None) is None
