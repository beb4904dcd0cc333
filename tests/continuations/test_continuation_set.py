"""The set of continuations: rows that stay aligned, weights that stay positive, files that come back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saelens_ext.continuations.continuation_set import ContinuationSet, pad_rows
from saelens_ext.continuations.source_table import SourceTable


@pytest.fixture
def three():
    log_probs = [[-1.0, -2.0], [-0.5], [-1.0, -1.0, -4.0]]
    return ContinuationSet(
        prompt="Say",
        prefix="Say",
        prefix_ids=(0, 9),
        token_ids=pad_rows([[5, 6], [7], [8, 9, 10]], -1, torch.int64),
        lengths=torch.tensor([2, 1, 3]),
        texts=(" a b", " c", " d e f"),
        log_probs=pad_rows(log_probs, 0.0, torch.float32),
        weights=torch.full((3,), 1 / 3, dtype=torch.float64),
        columns={"count": torch.tensor([1, 2, 1])},
        metadata={"seed": 0},
    )


def table(m):
    return SourceTable(("latent",) * m, ("h",) * m, tuple(range(m)), (3,) * m, (0.5,) * m, (" a",) * m, (0,) * m)


def full(three):
    return three.with_embeddings(np.eye(3, 4)).with_signatures(torch.arange(6.0).reshape(3, 2), table(2))


def test_views(three):
    assert len(three) == 3 and three.ids_of(0) == [5, 6]
    assert three.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert three.total_log_probs.tolist() == pytest.approx([-3, -0.5, -6])
    assert three.mean_log_probs.tolist() == pytest.approx([-1.5, -0.5, -2])


def test_named_weights(three):
    assert three.with_weights("uniform").weights.tolist() == pytest.approx([1 / 3] * 3)
    assert three.with_weights("frequency").weights.tolist() == pytest.approx([0.25, 0.5, 0.25])
    path = np.exp([-3, -0.5, -6])
    assert three.with_weights("path").weights.tolist() == pytest.approx(list(path / path.sum()))
    mean = np.exp([-1.5, -0.5, -2])
    assert three.with_weights("length_normalised").weights.tolist() == pytest.approx(list(mean / mean.sum()))
    assert three.with_weights([1, 1, 2]).weights.tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert three.effective_sample_size == pytest.approx(3)
    assert three.with_weights([1, 1, 2]).effective_sample_size == pytest.approx(16 / 6)


def test_improbable_paths_keep_a_positive_weight(three):
    far = replace(three, log_probs=three.log_probs * 1000)
    assert (far.with_weights("path").weights > 0).all()


@pytest.mark.parametrize("weights", [[1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, 1]])
def test_weights_that_are_none(three, weights):
    with pytest.raises(ValueError, match="weights must"):
        three.with_weights(weights)


def test_selection_keeps_rows_together(three):
    part = full(three.with_weights([1, 2, 5])).select([2, 0])
    assert part.texts == (" d e f", " a b") and part.ids_of(0) == [8, 9, 10]
    assert part.weights.tolist() == pytest.approx([5 / 6, 1 / 6])
    assert part.signatures.tolist() == [[4, 5], [0, 1]] and part.embeddings[0].tolist() == [0, 0, 1, 0]
    assert part.columns["count"].tolist() == [1, 1] and len(part.sources) == 2
    assert three.select(np.array([False, True, False])).texts == (" c",)
    for wrong in ([], [True, False]):
        with pytest.raises(ValueError):
            three.select(wrong)


def test_saving_and_loading(three, tmp_path):
    for given in (three, full(three)):
        back = ContinuationSet.load(given.save(tmp_path / "set"))
        for name in ("texts", "prefix_ids", "prompt", "sources", "metadata"):
            assert getattr(back, name) == getattr(given, name), name
        for name in ("token_ids", "lengths", "log_probs", "weights"):
            assert torch.equal(getattr(back, name), getattr(given, name)), name
        assert (back.signatures is None) == (given.signatures is None)
        assert back.columns["count"].tolist() == [1, 2, 1]
    (tmp_path / "set" / "continuations.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="upgrade"):
        ContinuationSet.load(tmp_path / "set")


def test_views_of_another_size(three):
    with pytest.raises(ValueError, match=r"\(3, d\)"):
        three.with_embeddings(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(3, d\)"):
        three.with_signatures(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="non-finite"):
        three.with_signatures(torch.full((3, 1), float("inf")))
    with pytest.raises(ValueError, match="describes 3 columns"):
        three.with_signatures(torch.zeros(3, 2), table(3))
    with pytest.raises(ValueError, match="views of as many"):
        replace(three, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no token"):
        replace(three, lengths=torch.tensor([1, 0, 2]))


def test_data_frames(three):
    frame = full(three).to_dataframe()
    assert list(frame.columns) == ["text", "n_tokens", "log_prob", "mean_log_prob", "weight", "count"]
    assert frame["log_prob"].tolist() == pytest.approx([-3, -0.5, -6])
    sources = table(2).to_dataframe()
    assert list(sources.columns) == ["kind", "hook", "position", "latent", "activation", "token", "dictionary"]


def test_source_tables_are_whole():
    with pytest.raises(ValueError, match="one entry per source"):
        SourceTable(("latent",), (), (), (), (), (), ())
    assert SourceTable.joined([table(1), table(2)]).positions == (0, 0, 1)
