"""What attribution refuses, and that it leaves the model as it was."""

from dataclasses import replace

import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.source_table import SourceTable
from tests.continuations._dictionaries import make
from tests.models_zoo import N_CTX, make_model


@pytest.fixture(scope="module")
def llama():
    model = make_model("llama", "HookedSAETransformer")
    return model, score_continuations(model, "The assert statement", [" is a test", " x"])


@pytest.mark.parametrize(
    ("dictionaries", "message"),
    [
        ([make("standard", "blocks.7.hook_mlp_out")], "blocks.7.hook_mlp_out"),
        ([make("standard", "blocks.1.hook_mlp_out", 16)], "width 16, but those at blocks.1.hook_mlp_out are 32 wide"),
        ([make("transcoder", "blocks.1.hook_resid_mid", write="blocks.1.hook_mlp_out", d_out=16)], "width 16"),
        ([make("standard", "blocks.1.hook_mlp_out")] * 2, "both write at blocks.1.hook_mlp_out"),
        ([make("standard", None)], "names no hook"),
        ([make("standard", "blocks.1.attn.hook_q")], "backend='gradient'"),
        ([make("standard", "blocks.1.mlp.hook_post", 64), make("standard", "blocks.1.hook_mlp_out")], "same MLP"),
    ],
)
def test_dictionaries_that_do_not_fit(llama, dictionaries, message):
    with pytest.raises(ValueError, match=message):
        attribute_continuations(*llama[:1], dictionaries, llama[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "integrated"}, "backend must be one of"),
        ({"target": "last"}, "target must be one of"),
        ({"kinds": ("features",)}, "kinds must be one of"),
        ({"kinds": ("latent",)}, "no source of the kinds"),
        ({"max_sources": 0}, "max_sources must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"target": torch.ones(3)}, r"shape \(\d+,\).*got \(3,\)"),
    ],
)
def test_options_out_of_range(llama, options, message):
    with pytest.raises(ValueError, match=message):
        attribute_continuations(llama[0], [], llama[1], **options)


def test_an_attached_sae_must_be_passed_instead(llama):
    model, found = llama
    model.add_sae(make("standard", "blocks.1.hook_mlp_out"))
    try:
        with pytest.raises(ValueError, match="reset_saes"):
            attribute_continuations(model, [], found)
    finally:
        model.reset_saes()


def test_a_prefix_longer_than_the_context():
    model = make_model("llama", "HookedSAETransformer")
    found = score_continuations(model, "The", [[5] * 40])
    longer = type(found)(**{**vars(found), "prefix_ids": found.prefix_ids * 20})
    with pytest.raises(ValueError, match=f"context is {N_CTX}"):
        attribute_continuations(model, [], longer)


def test_a_set_of_another_model(llama):
    model, found = llama
    other = type(found)(**{**vars(found), "prefix_ids": (0, 5000)})
    with pytest.raises(ValueError, match="another model"):
        attribute_continuations(model, [], other)


class Deaf(torch.nn.Module):
    """A hook point in a model that runs it, or does not, and goes on with what it had."""

    def __init__(self, point, runs):
        super().__init__()
        self.point, self.runs = point, runs

    def forward(self, x):
        if self.runs:
            self.point(x)
        return x


@pytest.mark.parametrize("backend", ["linear", "relp"])
def test_patterns_that_do_not_show_name_the_backend_that_remains(llama, backend):
    model, found = make_model("llama", "HookedSAETransformer"), llama[1]
    model.blocks[1].attn.hook_pattern = Deaf(model.blocks[1].attn.hook_pattern, runs=False)
    with pytest.raises(ValueError, match="'gradient' remains"):
        attribute_continuations(model, [], found, backend=backend)
    assert attribute_continuations(model, [], found, backend="gradient").signatures.isfinite().all()


@pytest.mark.parametrize("place", ["attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale"])
def test_what_shows_but_does_not_let_itself_be_frozen_is_found_out(llama, place):
    model, found = make_model("llama", "HookedSAETransformer"), llama[1]
    part, name = place.split(".")
    module = getattr(model.blocks[1], part)
    setattr(module, name, Deaf(getattr(module, name), runs=True))
    if place == "ln2.hook_scale":
        # Only the MLP reads this norm, and its output is given: nothing is lost.
        attribute_continuations(model, [], found)
        with pytest.raises(ValueError, match=f"blocks.1.{place} has no effect.*'linear' and 'gradient' remain"):
            attribute_continuations(model, [], found, backend="relp")
    else:
        for backend in ("linear", "relp"):
            with pytest.raises(ValueError, match=f"blocks.1.{place}.*'gradient' remains"):
                attribute_continuations(model, [], found, backend=backend)


@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "SAETransformerBridge"])
def test_the_model_is_left_as_it_was(model_class, backend):
    model = make_model("llama", model_class)
    found = score_continuations(model, "The assert", [" x", " y"])
    seen = []
    place = "blocks.1.mlp.hook_out" if "Bridge" in model_class else "blocks.1.hook_mlp_out"
    model.add_hook(place, lambda x, hook: seen.append(1))
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    model.train()
    before = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    attribute_continuations(model, [make("standard", "blocks.1.hook_resid_mid")], found, backend=backend)
    assert seen, "the user's hook ran"
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert model.training and not model.unembed._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_observable_must_tell_tokens_apart(llama):
    model, found = llama
    size = model.cfg.d_vocab
    with pytest.raises(ValueError, match="weighs every token by 2; .* nothing is left"):
        attribute_continuations(model, [], found, target=torch.full((size,), 2.0))
    with pytest.raises(ValueError, match="target has 1 non-finite"):
        attribute_continuations(model, [], found, target=torch.eye(size)[0].index_fill(0, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": (99,)}, "position 99, and this prefix has positions 0 to"),
        ({"latents": (10**6,)}, "latents 0 to 23"),
        ({"kinds": ("mlp",)}, "do not have; they have sources at"),
        ({"hooks": ("blocks.0.hook_attn_out",)}, "do not have; they have sources at"),
        ({"hooks": ("blocks.0.hook_nothing",)}, "blocks.0.hook_nothing"),
    ],
)
def test_fixed_sources_that_are_not_there(llama, change, message):
    model, found = llama
    sae = make("standard", "blocks.1.hook_mlp_out")
    own = attribute_continuations(model, sae, found, kinds=("latent",)).sources.select([0])
    with pytest.raises(ValueError, match=message):
        attribute_continuations(model, sae, found, sources=replace(own, **change))
    with pytest.raises(ValueError, match="twice"):
        attribute_continuations(model, sae, found, sources=SourceTable.joined([own, own]))
    with pytest.raises(ValueError, match="no column"):
        attribute_continuations(model, sae, found, sources=own.select([]))
