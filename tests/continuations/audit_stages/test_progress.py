"""How far an audit is, and how long it still takes, goes by the time that its stages were seen to take."""

import pytest

from saelens_ext.audit.audit import audit_continuations
from saelens_ext.continuations.audit_stages.progress import STAGES, AuditBar
from tests.continuations._dictionaries import make

SECONDS = {"sampling": 2, "embedding": 1, "attributing": 3, "clustering": 2, "testing by steering": 12}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_guess_before_anything_is_known_and_what_was_measured_afterwards():
    clock = Clock()
    with AuditBar(3, show=False, clock=clock) as bar:
        guessed, measured = [], []
        for found in (guessed, measured):
            for stage in STAGES:
                bar.begin(stage)
                found.append(bar.n)
                clock.now += SECONDS[stage]
            bar.end_prompt()
        assert guessed == pytest.approx([0, 0.2, 0.25, 0.45, 0.55])
        assert measured == pytest.approx([1, 1.1, 1.15, 1.3, 1.4]) and bar.n == 2
        # A prompt whose first stages were in the folder.
        bar.begin("testing by steering")
        assert bar.n == pytest.approx(2.4)


def test_a_prompt_that_fails_counts_as_done_and_its_stages_as_what_they_took():
    clock = Clock()
    with AuditBar(2, show=False, clock=clock) as bar:
        bar.begin("sampling")
        clock.now += 5
        bar.end_prompt()
        assert bar.n == 1 and bar.weights == STAGES
    assert sum(STAGES.values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_whole_audit_shows_one_bar_with_its_prompts_stages_and_time_left(tiny_bridge, capsys):
    prompts = ["The assert statement", "It is used"]
    options = {"n": 8, "max_new_tokens": 3, "betas": (1.0,), "gammas": (0.5,), "n_clusters": (1, 8), "n_resamples": 2}
    sae = make("standard", "blocks.1.hook_mlp_out")
    audit_continuations(tiny_bridge, prompts, [sae], backend="gradient", validate=False, progress=True, **options)
    shown = capsys.readouterr().err
    for words in ("audit, prompt 1 of 2, sampling:", "audit, prompt 2 of 2, clustering:", "so far, about", "100%"):
        assert words in shown
    capsys.readouterr()
    audit_continuations(tiny_bridge, prompts[:1], [sae], backend="gradient", validate=False, **options)
    assert "audit" not in capsys.readouterr().err
