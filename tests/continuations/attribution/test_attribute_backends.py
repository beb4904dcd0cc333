"""What each backend's numbers mean, against slow and obvious ones."""

import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.host.models import resolve_hook
from tests.continuations._dictionaries import cases, make
from tests.models_zoo import MODEL_CLASSES, make_model

ALL = {"special_positions": True, "max_sources": 10**6}


@pytest.fixture(scope="module", params=MODEL_CLASSES)
def llama(request):
    model = make_model("llama", request.param)
    return model, score_continuations(model, "The assert statement", [" is a test", " of one more"])


def target_with(model, found, row, hook, position, change):
    """The mean demeaned logit of a continuation after a change of the activation at a hook and position."""
    ids = [*found.prefix_ids, *found.ids_of(row)]

    def add(x, hook):
        x = x.clone()
        x[0, position] += change
        return x

    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(hook, add)])[0].double()
    columns = range(len(found.prefix_ids), len(ids))
    return sum(float(logits[t - 1, ids[t]] - logits[t - 1].mean()) for t in columns) / len(columns)


@pytest.mark.parametrize("name", ["stream", "mlp", "transcoders"])
def test_gradient_is_the_finite_difference_with_respect_to_a_latent(llama, name):
    model, found = llama
    dictionaries = cases("llama")[name]
    attributed = attribute_continuations(model, dictionaries, found, backend="gradient", kinds=("latent",), **ALL)
    table, step = attributed.sources, 0.02
    largest = float(attributed.signatures.abs().max())
    for column in attributed.signatures.abs().mean(dim=0).topk(6).indices.tolist():
        sae = dictionaries[table.dictionaries[column]]
        change = step * table.activations[column] * sae.W_dec[table.latents[column]].detach()
        hook = resolve_hook(model, table.hooks[column])
        for row in range(len(found)):
            up, down = (target_with(model, found, row, hook, table.positions[column], s * change) for s in (1, -1))
            assert (up - down) / (2 * step) == pytest.approx(
                float(attributed.signatures[row, column]), abs=0.01 * largest
            )


def test_gradient_of_latents_that_lie_behind_one_another_is_the_whole_effect_of_each(llama):
    model, found = llama
    below, above = make("standard", "blocks.0.hook_resid_post"), make("standard", "blocks.1.hook_resid_post", seed=1)
    options = {"backend": "gradient", "kinds": ("latent",), **ALL}
    both = attribute_continuations(model, [below, above], found, **options)
    alone = [attribute_continuations(model, sae, found, **options).signatures for sae in (below, above)]
    torch.testing.assert_close(both.signatures, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.1.hook_resid_post"])
def test_relevance_is_conserved_at_every_depth_of_a_model_without_biases(llama, hook):
    model, found = llama
    attributed = attribute_continuations(model, make("standard", hook), found, backend="relp", **ALL)
    columns = attributed.columns
    torch.testing.assert_close(
        columns["prefix_effect"] + columns["continuation_effect"], columns["target"], rtol=1e-4, atol=1e-5
    )
    plain = attribute_continuations(model, make("standard", hook), found, backend="gradient", **ALL)
    assert (plain.columns["prefix_effect"] - columns["prefix_effect"]).abs().max() > 1e-2


def test_relevance_of_a_plain_mlp_goes_by_the_ratio_of_output_to_input():
    model = make_model("gpt2", "HookedSAETransformer")
    found = score_continuations(model, "The assert", [[70]])
    sae = make("standard", "blocks.2.hook_resid_mid")
    relp = attribute_continuations(model, sae, found, backend="relp", kinds=("error",), **ALL)
    # One block by hand: the stream goes around the MLP, and through it by W_in, post / pre, and W_out.
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([[*found.prefix_ids, 70]]))
    last, block = len(found.prefix_ids) - 1, model.blocks[2]
    direction = model.W_U[:, 70] - model.W_U.mean(dim=1)
    at_end = model.ln_final.w * direction / cache["ln_final.hook_scale"][0, last]
    at_end = at_end - at_end.mean()
    ratio = cache["blocks.2.mlp.hook_post"][0, last] / cache["blocks.2.mlp.hook_pre"][0, last]
    through = (
        block.mlp.W_in @ (ratio * (block.mlp.W_out @ at_end)) * block.ln2.w / cache["blocks.2.ln2.hook_scale"][0, last]
    )
    gradient = at_end + through - through.mean()
    x = cache["blocks.2.hook_resid_mid"][0, last]
    expected = float((gradient @ (x - sae.decode(sae.encode(x)))).detach())
    assert float(relp.signatures[0, -1]) == pytest.approx(expected, rel=1e-3)
    assert relp.sources.positions[-1] == last


def test_a_dictionary_behind_a_residual_one_keeps_its_direct_effect(llama):
    model, found = llama
    behind, nearest = make("standard", "blocks.0.hook_mlp_out"), make("standard", "blocks.1.hook_resid_post")
    alone = attribute_continuations(model, behind, found, kinds=("latent",), **ALL)
    both = attribute_continuations(model, [behind, nearest], found, kinds=("latent",), **ALL)
    mine = torch.tensor([dictionary == 0 for dictionary in both.sources.dictionaries])
    torch.testing.assert_close(both.signatures[:, mine], alone.signatures, rtol=1e-4, atol=1e-6)
    assert "blocks.0" not in " ".join(both.metadata["attribution"]["cut"])
