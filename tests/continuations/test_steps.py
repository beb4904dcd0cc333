"""Sampling a chain of steps: tokens that add up, committed candidates, ends, and the same again after a kill."""

import json

import pytest
import torch

from saelens_ext.continuations import steps as steps_module
from saelens_ext.continuations.step_tree import StepTree
from saelens_ext.continuations.steps import sample_steps
from saelens_ext.steering.sampling import continuation_log_probs
from tests.models_zoo import make_model

PROMPT = "The assert statement"
OPTIONS = {
    "n_candidates": 6,
    "max_steps": 3,
    "delimiter": "e",
    "max_step_tokens": 12,
    "final": (),
    "temperature": 1.0,
    "seed": 3,
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "SAETransformerBridge")


@pytest.fixture(scope="module")
def tree(model):
    return sample_steps(model, PROMPT, **OPTIONS)


def same(first, second):
    assert first.committed == second.committed and first.ended_by == second.ended_by
    assert first.token_ids == second.token_ids and first.settings == second.settings
    for mine, other in zip(first.steps, second.steps, strict=True):
        assert mine.texts == other.texts and mine.prefix == other.prefix and mine.prompt == other.prompt
        assert torch.equal(mine.token_ids, other.token_ids) and torch.equal(mine.log_probs, other.log_probs)


def test_spans_add_up_to_the_tokens_exactly(tree, model):
    assert len(tree) == 3 and tree.ended_by == "max_steps"
    whole = tree.token_ids
    assert [token for low, high in tree.spans for token in whole[low:high]] == whole
    assert tree.spans[0] == (0, len(model.to_tokens(PROMPT)[0])) and tree.spans[-1][1] == len(whole)
    assert whole[: tree.spans[0][1]] == model.to_tokens(PROMPT)[0].tolist()
    for number, step in enumerate(tree.steps):
        low, high = tree.spans[number + 1]
        assert list(step.prefix_ids) == whole[:low] and step.ids_of(tree.committed[number]) == whole[low:high]
        assert step.prefix == PROMPT + "".join(tree.texts[:number])


def test_candidates_end_with_the_delimiter_and_are_scored_behind_the_steps(tree, model):
    for step in tree.steps:
        assert len(set(map(tuple, step.token_ids.tolist()))) == len(step)
        without = sum("e" not in text for text in step.texts)
        assert without <= step.metadata["sampling"]["ended_by"].get("eos", 0) and without < len(step)
        # The delimiter is in the last token, and in none before it.
        tokens = [model.tokenizer.decode(step.ids_of(row)[:-1]) for row in range(len(step))]
        assert not any("e" in text for text in tokens)
        ids = torch.tensor(step.prefix_ids)
        scores = continuation_log_probs(model, ids, [step.ids_of(row) for row in range(len(step))])
        for row, values in enumerate(scores):
            assert torch.allclose(values, step.log_probs[row, : len(values)], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("commit", ["mean_log_prob", "path", "random"])
def test_which_candidate_is_committed(model, commit):
    tree = sample_steps(model, PROMPT, **OPTIONS, commit=commit)
    scores = {"mean_log_prob": lambda s: s.mean_log_probs, "path": lambda s: s.total_log_probs}
    if commit in scores:
        assert list(tree.committed) == [int(scores[commit](step).argmax()) for step in tree.steps]
    else:
        others = [
            sample_steps(model, PROMPT, **OPTIONS | {"seed": seed}, commit=commit).committed for seed in (4, 5, 6)
        ]
        assert (
            len({tree.committed, *others}) > 1
            and same(tree, sample_steps(model, PROMPT, **OPTIONS, commit=commit)) is None
        )
    table = tree.to_dataframe()
    assert table.loc[table["committed"], "text"].tolist() == list(tree.texts)


def test_a_killed_run_goes_on_to_the_same_bits(tree, model, tmp_path, monkeypatch):
    kept = steps_module.Collected.draw
    calls = []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        kept(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(steps_module.Collected, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            sample_steps(model, PROMPT, **OPTIONS, folder=tmp_path)
    with pytest.raises(ValueError, match="are not finished; call sample_steps with the same folder"):
        StepTree.load(tmp_path)
    calls.clear()

    def counted(self, *args):
        calls.append(1)
        kept(self, *args)

    monkeypatch.setattr(steps_module.Collected, "draw", counted)
    same(tree, sample_steps(model, PROMPT, **OPTIONS, folder=tmp_path))
    assert len(calls) == 1, "the steps that were done are not sampled again"
    same(tree, sample_steps(model, PROMPT, **OPTIONS, folder=tmp_path))
    assert len(calls) == 1
    same(tree, StepTree.load(tmp_path))
    same(tree, StepTree.load(tree.save(tmp_path / "saved")))
    with pytest.raises(ValueError, match="holds steps with another max_steps: 3 there, 2 now"):
        sample_steps(model, PROMPT, **OPTIONS | {"max_steps": 2}, folder=tmp_path)
    with pytest.raises(ValueError, match="holds steps with another prompt_ids"):
        sample_steps(model, "Another", **OPTIONS, folder=tmp_path)


def test_a_final_marker_ends_the_chain(tree, model):
    marker = tree.texts[1].strip()[-1]
    ended = sample_steps(model, PROMPT, **OPTIONS | {"final": [tree.texts[1]]})
    assert ended.ended_by == "final" and ended.texts == tree.texts[:2] and marker


def test_what_is_refused(tree, model, tmp_path):
    said = r"No candidate of step 1 holds the delimiter '@@' or ends within max_step_tokens=1; the first reads '.+'"
    with pytest.raises(ValueError, match=said):
        sample_steps(model, PROMPT, **OPTIONS | {"delimiter": "@@", "max_step_tokens": 1})
    with pytest.raises(ValueError, match="context of 64"):
        sample_steps(model, PROMPT, **OPTIONS | {"max_step_tokens": 60})
    room = 64 - len(tree.prompt_ids)
    said = rf"Prompt and 1 steps have \d+ tokens and step 2 up to {room}; this model's context is 64. Set max_steps=1"
    with pytest.raises(ValueError, match=said):
        sample_steps(model, PROMPT, **OPTIONS | {"max_step_tokens": room})
    wrong = {"n_candidates": 0, "max_steps": 0, "commit": "best", "delimiter": "", "temperature": -1, "final": [""]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            sample_steps(model, PROMPT, **OPTIONS | {name: value})
    with pytest.raises(ValueError, match="The candidates of step 2 do not go on from the committed step 1"):
        StepTree(steps=(tree.steps[0], tree.steps[2]), committed=(0, 0), ended_by="eos", settings={})
    with pytest.raises(ValueError, match="got 0 and 0"):
        StepTree(steps=(), committed=(), ended_by="eos", settings={})
    folder = tree.save(tmp_path)
    content = json.loads((folder / "steps.json").read_text())
    (folder / "steps.json").write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(ValueError, match="99"):
        StepTree.load(folder)
