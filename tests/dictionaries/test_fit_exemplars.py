"""Fitting: one pass, batch-independent, and the reasons to stop."""

import re

import pytest
import torch
from sae_lens import SAE

from saelens_ext import (
    ActivationStream,
    ExemplarFitResult,
    ExemplarPartition,
    LeaderClustering,
    fit_exemplar_partition,
    fit_exemplar_partitions,
    retarget,
)

HOOK = "blocks.1.hook_out"


@pytest.fixture
def stream(tiny_bridge, tiny_texts) -> ActivationStream:
    return ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=4, max_tokens=700)


def all_activations(stream: ActivationStream) -> torch.Tensor:
    return torch.cat([next(iter(batch.activations.values())) for batch in stream])


@pytest.mark.slow
def test_the_exemplars_are_activations_of_the_stream(stream):
    result = fit_exemplar_partition(stream, percentile=10)
    x = all_activations(stream)
    assert isinstance(result, ExemplarFitResult) and isinstance(result.dictionary, ExemplarPartition)
    offset = x[result.exemplar_indices] - result.dictionary.center
    assert torch.allclose(result.dictionary.exemplars, torch.nn.functional.normalize(offset, dim=1), atol=1e-6)
    assert result.n_seen == len(x) == 700
    assert int(result.counts.sum()) == 700
    assert result.stopped_because == "end_of_stream"
    assert 1 < result.n_regions < 700


@pytest.mark.slow
def test_exemplars_are_fixed_points_of_encode_and_decode(stream):
    result = fit_exemplar_partition(stream, percentile=10)
    founders = all_activations(stream)[result.exemplar_indices]
    assert torch.allclose(result.dictionary(founders), founders, atol=1e-4 * result.typical_norm)
    assert torch.equal(result.dictionary.assign(founders).regions, torch.arange(result.n_regions))


def test_provenance_names_the_token_of_each_exemplar(stream):
    result = fit_exemplar_partition(stream, percentile=10)
    batches = list(stream)
    for name in ("token_ids", "document_ids", "sequence_ids", "positions"):
        expected = torch.cat([getattr(batch, name) for batch in batches])[result.exemplar_indices]
        assert torch.equal(getattr(result.provenance, name), expected), name
    rows = torch.arange(result.n_regions)
    assert torch.equal(result.provenance.windows[rows, result.provenance.positions], result.provenance.token_ids)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_streams_batch_size(tiny_bridge, tiny_texts):
    def fit(batch_size, stop):
        stream = ActivationStream(
            tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=batch_size, max_tokens=3000
        )
        return fit_exemplar_partition(
            stream, percentile=20, calibration_activations=400, stop=stop, unseen_mass_tolerance=0.05
        )

    for stop in ("budget", "unseen_mass"):
        # Forward passes of another shape round differently, so a comparison that hangs on the last bit may fall
        # otherwise.
        small, large = fit(2, stop), fit(7, stop)
        assert small.n_seen == large.n_seen
        assert small.threshold.threshold == pytest.approx(large.threshold.threshold, abs=1e-4)
        assert abs(small.n_regions - large.n_regions) <= 0.02 * large.n_regions


@pytest.mark.slow
def test_many_dictionaries_from_one_pass_equal_each_alone(tiny_bridge, tiny_texts, monkeypatch):
    hooks = ["blocks.0.hook_out", HOOK]
    stream = ActivationStream(tiny_bridge, tiny_texts, hooks, context_size=16, batch_size=4, max_tokens=700)
    passes = []
    original = ActivationStream.__iter__
    monkeypatch.setattr(ActivationStream, "__iter__", lambda self: passes.append(1) or original(self))
    together = fit_exemplar_partitions(stream, percentiles=(4, 10))
    assert len(passes) == 1
    assert list(together) == [(hook, percentile) for hook in hooks for percentile in (4, 10)]
    for (hook, percentile), result in together.items():
        alone = fit_exemplar_partition(
            ActivationStream(tiny_bridge, tiny_texts, hook, context_size=16, batch_size=4, max_tokens=700),
            percentile=percentile,
        )
        assert torch.equal(alone.exemplar_indices, result.exemplar_indices)
        assert torch.equal(alone.counts, result.counts)
        assert result.percentile == percentile and result.dictionary.cfg.percentile == percentile
        assert result.dictionary.cfg.metadata.hook_name == hook
    assert together[HOOK, 4].n_regions > together[HOOK, 10].n_regions


def test_a_given_threshold(stream):
    result = fit_exemplar_partition(stream, threshold=0.5)
    assert result.dictionary.cfg.threshold == 0.5 and result.percentile is None
    exemplars = result.dictionary.exemplars.detach()
    distances = 1 - exemplars @ exemplars.T
    assert float(distances.fill_diagonal_(2).min()) > 0.5 - 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"percentile": 10}, {"threshold": 0.5}, {"percentile": 20, "stop": "unseen_mass"}])
def test_a_matrix_gives_what_its_stream_gives(stream, options):
    x, batches = all_activations(stream), list(stream)
    documents = torch.cat([batch.document_ids for batch in batches])
    streamed = fit_exemplar_partition(stream, **options)
    held = fit_exemplar_partition(x, document_ids=documents, hook_name=HOOK, **options)
    for name in ("exemplar_indices", "counts", "coherence"):
        assert torch.equal(getattr(held, name), getattr(streamed, name)), name
    assert torch.equal(held.dictionary.exemplars, streamed.dictionary.exemplars)
    assert torch.equal(held.dictionary.center, streamed.dictionary.center)
    assert held.threshold == streamed.threshold and held.stopped_because == streamed.stopped_because
    assert torch.equal(held.provenance.document_ids, streamed.provenance.document_ids)
    assert torch.equal(held.provenance.sequence_ids, held.exemplar_indices)
    assert held.hook_name == held.dictionary.cfg.metadata.hook_name == HOOK


@pytest.mark.slow
def test_each_row_of_a_matrix_is_a_document_unless_said_otherwise(stream, tmp_path):
    x = all_activations(stream)
    fit = fit_exemplar_partition(x)
    expected = fit_exemplar_partition(x, document_ids=torch.arange(len(x)))
    assert torch.equal(fit.dictionary.W_dec, expected.dictionary.W_dec) and fit.threshold == expected.threshold
    assert (fit.provenance.token_ids == -1).all() and fit.hook_name == ""
    again = ExemplarFitResult.load(fit.save(tmp_path))
    assert torch.equal(again.dictionary.W_dec, fit.dictionary.W_dec) and not again.dictionary.cfg.metadata.hook_name


@pytest.mark.slow
def test_another_fits_centre_and_threshold_are_used_as_they_are(tiny_bridge, tiny_texts, stream):
    first = fit_exemplar_partition(stream, percentile=10)
    halves = [ActivationStream(tiny_bridge, texts, HOOK, context_size=16) for texts in (tiny_texts[:6], tiny_texts[6:])]
    for source in (*halves, all_activations(stream)[200:]):
        fit = fit_exemplar_partition(source, calibration=first, basis="mean")
        assert torch.equal(fit.dictionary.center, first.dictionary.center) and fit.threshold == first.threshold
        assert fit.percentile == first.percentile and fit.typical_norm == first.typical_norm
        assert fit.dictionary.cfg.metadata.calibration == "given" and fit.dictionary.cfg.basis == "mean"
        x = source if isinstance(source, torch.Tensor) else all_activations(source)
        clustering = LeaderClustering(first.dictionary.center, first.threshold.threshold)
        clustering.partial_fit(x)
        assert torch.equal(fit.exemplar_indices, clustering.exemplar_indices)
    # A threshold alone is of no use here: the centre is another.
    recalibrated = fit_exemplar_partition(halves[1], threshold=first.threshold.threshold)
    assert not torch.equal(recalibrated.dictionary.center, first.dictionary.center)
    assert torch.equal(fit_exemplar_partition(stream, calibration=first).dictionary.W_dec, first.dictionary.W_dec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, fit: {"source": x[:, :5], "calibration": fit}, "of 32 numbers per activation, got 5"),
        (lambda x, fit: {"source": x, "calibration": fit, "threshold": 0.5}, "leave out threshold"),
        (lambda x, fit: {"source": x, "document_ids": torch.zeros(3, dtype=torch.int64)}, "700 integers"),
        (lambda x, fit: {"source": x, "document_ids": -torch.ones(len(x), dtype=torch.int64)}, "at least 0"),
        (lambda x, fit: {"source": x.long()}, "must be floating point"),
        (lambda x, fit: {"source": x, "document_ids": torch.zeros(len(x), dtype=torch.int64)}, "document"),
        (lambda x, fit: {"source": x / 0}, "non-finite"),
    ],
)
def test_matrices_and_calibrations_that_do_not_fit(stream, change, message):
    x = all_activations(stream)
    with pytest.raises(ValueError, match=message):
        fit_exemplar_partition(**change(x, fit_exemplar_partition(x)))


def test_what_is_for_a_matrix_is_refused_beside_a_stream(stream):
    for options in ({"document_ids": torch.arange(3)}, {"hook_name": HOOK}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is for a matrix"):
            fit_exemplar_partition(stream, **options)


def test_stop_when_little_mass_is_unseen(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=16, max_tokens=6000)
    result = fit_exemplar_partition(stream, threshold=0.9, stop="unseen_mass", unseen_mass_tolerance=0.02)
    assert result.stopped_because == "unseen_mass"
    assert result.n_seen % 1024 == 0 and result.n_seen < 6000
    assert result.unseen_mass <= result.unseen_mass_upper <= 0.02


def test_the_papers_stop(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=4, max_tokens=6000)
    result = fit_exemplar_partition(stream, threshold=0.9, stop="paper", calibration="within_batch")
    assert result.stopped_because == "paper"
    ends = torch.tensor([len(batch) for batch in stream]).cumsum(0)
    assert result.n_seen in ends
    last_batch = ends[ends < result.n_seen].max() if result.n_seen > ends[0] else 0
    assert int(result.exemplar_indices.max()) < last_batch


def test_metrics_are_reported_for_each_dictionary(stream):
    seen = []
    fit_exemplar_partitions(stream, (4, 10), on_metrics=lambda key, step, figures: seen.append((key, step, figures)))
    assert {key for key, _, _ in seen} == {(HOOK, 4), (HOOK, 10)}
    assert seen[-1][1] == 700 == seen[-1][2]["details/n_training_samples"]


def test_metadata_lets_the_host_rebuild_the_activations(stream, tmp_path):
    result = fit_exemplar_partition(stream)
    result.dictionary.save_model(tmp_path)
    metadata = SAE.load_from_disk(tmp_path).cfg.metadata
    assert metadata.hook_name == HOOK and metadata.context_size == 16 and metadata.prepend_bos is True
    assert metadata.model_class_name == "SAETransformerBridge"
    assert metadata.typical_norm == pytest.approx(result.typical_norm)


def test_save_and_load(stream, tmp_path):
    result = fit_exemplar_partition(stream)
    loaded = ExemplarFitResult.load(result.save(tmp_path))
    for name in (
        "hook_name",
        "percentile",
        "threshold",
        "stopped_because",
        "n_seen",
        "unseen_mass",
        "typical_norm",
        "n_undirected",
    ):
        assert getattr(loaded, name) == getattr(result, name), name
    for name in ("counts", "coherence", "exemplar_indices"):
        assert torch.equal(getattr(loaded, name), getattr(result, name)), name
    for name in ("windows", "token_ids", "positions", "document_ids", "sequence_ids"):
        assert torch.equal(getattr(loaded.provenance, name), getattr(result.provenance, name)), name
    x = all_activations(stream)
    assert torch.equal(loaded.dictionary.assign(x).regions, result.dictionary.assign(x).regions)


@pytest.mark.slow
def test_a_fit_of_another_dictionary_is_refused(stream, tmp_path):
    fit_exemplar_partition(stream, percentile=10).save(tmp_path)
    fit_exemplar_partition(stream, percentile=4).dictionary.save_model(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        ExemplarFitResult.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", [0, 1, 2, 3])
def test_a_save_interrupted_at_any_file_leaves_the_previous_fit(stream, tmp_path, monkeypatch, file):
    first = fit_exemplar_partition(stream, percentile=10)
    first.save(tmp_path)
    second = fit_exemplar_partition(stream, percentile=4)
    syncs = iter(range(4))

    def interrupted(descriptor):
        if next(syncs) == file:
            raise KeyboardInterrupt

    monkeypatch.setattr("saelens_ext._files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.save(tmp_path)
    assert torch.equal(ExemplarFitResult.load(tmp_path).exemplar_indices, first.exemplar_indices)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("host", ["tiny_hooked", "tiny_bridge"])
def test_a_dictionary_of_attention_heads_can_be_attached_to_either_class(
    host, tiny_hooked, tiny_bridge, tiny_texts, request
):
    built_on = request.getfixturevalue(host)
    stream = ActivationStream(built_on, tiny_texts, "blocks.1.attn.hook_z", context_size=16, max_tokens=300)
    dictionary = fit_exemplar_partition(stream, percentile=10).dictionary
    tokens = torch.arange(3, 15).reshape(2, 6)
    for model in (tiny_hooked, tiny_bridge, built_on):
        retarget(dictionary, model)
        with model.saes([dictionary], use_error_term=True):
            with_error = model(tokens)
        assert torch.allclose(with_error, model(tokens), atol=1e-4)


def test_a_saved_dictionary_is_small(stream, tmp_path):
    result = fit_exemplar_partition(stream, percentile=1)
    weights, config = result.dictionary.save_model(tmp_path)
    matrix = result.dictionary.exemplars.numel() * 4
    assert weights.stat().st_size - 4096 <= 2.2 * matrix


@pytest.mark.parametrize(
    "options, message",
    [
        ({"percentile": 0}, r"percentile must lie in \(0, 100\)"),
        ({"percentile": 100}, r"percentile must lie in \(0, 100\)"),
        ({"threshold": 0.0}, r"threshold must lie in \(0, 2\]"),
        ({"threshold": 2.1}, r"threshold must lie in \(0, 2\]"),
        ({"calibration_activations": 5000}, "holds 700 activations, fewer than the 5000"),
        ({"unseen_mas_tolerance": 0.1}, "Did you mean 'unseen_mass_tolerance'"),
        ({"stop": "never"}, "stop must be one of 'budget', 'unseen_mass', 'paper'"),
        ({"readout": "topk"}, "Did you mean 'top_k'"),
        ({"k": 0}, "k must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_clear_errors(stream, options, message):
    with pytest.raises(ValueError, match=message):
        fit_exemplar_partition(stream, **options)


def test_several_hooks_need_the_plural(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts, ["blocks.0.hook_out", HOOK], context_size=16)
    with pytest.raises(ValueError, match="fit_exemplar_partitions"):
        fit_exemplar_partition(stream)


def test_one_document_cannot_be_calibrated_across_documents(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, [" ".join(tiny_texts)[:500]], HOOK, context_size=16)
    with pytest.raises(ValueError, match="document") as error:
        fit_exemplar_partition(stream)
    assert fit_exemplar_partition(stream, threshold=0.5).n_regions > 1
    assert fit_exemplar_partition(stream, **_advised(error)).n_regions > 1


@pytest.mark.slow
def test_batches_of_one_activation_cannot_be_calibrated_within_batches(tiny_bridge, tiny_texts):
    options = {"context_size": 16, "batch_size": 1, "seqpos_slice": (3, 4)}
    stream = ActivationStream(tiny_bridge, tiny_texts, HOOK, **options)
    with pytest.raises(ValueError, match="No batch holds two directions") as error:
        fit_exemplar_partition(stream, calibration="within_batch")
    assert fit_exemplar_partition(stream, **_advised(error)).n_regions > 1


def _advised(error):
    """The option that an error names as the remedy."""
    return dict([re.search(r"(\w+)='(\w+)'", str(error.value)).groups()])


def test_one_region_is_a_dictionary(stream, tmp_path):
    result = fit_exemplar_partition(stream, threshold=2.0)
    assert result.n_regions == 1
    result.dictionary.save_model(tmp_path)
    x = all_activations(stream)
    assert SAE.load_from_disk(tmp_path)(x).shape == x.shape


def test_identical_activations_are_a_clear_error(tiny_bridge):
    stream = ActivationStream(tiny_bridge, ["a a a a a a a", "a a a a a a a"], "blocks.0.hook_in", context_size=4)
    with pytest.raises(ValueError, match="threshold|alike"):
        fit_exemplar_partition(stream, percentile=10)


NEAREST = {"threshold_rule": "nearest_neighbour"}


def test_the_rule_of_nearest_neighbours(stream, tmp_path):
    fit = fit_exemplar_partition(stream, neighbour_factor=1.5, calibration_activations=300, **NEAREST)
    batches = list(stream)
    x, documents = all_activations(stream)[:300], torch.cat([batch.document_ids for batch in batches])[:300]
    units = torch.nn.functional.normalize(x - fit.dictionary.center.detach(), dim=1)
    nearest = [1 - (units[documents != own] @ row).max() for row, own in zip(units, documents)]
    expected = 1.5 * torch.stack(nearest).quantile(0.5)
    assert fit.threshold.threshold == pytest.approx(float(expected), abs=1e-5)
    assert fit.dictionary.cfg.threshold == fit.threshold.threshold
    assert fit.percentile is None and fit.dictionary.cfg.percentile is None
    loaded = ExemplarFitResult.load(fit.save(tmp_path))
    assert loaded.threshold == fit.threshold and loaded.threshold.factor == 1.5
    assert loaded.dictionary.cfg.metadata.neighbour_factor == 1.5


def test_several_factors_from_one_pass_equal_each_alone(stream):
    seen = set()
    fits = fit_exemplar_partitions(
        stream, neighbour_factors=(1, 1.5), on_metrics=lambda key, *rest: seen.add(key), **NEAREST
    )
    assert list(fits) == [(HOOK, 1), (HOOK, 1.5)] and seen == set(fits)
    for (_, factor), fit in fits.items():
        alone = fit_exemplar_partition(stream, neighbour_factor=factor, **NEAREST)
        assert alone.threshold == fit.threshold and torch.equal(alone.counts, fit.counts)
    assert fits[HOOK, 1].n_regions > fits[HOOK, 1.5].n_regions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold_rule": "median"}, "threshold_rule must be one of"),
        ({"calibration": "within_batch", **NEAREST}, "got calibration='within_batch'"),
        ({"neighbour_factor": 0, **NEAREST}, r"neighbour_factor must lie in \(0, inf\), got 0"),
        ({"neighbour_factor": 1e6, **NEAREST}, "above 2, the largest cosine distance; give at most"),
    ],
)
def test_bad_rules(stream, options, message):
    with pytest.raises(ValueError, match=message):
        fit_exemplar_partition(stream, **options)
    with pytest.raises(ValueError, match="neighbour_factors must be at least one number and all different"):
        fit_exemplar_partitions(stream, neighbour_factors=(1, 1), **NEAREST)
