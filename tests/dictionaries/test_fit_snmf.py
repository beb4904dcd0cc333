"""Fitting an SNMFDictionary: in memory and in passes, held-out documents, files, and what is refused."""

import itertools
import json
import shutil

import pytest
import torch
from sae_lens import SAE

from saelens_ext import ActivationStream, SNMFDictionary, SNMFFitResult, fit_hierarchical_snmf, fit_sae, fit_snmf
from saelens_ext.dictionaries.activation_matrix import _is_held_out
from saelens_ext.dictionaries.fit_snmf import reconstruction_loss
from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.semi_nmf.fit import semi_nmf
from saelens_ext.ops.semi_nmf.rows import center_of

HOOK = "blocks.1.mlp.hook_post"  # an alias on a bridge
OPTIONS = {"sparsity": 0.2, "max_iter": 15}


@pytest.fixture
def stream(tiny_bridge, tiny_texts) -> ActivationStream:
    return ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, batch_size=4, max_tokens=600)


def rows_of(stream: ActivationStream, keep=lambda documents: documents >= 0) -> torch.Tensor:
    return torch.cat([batch.activations[HOOK][keep(batch.document_ids)] for batch in stream])


def relative_error(x, features, center=0.0, l1=0.0):
    left = x - center - nnls(x - center, features, l1=l1) @ features
    return float(left.double().square().sum() / x.double().square().sum())


@pytest.mark.slow
def test_the_dictionary_is_the_factorisation(stream):
    result = fit_snmf(stream, 8, l1=0, **OPTIONS)
    x = rows_of(stream)
    plain = semi_nmf(x, 8, sparsity=0.2, max_iter=15)
    dictionary = result.dictionary
    assert isinstance(result, SNMFFitResult) and isinstance(dictionary, SNMFDictionary)
    assert result.loss == plain.loss and result.history == plain.history and result.n_seen == len(x) == 600
    assert torch.allclose(dictionary.features.norm(dim=1), torch.ones(8))
    assert result.loss == pytest.approx(relative_error(x, dictionary.features.detach()), abs=1e-5)
    own = nnls(x, dictionary.features.detach()).square().sum(dim=0) / x.square().sum()
    torch.testing.assert_close(result.shares, own, rtol=1e-3, atol=1e-5)
    assert bool((result.shares.diff() <= 0).all()) and result.n_components == 8
    assert result.typical_norm == pytest.approx(float(x.norm(dim=1).median()))
    assert int(dictionary.support.sum(dim=1).max()) <= -(-x.shape[1] * 2 // 10)


def test_the_published_rule(stream, tmp_path):
    result = fit_snmf(stream, 5, method="paper", sparsity=0.2, seed=3)
    x = rows_of(stream)
    rule = semi_nmf(x, 5, sparsity=0.2, method="paper", generator=torch.Generator().manual_seed(3))
    assert result.loss == rule.loss and result.history == rule.history and len(result.history) > 100
    again = SNMFFitResult.load(result.save(tmp_path)).dictionary
    assert again.cfg.l1 == 0 and (again.cfg.metadata.method, again.cfg.metadata.l1) == ("paper", 0)
    assert not again.b_dec.any()
    torch.testing.assert_close(again.encode(x), nnls(x, result.dictionary.features.detach()))
    other = fit_snmf(stream, 5, sparsity=0.2)
    assert other.dictionary.cfg.metadata.method == "coordinate" and other.dictionary.cfg.l1 == 0.1


def test_what_the_published_rule_cannot_do(stream):
    for l1 in (0.1, 0.2):  # the default of the other method is not the rule's
        with pytest.raises(ValueError, match=rf"no L1 penalty, got l1={l1} with method='paper'\. Leave l1 out"):
            fit_snmf(stream, 5, method="paper", l1=l1)
    assert fit_snmf(stream, 5, method="paper", l1=0, max_iter=1).dictionary.cfg.l1 == 0
    with pytest.raises(ValueError, match=r"no passes over a stream, got max_passes=5 .*Leave max_passes out"):
        fit_snmf(stream, 5, method="paper", max_passes=5)
    with pytest.raises(ValueError, match="memory_limit=10000 bytes, and method='paper'"):
        fit_snmf(stream, 5, method="paper", memory_limit=10_000)
    with pytest.raises(ValueError, match="method must be one of 'coordinate', 'paper', got 'published'"):
        fit_snmf(stream, 5, method="published")
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="max_iter must be a whole number"):
            fit_snmf(stream, 5, max_iter=wrong)


def test_metadata(stream):
    metadata = fit_snmf(stream, 4, **OPTIONS).dictionary.cfg.metadata
    assert metadata.hook_name == "blocks.1.mlp.out.hook_in" and metadata.context_size == 16 and metadata.l1 == 0.1
    assert metadata.model_class_name == "SAETransformerBridge" and metadata.typical_norm > 0


def test_a_matrix_gives_the_same(stream):
    streamed, from_matrix = fit_snmf(stream, 5, **OPTIONS), fit_snmf(rows_of(stream), 5, hook_name=HOOK, **OPTIONS)
    assert torch.equal(streamed.dictionary.features, from_matrix.dictionary.features)
    assert from_matrix.hook_name == from_matrix.dictionary.cfg.metadata.hook_name == HOOK


@pytest.mark.slow
def test_held_out_documents(stream):
    result = fit_snmf(stream, 5, held_out=0.25, **OPTIONS)
    out = rows_of(stream, lambda documents: documents % 4 == 3)
    kept = rows_of(stream, lambda documents: documents % 4 != 3)
    assert (result.n_seen, result.n_held_out) == (len(kept), len(out)) and len(out) > 0
    assert torch.equal(result.dictionary.features, fit_snmf(kept, 5, **OPTIONS).dictionary.features)
    features, center = result.dictionary.features.detach(), result.dictionary.b_dec.detach()
    torch.testing.assert_close(center, center_of(kept).float())
    assert result.held_out_loss == pytest.approx(relative_error(out, features, center, 0.1), abs=1e-5)
    assert fit_snmf(stream, 5, **OPTIONS).held_out_loss is None


def test_documents_of_a_matrix_can_be_held_out(stream):
    documents, x = torch.cat([batch.document_ids for batch in stream]), rows_of(stream)
    streamed = fit_snmf(stream, 5, held_out=0.25, **OPTIONS)
    held = fit_snmf(x, 5, document_ids=documents, held_out=0.25, **OPTIONS)
    assert torch.equal(held.dictionary.features, streamed.dictionary.features)
    assert held.n_held_out == streamed.n_held_out > 0
    assert held.held_out_loss == pytest.approx(streamed.held_out_loss)
    trained = [
        fit_sae(source, 8, held_out=0.25, training_samples=256, batch_size=64, **options)
        for source, options in ((stream, {}), (x, {"document_ids": documents}))
    ]
    assert torch.equal(trained[0].W_dec, trained[1].W_dec)
    for fit in (fit_snmf, fit_sae):
        with pytest.raises(ValueError, match=r"does not say where documents end: give document_ids"):
            fit(x, 5, held_out=0.25)
        with pytest.raises(ValueError, match=r"document_ids must be \d+ integers of at least 0, one per row, got"):
            fit(x, 5, document_ids=documents[:3], held_out=0.25)
        with pytest.raises(ValueError, match="document_ids is for a matrix"):
            fit(stream, 5, document_ids=documents)


@pytest.mark.parametrize("options", [{}, {"memory_limit": 10_000}])
@pytest.mark.parametrize(("n_documents", "share"), [(9, 0.1), (2, 0.4), (1, 0.5)])
def test_too_few_documents_to_hold_any_out_are_an_error(tiny_bridge, tiny_texts, n_documents, share, options):
    texts = [*tiny_texts[: n_documents - 1], " ".join(tiny_texts)]
    stream = ActivationStream(tiny_bridge, texts, HOOK, context_size=16)
    with pytest.raises(ValueError, match=f"held_out={share:g} .* of the {n_documents} that the stream read none"):
        fit_snmf(stream, 4, held_out=share, sparsity=0.2, max_iter=4, **options)
    if n_documents > 1:  # the fewest that the error asks for
        more = fit_snmf(stream, 4, held_out=0.5, sparsity=0.2, max_iter=4, max_passes=2, **options)
        assert more.n_held_out > 0 and more.held_out_loss > 0


def test_a_trained_sae_has_documents_held_out_or_an_error(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts[:5], HOOK, context_size=16)
    with pytest.raises(ValueError, match=r"held_out=0\.1 .* of the 5 that the stream read none"):
        fit_sae(stream, 8, held_out=0.1, training_samples=64, batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("l1", [0, 0.1])
def test_more_than_fits_in_memory_takes_several_passes(stream, l1):
    whole = fit_snmf(stream, 5, held_out=0.25, sparsity=0.2, l1=l1)
    passes = fit_snmf(stream, 5, held_out=0.25, sparsity=0.2, memory_limit=10_000, l1=l1)
    assert passes.stopped_because in ("converged", "max_passes") and len(passes.history) <= 5
    assert (passes.n_seen, passes.n_held_out) == (whole.n_seen, whole.n_held_out)
    assert passes.loss == pytest.approx(whole.loss, rel=0.05)
    kept = rows_of(stream, lambda documents: documents % 4 != 3)
    features, center = passes.dictionary.features.detach(), passes.dictionary.b_dec.detach()
    expected = center_of(kept).float() if l1 else torch.zeros_like(center)
    torch.testing.assert_close(center, expected, atol=1e-6, rtol=1e-5)
    assert passes.loss == pytest.approx(relative_error(kept, features, center, l1), abs=1e-4)
    own = nnls(kept - center, features, l1=l1).square().sum(dim=0) / kept.square().sum()
    torch.testing.assert_close(passes.shares, own, rtol=1e-2, atol=1e-5)


def test_why_it_stopped(stream):
    assert fit_snmf(stream, 5, sparsity=0.2, max_iter=2).stopped_because == "max_iter"
    assert fit_snmf(stream, 2, sparsity=0.2, max_iter=500, tol=0.01).stopped_because == "converged"


def test_metrics_reach_the_caller(stream):
    seen = []
    result = fit_snmf(stream, 4, on_metrics=seen.append, **OPTIONS)
    assert [m["objective"] for m in seen][-1] == result.history[-1] and {"loss", "n_dead"} <= set(seen[0])


def test_save_and_load(stream, tmp_path):
    result = fit_snmf(stream, 4, held_out=0.25, **OPTIONS)
    path = result.save(tmp_path / "fit")
    again = SNMFFitResult.load(path)
    assert torch.equal(again.dictionary.features, result.dictionary.features) and torch.equal(
        again.shares, result.shares
    )
    for name in (
        "hook_name",
        "stopped_because",
        "loss",
        "held_out_loss",
        "history",
        "n_seen",
        "n_held_out",
        "typical_norm",
    ):
        assert getattr(again, name) == getattr(result, name)
    assert type(SAE.load_from_disk(str(path))) is SNMFDictionary


def test_foreign_files_are_refused(stream, tmp_path):
    path = fit_snmf(stream, 4, **OPTIONS).save(tmp_path / "fit")
    other = fit_snmf(stream, 3, **OPTIONS).save(tmp_path / "other")
    shutil.copy(other / "fit.safetensors", path / "fit.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        SNMFFitResult.load(path)
    content = json.loads((other / "fit.json").read_text())
    del content["loss"]
    (other / "fit.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks loss"):
        SNMFFitResult.load(other)


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5])
def test_the_share_held_out_is_the_one_asked_for(tiny_bridge, share):
    texts = [f"The assert statement number {i} is here." for i in range(40)]
    documents = ActivationStream(tiny_bridge, texts, HOOK, context_size=16)
    out = {int(i) for i in rows_of_documents(documents, share)}
    assert (
        len(out) == round(share * 40) and max(b - a for a, b in itertools.pairwise(sorted(out))) <= round(1 / share) + 1
    )


def rows_of_documents(stream, share):
    documents = torch.cat([batch.document_ids for batch in stream])
    return documents[_is_held_out(documents, share)]


def test_heads_are_joined(tiny_hooked, tiny_texts):
    stream = ActivationStream(tiny_hooked, tiny_texts, "blocks.1.attn.hook_z", context_size=16, max_tokens=300)
    made = [
        fit_snmf(stream, 4, held_out=0.25, **OPTIONS).dictionary,
        fit_hierarchical_snmf(stream, (4, 2), **OPTIONS).dictionaries[1],
        fit_sae(stream, 4, training_samples=200, batch_size=50),
    ]
    for dictionary in made:
        with tiny_hooked.saes([dictionary], use_error_term=True):
            assert bool(tiny_hooked(torch.tensor([[0, 5, 6, 7]])).isfinite().all())


def test_a_dictionary_of_another_fit_is_noticed(stream, tmp_path):
    path = fit_snmf(stream, 4, **OPTIONS).save(tmp_path)
    fit_snmf(stream, 4, l1=0.3, **OPTIONS).dictionary.save_model(path)
    with pytest.raises(ValueError, match="do not belong together"):
        SNMFFitResult.load(path)


def test_what_can_be_refused_at_once_is(stream):
    class Unread(ActivationStream):
        def __iter__(self):
            raise AssertionError("the model was run")

    unread = Unread(stream.model, ["text"], HOOK, context_size=16)
    for wrong in ({"n_components": 0}, {"l1": -1}, {"sparsity": 2}, {"init": "nmf"}):
        with pytest.raises(ValueError):
            fit_snmf(unread, **wrong)
    with pytest.raises(ValueError, match="k must lie between 1 and d_sae=4"):
        fit_sae(unread, 4, k=5)
    for wrong in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="A matrix of activations must be"):
            fit_snmf(wrong, 2)


def test_bad_input(stream, tiny_bridge, tiny_texts):
    with pytest.raises(ValueError, match="sparsity must lie in"):
        fit_snmf(stream, 4, sparsity=0)
    with pytest.raises(ValueError, match=r"'sparsty'.*sparsity"):
        fit_snmf(stream, 4, sparsty=0.1)
    with pytest.raises(ValueError, match="l1 must lie in"):
        fit_snmf(stream, 4, l1=1)
    with pytest.raises(ValueError, match="held_out, a fraction of the documents, must lie in"):
        fit_snmf(stream, 4, held_out=0.7)
    with pytest.raises(ValueError, match="does not say where documents end"):
        fit_snmf(rows_of(stream), 4, held_out=0.1)
    with pytest.raises(ValueError, match="n_components is 601"):
        fit_snmf(stream, 601, init="kmeans", sparsity=0.2)
    with pytest.raises(ValueError, match="activations are zero"):
        fit_snmf(torch.zeros(10, 8), 2)
    with pytest.raises(ValueError, match="non-finite"):
        fit_snmf(torch.full((10, 8), float("nan")), 2)
    with pytest.raises(ValueError, match="2 hooks"):
        fit_snmf(ActivationStream(tiny_bridge, tiny_texts, [HOOK, "blocks.0.hook_out"], context_size=16), 4)
    with pytest.raises(ValueError, match="hook_name is for a matrix"):
        fit_snmf(stream, 4, hook_name=HOOK)


def sphere(n=80, d=20):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize("options", [{}, {"l1": 0}, {"method": "paper"}])
@pytest.mark.parametrize("init", ["svd", "kmeans", "random"])
@pytest.mark.parametrize("rows", ["equal norms", "few distinct", "one enormous"])
def test_activations_without_much_to_find(rows, init, options):
    x = {
        "equal norms": sphere(),
        "few distinct": 3 * sphere(3)[torch.arange(80) % 3],
        "one enormous": sphere() * torch.where(torch.arange(80) == 4, 1e9, 1.0)[:, None],
    }[rows]
    result = fit_snmf(x, 6, sparsity=0.2, init=init, **options)
    codes = result.dictionary.encode(x)
    assert result.dictionary.cfg.d_sae == 6 and bool(codes.isfinite().all()) and 0 <= result.loss < 1
    assert all(after <= before for before, after in itertools.pairwise(result.history))
    if not options:
        # Each of the features has activations, even if they are as nothing beside an enormous one.
        assert result.n_dead == 0 and bool((codes.amax(dim=0) > 0).all())
        assert float(result.dictionary.b_dec.detach().norm()) <= 3


def test_one_enormous_activation_does_not_decide_the_features():
    x = sphere(400)
    large = x * torch.where(torch.arange(400) == 4, 1e9, 1.0)[:, None]
    plain, other = (fit_snmf(rows, 6, sparsity=0.2).dictionary for rows in (x, large))
    losses = [reconstruction_loss(dictionary, [x[5:]])[0] for dictionary in (plain, other)]
    assert losses[1] < losses[0] * 1.02


@pytest.mark.parametrize("n", [1, 2, 50])
def test_equal_activations_leave_nothing_from_their_mean(n):
    x = sphere(1).repeat(n, 1)
    with pytest.raises(ValueError, match=f"All {n} activations are equal"):
        fit_snmf(x, 2, init="random")
    with pytest.raises(ValueError, match=f"All {n} activations are equal"):
        fit_hierarchical_snmf(x, (2, 1), init="random")
    assert fit_snmf(x, 1, l1=0, sparsity=1).loss == pytest.approx(0, abs=1e-6)


def test_constant_and_negative_activations():
    x = -torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    x[:, 5] = 1
    result = fit_snmf(x, 3, sparsity=0.5)
    assert result.loss < 0.5 and not result.dictionary.features[:, 3].any()


def test_reconstruction_loss_of_nothing():
    dictionary = SNMFDictionary.from_features(torch.eye(3))
    assert reconstruction_loss(dictionary, []) == (None, 0)
    assert reconstruction_loss(dictionary, [torch.zeros(2, 3)]) == (0.0, 2)
    assert reconstruction_loss(dictionary, [torch.tensor([[3.0, 0, 0], [0, -4.0, 0]])]) == (pytest.approx(16 / 25), 2)
