"""A model whose layers lie on two devices, and dictionaries on either: the results are those of one device."""

import warnings

import accelerate
import pytest
import torch
from transformer_lens.model_bridge.sources import transformers

import saelens_ext as ext
from saelens_ext.host.models import load_model
from tests import models_zoo
from tests.continuations._dictionaries import make, own
from tests.devices.fake_accelerator import fake_accelerator

pytestmark = pytest.mark.slow
HOOKS = ["blocks.0.hook_out", "blocks.1.hook_out"]
NEURONS = "blocks.2.mlp.out.hook_in"
STREAM = {"context_size": 16, "batch_size": 4, "max_tokens": 300}
MANY = {"max_sources": 10**6, "special_positions": True}


def made(places=None):
    hosted = models_zoo.make_hf_model("llama")
    if places is not None:
        hosted = accelerate.dispatch_model(hosted, places, main_device="cpu", force_hooks=True)
    return load_model("llama", hf_model=hosted, tokenizer=models_zoo.make_tokenizer())


@pytest.fixture(scope="module")
def split():
    """A model with the embedding and one block on the CPU, and the rest on the accelerator."""
    with fake_accelerator(float64=True) as name:
        there = f"{name}:0"
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
        places |= dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), there)
        yield made(places), name


@pytest.fixture(scope="module")
def whole():
    return made()


def test_a_device_that_the_host_chooses_is_where_it_is_compared(split, tmp_path, monkeypatch):
    """Where there is CUDA, it is the host's choice; warnings are errors."""
    monkeypatch.setattr(transformers, "get_device", lambda: split[1])
    models_zoo.make_hf_model("llama").save_pretrained(tmp_path)
    models_zoo.make_tokenizer().save_pretrained(tmp_path)
    assert next(load_model(tmp_path).parameters()).device.type == split[1]


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_stream_over_both_devices_and_what_is_built_from_it(split, whole, tiny_texts):
    model, name = split
    here, there = (ext.ActivationStream(one, tiny_texts, [*HOOKS, NEURONS], **STREAM) for one in (whole, model))
    batches = list(zip(here, there, strict=True))
    for mine, other in batches:
        for hook in mine.activations:
            close(other.activations[hook], mine.activations[hook])
    assert {str(x.device.type) for x in batches[0][1].activations.values()} == {"cpu", name}
    for hook in HOOKS:
        one, other = (
            ext.fit_exemplar_partition(ext.ActivationStream(m, tiny_texts, hook, **STREAM), percentile=20)
            for m in (whole, model)
        )
        close(other.dictionary.exemplars.detach(), one.dictionary.exemplars.detach())
        profiles = [
            ext.profile_dictionary(fit.dictionary.to(place), ext.ActivationStream(m, tiny_texts, hook, **STREAM))
            for fit, m, place in ((one, whole, "cpu"), (other, model, "cpu"), (other, model, name))
        ]
        for profile in profiles[1:]:
            assert torch.equal(profile.counts.cpu(), profiles[0].counts)


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
def test_continuations_are_attributed_and_steered(split, whole, backend, place):
    model, name = split
    found = ext.score_continuations(whole, "The assert statement", [" is so", " was one of them"])
    again = ext.score_continuations(model, "The assert statement", [" is so", " was one of them"])
    close(again.log_probs, found.log_probs)

    def dictionaries(device):
        made = [make("standard", "blocks.0.hook_mlp_out"), make("standard", "blocks.1.hook_out")]
        return [one.to(device) for one in made]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dictionary is on")
        expected = ext.attribute_continuations(whole, dictionaries("cpu"), found, backend=backend, **MANY)
        there = dictionaries("cpu" if place == "cpu" else name)
        attributed = ext.attribute_continuations(model, there, again, backend=backend, **MANY)
        close(attributed.signatures, expected.signatures)
        for column, values in expected.columns.items():
            close(attributed.columns[column], values)
        options = {"top": 3, "strengths": (-1, 1)}
        effects = ext.steer_continuations(whole, dictionaries("cpu"), expected, expected.signatures[0], **options)
        others = ext.steer_continuations(model, there, attributed, expected.signatures[0], **options)
        for measure, changes in effects.changes.items():
            torch.testing.assert_close(others.changes[measure], changes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1], ids=["regions", "features"])
def test_dictionaries_of_this_package_may_be_anywhere(split, whole, number):
    model, name = split

    def aurocs(model, place):
        detector = ext.Detector.from_dictionary(own(models_zoo.D_MLP["llama"])[number].to(place))
        return torch.as_tensor(ext.concept_scores(model, detector, ["The cat sat.", "A dog ran."], ["Ships."]).auroc)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dictionary is on")
        for place in ("cpu", name):
            close(aurocs(model, place), aurocs(whole, "cpu"))
