"""Free generations under steering: paired, changed from the prefix on, and placed in clusters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.embed import embed_continuations
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.steering.generate import nearest_cluster
from saelens_ext.continuations.steering.steer import steer_continuations
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.continuations.validation.results import combine_validations
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.host.hook_edits import hooked
from saelens_ext.host.models import resolve_hook
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from tests.continuations._dictionaries import make
from tests.continuations.static_embedder import UNSEEN, static_embedder
from tests.models_zoo import MODEL_CLASSES, make_model

FAST = ValidationOptions(strengths=(0, 2), top=3, n_bootstrap=200, n_permutations=500)


def prepared(model, prefix="The assert statement"):
    sae = make("standard", "blocks.1.hook_mlp_out")
    found = sample_continuations(model, prefix, 12, max_new_tokens=4, seed=3)
    return sae, attribute_continuations(model, sae, found, backend="gradient")


def by_first_letter(generations):
    """A classifier of its own kind: by the parity of the first token."""
    return (generations.token_ids[:, 0] % 2).numpy()


def with_meanings(found):
    """Embeddings by the first token's parity, exact."""
    return found.with_embeddings(torch.eye(2)[found.token_ids[:, 0] % 2])


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_generations_are_those_of_a_model_edited_by_hand(model_class):
    model = make_model("llama", model_class)
    sae, found = prepared(model)
    steered = steer_continuations(
        model,
        sae,
        found,
        found.signatures[0],
        top=3,
        strengths=(0, 2),
        generate=5,
        classify=by_first_letter,
        batch_size=4,
    )
    direction, table = steered.direction, steered.direction.sources

    def turn(x, hook):
        if x.shape[1] == 1:
            return None
        changed = x.clone()
        for j, sign in enumerate(direction.signs):
            p, latent = table.positions[j], table.latents[j]
            changed[:, p] += 2 * sign * sae.encode(x[:, p])[:, [latent]] * sae.W_dec[latent].detach()
        return changed

    # As the continuations were sampled, with the next seed.
    options = SamplingOptions(max_new_tokens=4, top_k=None, top_p=0.9, seed=4)
    plain = sample_texts(model, found.prefix, n=5, options=options, batch_size=5)[0]
    with hooked(model, [(resolve_hook(model, "blocks.1.hook_mlp_out"), turn)]):
        edited = sample_texts(model, found.prefix, n=5, options=options, batch_size=5)[0]
    assert list(steered.generations[0]) == plain and list(steered.generations[1]) == edited
    assert plain != edited
    shares = steered.generation_shares()
    assert shares.groupby("strength")["share"].sum().tolist() == pytest.approx([1, 1]) and (shares["n"] == 5).all()


def test_generations_without_text_fall_nowhere(monkeypatch):
    model = make_model("llama", "SAETransformerBridge")
    sae, found = prepared(model)
    seen = []

    def classify(generations):
        seen.append(len(generations))
        return np.full(len(generations), 5)

    monkeypatch.setattr("saelens_ext.continuations.steering.steer.generated_texts", lambda *_: ["a", " ", "b"])
    options = {"strengths": (1,), "generate": 3}
    steered = steer_continuations(model, sae, found, found.signatures[0], classify=classify, **options)
    assert steered.generation_labels == ((5, -1, 5),) and seen == [2]
    with pytest.raises(ValueError, match="one whole number per generation"):
        steer_continuations(model, sae, found, found.signatures[0], classify=lambda s: [0.5] * len(s), **options)
    plain = steer_continuations(model, sae, found, found.signatures[0], **options)
    assert plain.generations == (("a", " ", "b"),)
    with pytest.raises(ValueError, match="with generate and classify"):
        plain.generation_shares()


def test_the_nearest_cluster_is_that_of_the_nearest_mean(monkeypatch):
    model = make_model("llama", "SAETransformerBridge")
    _, found = prepared(model)
    angles = torch.linspace(0, 3, 12)
    found = found.with_embeddings(torch.stack([angles.cos(), angles.sin()], dim=1))
    labels = np.repeat([7, 3, 5], 4)
    monkeypatch.setattr("saelens_ext.continuations.steering.generate.embed_continuations", lambda s, *_, **__: s)
    monkeypatch.setattr(
        "saelens_ext.continuations.steering.generate.visible_rows", lambda s, *_: torch.ones(len(s)).bool()
    )
    assert nearest_cluster(found, labels)(found).tolist() == labels.tolist()
    with pytest.raises(ValueError, match="one per continuation"):
        nearest_cluster(found, labels[:3])
    with pytest.raises(ValueError, match="width 3"):
        nearest_cluster(found, labels)(found.with_embeddings(torch.eye(12)[:, :3] + 1))


def test_generations_in_which_the_embedder_sees_nothing_fall_in_no_cluster(monkeypatch):
    model, embedder = make_model("llama", "SAETransformerBridge"), static_embedder()
    sae, found = prepared(model)
    words = ["river", "bank"] * 6
    found = embed_continuations(replace(found, texts=tuple(words)), embedder, mode="sentence")
    classify = nearest_cluster(found, np.arange(12) % 2 + 3, embedder, mode="sentence")
    texts = [*UNSEEN, "bank", "river"]
    monkeypatch.setattr("saelens_ext.continuations.steering.steer.generated_texts", lambda *_: texts)
    options = {"strengths": (1,), "generate": len(texts), "classify": classify}
    steered = steer_continuations(model, sae, found, found.signatures[0], **options)
    assert steered.generation_labels == ((*[-1] * len(UNSEEN), 4, 3),)
    texts[:] = [UNSEEN[-1]] * len(texts)
    steered = steer_continuations(model, sae, found, found.signatures[0], **options)
    assert steered.generation_labels == ((-1,) * len(texts),)


@pytest.mark.slow
def test_shares_of_all_methods_and_their_comparison():
    model = make_model("llama", "HookedSAETransformer")
    tests = []
    for prefix in ("The assert statement", "A test"):
        sae, found = prepared(model, prefix)
        found = with_meanings(found)
        labels = (found.token_ids[:, 0] % 2).numpy()
        tests.append(validate_clusters(model, sae, found, labels, FAST, generate=6, embed=with_meanings))
        table = tests[-1].generations
        assert ((table["share"] >= 0) & (table["share"] <= 1) & (table["n"] == 6)).all()
        for planned in tests[-1].directions.itertuples():
            if planned.method != "joint":
                continue
            weights = torch.zeros(len(found.sources))
            weights[planned.columns] = torch.tensor(planned.signs).float()
            steered = steer_continuations(
                model, sae, found, weights, strengths=(0, 2), generate=6, classify=by_first_letter
            )
            expected = (np.array(steered.generation_labels) == planned.cluster).mean(axis=1)
            row = table[(table["method"] == "joint") & (table["cluster"] == planned.cluster)].iloc[0]
            assert [row["unsteered"], row["share"]] == pytest.approx(expected)
        assert len(table[table["method"] == "global"]) == 2
    rows = tests[0].summary().set_index(["measure", "control"]).loc["generation_share"]
    assert rows.loc["wrong_cluster", "unit"] == "cluster" and rows.loc["semantic", "n_units"] == 0
    together = combine_validations(tests)
    rows = together.summary().set_index(["measure", "control"]).loc["generation_share"]
    changes = together.generations.assign(change=together.generations["share"] - together.generations["unsteered"])
    means = changes.groupby(["method", "prefix"])["change"].mean()
    assert rows.loc["semantic", "difference"] == pytest.approx((means["joint"] - means["semantic"]).mean())
    assert rows.loc["semantic", "n_units"] == 2
    assert "generation_share" in together.claim("generation_share", "change")
