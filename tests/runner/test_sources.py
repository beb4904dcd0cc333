"""Where activations come from: models of every host class, named models and datasets, and SAELens' cache of
activations.
"""

import json
import warnings

import datasets
import pytest
import torch
from sae_lens import SAE, CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.load_model import HookedProxyLM

from saelens_ext import ActivationStream, fit_exemplar_partition, retarget
from saelens_ext.activations.cached_stream import CachedStream
from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.runner import DictionaryRunner, ExemplarBuildConfig, SNMFBuildConfig
from saelens_ext.runner.sources import open_dataset, open_model, open_stream
from tests import models_zoo
from tests.runner.runs import HOOK, TEXTS, config

COARSE = ExemplarBuildConfig(percentile=20, calibration_activations=100)
LENGTH = 16


@pytest.fixture(scope="module")
def proxy():
    return HookedProxyLM(models_zoo.make_hf_model("llama"), models_zoo.make_tokenizer())


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    models_zoo.make_hf_model("llama").save_pretrained(folder)
    models_zoo.make_tokenizer().save_pretrained(folder)
    return folder


# --- streams ---


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_stream_can_start_in_the_middle(start, tiny_bridge):
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=LENGTH, batch_size=4, max_tokens=500)
    whole = list(stream)
    read = sum(len(batch) for batch in whole[:start])
    rest = list(stream.batches(4 * start, read))
    assert len(rest) == len(whole) - start
    for one, other in zip(rest, whole[start:]):
        assert torch.equal(one.activations[HOOK], other.activations[HOOK])
        for name in ("token_ids", "sequence_ids", "positions", "document_ids", "windows"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert list(stream.batches(8, 500)) == []


@pytest.mark.parametrize("hook", ["model.layers.1", HOOK, "blocks.1.hook_resid_post"])
def test_a_proxy_gives_the_activations_of_a_bridge(hook, proxy, tiny_bridge):
    options = {"context_size": LENGTH, "batch_size": 4, "max_tokens": 300}
    mine, theirs = (
        ActivationStream(proxy, TEXTS, hook, **options),
        ActivationStream(tiny_bridge, TEXTS, HOOK, **options),
    )
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.activations[hook], other.activations[HOOK], atol=1e-3)
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.positions, other.positions)
    assert mine.hook_names == ("model.layers.1",) and mine.prepend_bos == theirs.prepend_bos
    described = mine.describe()
    assert (described["model_class_name"], described["n_layers"], described["d_model"]) == (
        "AutoModelForCausalLM",
        3,
        32,
    )
    assert not proxy.hook_dict["model.layers.1"].fwd_hooks, "nothing stays hooked"


def test_a_proxy_refuses_what_it_cannot_read(proxy):
    with pytest.raises(ValueError, match="has no hook 'model.layers.9'"):
        ActivationStream(proxy, TEXTS, "model.layers.9")
    with pytest.raises(ValueError, match="context_size must lie from 2 .* to 64"):
        ActivationStream(proxy, TEXTS, "model.layers.1", context_size=65)


# --- named models and datasets ---


@pytest.mark.parametrize(
    ("name", "hook", "kind"),
    [
        ("SAETransformerBridge", "blocks.1.hook_out", "SAETransformerBridge"),
        ("HookedTransformer", "blocks.1.hook_resid_post", "HookedSAETransformer"),
        ("AutoModelForCausalLM", "model.layers.1", "AutoModelForCausalLM"),
    ],
)
def test_a_run_by_name_builds_the_same_with_every_class_and_records_it(
    name, hook, kind, saved_model, tiny_bridge, tmp_path
):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    given = config(
        tmp_path,
        model_name=str(saved_model),
        model_class_name=name,
        hook_name=hook,
        dataset_path=str(data),
        text_column="body",
        dictionary=COARSE,
        profile=True,
        n_eval_batches=1,
    )
    result = DictionaryRunner(given).run()
    (built,) = result.dictionaries.values()
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=LENGTH, batch_size=4, max_tokens=600)
    fit = fit_exemplar_partition(stream, percentile=20, calibration_activations=100, seed=42)
    assert torch.equal(built.fit.exemplar_indices, fit.exemplar_indices)
    assert torch.allclose(built.dictionary.exemplars, fit.dictionary.exemplars, atol=1e-4)
    metadata = SAE.load_from_disk(built.path).cfg.metadata
    assert (metadata.model_class_name, metadata.hook_name) == (kind, hook)
    assert metadata.dataset_path == str(data) and result.config.model_class_name == name
    assert built.evals["reconstruction_quality"]["explained_variance"] > 0 and built.profile.n_activations == 600
    retarget(built.dictionary, tiny_bridge)
    assert built.dictionary.cfg.metadata.hook_name == HOOK


def test_how_a_model_is_loaded_is_passed_on(saved_model, tmp_path):
    given = config(tmp_path, model_name=str(saved_model), model_from_pretrained_kwargs={"dtype": "bfloat16"})
    assert next(open_model(given).parameters()).dtype == torch.bfloat16
    given.model_class_name = "HookedTransformer"
    assert next(open_model(given).parameters()).dtype == torch.bfloat16
    given.model_from_pretrained_kwargs = {"fold_ln": True}
    with pytest.raises(ValueError, match="does not know 'fold_ln'"):
        open_model(given)
    given.model_class_name = "SAETransformerBridge"
    given.model_from_pretrained_kwargs = {"devicemap": "auto"}
    with pytest.raises(ValueError, match="SAETransformerBridge does not know 'devicemap'. Did you mean 'device_map'"):
        open_model(given)
    given.model_from_pretrained_kwargs = {"dtype": "float17"}
    with pytest.raises(ValueError, match=r"model_from_pretrained_kwargs\['dtype'\] must be one of"):
        open_model(given)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_by_path(streaming, tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    rows.to_json(tmp_path / "folder" / "a.jsonl")
    for path in (tmp_path / "saved", tmp_path / "folder", tmp_path / "folder" / "a.jsonl"):
        found = open_dataset(config(tmp_path, dataset_path=str(path), streaming=streaming))
        assert [row["text"] for row in found] == TEXTS
        if path.name != "saved":
            assert isinstance(found, datasets.IterableDataset) is streaming
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match="a file of an unknown kind"):
        open_dataset(config(tmp_path, dataset_path=str(tmp_path / "a.xyz")))


# --- cached activations ---


@pytest.fixture(scope="module")
def cache(saved_model, tmp_path_factory):
    """What SAELens' own runner caches of the tiny model, loaded as a Hugging Face model."""
    folder = tmp_path_factory.mktemp("cache")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    options = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=str(saved_model),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=4,
        hook_name="model.layers.1",
        d_in=32,
        training_tokens=40 * LENGTH,
        context_size=LENGTH,
        new_cached_activations_path=str(folder / "activations"),
        device="cpu",
        buffer_size_gb=40 * LENGTH * 32 * 4 / 1e9,
        shuffle=False,
        streaming=False,
        dtype="float32",
    )
    with warnings.catch_warnings():  # of fewer rows than tokens
        warnings.simplefilter("ignore", UserWarning)
        CacheActivationsRunner(options, override_dataset=rows).run()
    return folder / "activations"


def cached_config(folder, cache, **changes):
    options = {
        "cached_activations_path": str(cache),
        "hook_name": "model.layers.1",
        "exclude_special_tokens": False,
        "dictionary": COARSE,
    }
    return config(folder, **options | changes)


def test_cached_activations_come_with_their_tokens(cache, proxy):
    rows = datasets.load_from_disk(str(cache)).with_format("torch")
    stream = CachedStream(
        cache,
        "model.layers.1",
        context_size=LENGTH,
        batch_size=4,
        exclude_special_tokens=[0, 7],
        seqpos_slice=(2, None),
    )
    tokens, x = rows["token_ids"][:].long(), rows["model.layers.1"][:]
    keep = (tokens != 0) & (tokens != 7)
    keep[:, :2] = False
    batches = list(stream)
    assert torch.equal(torch.cat([batch.activations["model.layers.1"] for batch in batches]), x[keep])
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), tokens[keep])
    window, position = keep.nonzero(as_tuple=True)
    assert torch.equal(torch.cat([batch.positions for batch in batches]), position)
    assert torch.equal(torch.cat([batch.document_ids for batch in batches]), window)
    assert torch.equal(batches[1].context([0]), tokens[batches[1].sequence_ids[:1]])


def test_what_is_kept_of_a_cache_says_of_itself_what_the_cache_says(cache, proxy):
    for model in (None, proxy):
        stream = CachedStream(cache, "model.layers.1", model=model, context_size=LENGTH, exclude_special_tokens=False)
        kept = KeptStream(stream).only("model.layers.1")
        assert kept.describe() == stream.describe() and kept.device == stream.device and kept.d_in == stream.d_in
        assert list(kept.token_windows()) == list(stream.token_windows())


def test_a_run_on_cached_activations_with_and_without_the_model(cache, proxy, tmp_path):
    alone = DictionaryRunner(cached_config(tmp_path / "a", cache, profile=True, n_eval_batches=1), model=None).run()
    (built,) = alone.dictionaries.values()
    assert built.evals is None and built.profile.n_activations == built.fit.n_seen == 600
    metadata = SAE.load_from_disk(built.path).cfg.metadata
    assert metadata.hook_name == "model.layers.1" and metadata.get("model_class_name") is None
    beside = DictionaryRunner(cached_config(tmp_path / "b", cache, n_eval_batches=1), model=proxy).run()
    (evaluated,) = beside.dictionaries.values()
    assert torch.equal(evaluated.dictionary.exemplars, built.dictionary.exemplars)
    assert evaluated.evals["reconstruction_quality"]["explained_variance"] > 0
    assert SAE.load_from_disk(evaluated.path).cfg.metadata.model_class_name == "AutoModelForCausalLM"


def test_a_factorisation_and_a_resume_on_cached_activations(cache, tmp_path):
    options = {
        "dictionary": [COARSE, SNMFBuildConfig(n_components=3, sparsity=0.5, max_iter=3, held_out=0.2)],
        "n_checkpoints": 3,
    }
    first = DictionaryRunner(cached_config(tmp_path, cache, **options)).run()
    chosen = min(
        (path for path in first.checkpoint_path.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)
    )
    again = DictionaryRunner(cached_config(tmp_path, cache, **options, resume_from_checkpoint=str(chosen))).run()
    for name, built in first.dictionaries.items():
        assert torch.equal(again.dictionaries[name].dictionary.W_dec, built.dictionary.W_dec)
    assert first.dictionaries["model.layers.1_snmf_k3_s0.5"].fit.n_held_out > 0


def test_special_tokens_of_a_cache_need_a_tokenizer(cache, proxy, tmp_path):
    with pytest.raises(ValueError, match="exclude_special_tokens=True needs the tokenizer: name the model"):
        open_stream(cached_config(tmp_path, cache, exclude_special_tokens=True))
    stream = open_stream(cached_config(tmp_path, cache, exclude_special_tokens=True), model=proxy)
    assert 0 not in torch.cat([batch.token_ids for batch in stream]) and stream.prepend_bos is True


def test_an_old_cache_without_tokens(cache, tmp_path):
    datasets.load_from_disk(str(cache)).remove_columns("token_ids").save_to_disk(tmp_path / "old")
    with pytest.raises(
        ValueError, match="holds no token ids, so none can be left out: set exclude_special_tokens=False"
    ):
        open_stream(cached_config(tmp_path, tmp_path / "old", exclude_special_tokens=[3]))
    result = DictionaryRunner(cached_config(tmp_path, tmp_path / "old", profile=True)).run()
    (built,) = result.dictionaries.values()
    assert int(built.fit.provenance.token_ids.max()) == -1 and built.profile.n_activations == 600


def test_a_cache_of_another_model_is_noticed(cache, tmp_path):
    other = HookedProxyLM(models_zoo.make_hf_model("llama", seed=1), models_zoo.make_tokenizer())
    with pytest.warns(UserWarning, match="are not those that this HookedProxyLM gives"):
        stream = open_stream(cached_config(tmp_path, cache), model=other)
    assert "model_class_name" not in stream.describe()


def test_a_cache_that_does_not_fit_the_config(cache, tmp_path):
    with pytest.raises(ValueError, match="are of model.layers.1, not of 'model.layers.2'"):
        open_stream(cached_config(tmp_path, cache, hook_name="model.layers.2"))
    with pytest.raises(ValueError, match="holds windows of 16 tokens, got context_size=32"):
        open_stream(cached_config(tmp_path, cache, context_size=32))
    with pytest.raises(FileNotFoundError, match="is not a folder; give the new_cached_activations_path"):
        open_stream(cached_config(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Give cached_activations_path or a dataset, not both"):
        open_stream(cached_config(tmp_path, cache, dataset_path="x"))


@pytest.mark.parametrize("kind", ["SAETransformerBridge", "AutoModelForCausalLM", "HookedTransformer"])
@pytest.mark.parametrize(
    "arguments", [{"device_map": "auto"}, {"device_map": {"": "cpu"}, "max_memory": {"cpu": "4GB"}}, {"device": "cpu"}]
)
def test_the_loader_may_be_told_where_the_model_goes(kind, arguments, tmp_path):
    if kind == "HookedTransformer" and "device_map" in arguments:
        with pytest.raises(ValueError, match="does not know 'device_map'"):
            open_model(named(tmp_path, kind, arguments))
        return
    model = open_model(named(tmp_path, kind, arguments))
    assert next(model.parameters()).device.type == "cpu"
    assert model.tokenizer is not None


@pytest.mark.parametrize("kind", ["SAETransformerBridge", "AutoModelForCausalLM"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"": 99}}, "is no device that is there: There is no device"),
        ({"device_map": "auto", "max_memory": {"99": "1GB"}}, "A key of max_memory is no device that is there"),
        ({"n_devices": 99}, "n_devices.* (are more CUDA devices|spreads an SAETransformerBridge)"),
    ],
)
def test_devices_that_are_not_there_are_named(kind, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_model(named(tmp_path, kind, arguments))


def named(folder, kind, arguments):
    """A config of a saved model that is loaded with arguments."""
    models_zoo.make_hf_model("llama").save_pretrained(folder / "model")
    models_zoo.make_tokenizer().save_pretrained(folder / "model")
    return config(
        folder, model_name=folder / "model", model_class_name=kind, model_from_pretrained_kwargs=dict(arguments)
    )


def test_a_device_and_a_map_of_devices_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="name both a device .*'cpu'.* and how to spread"):
        open_model(named(tmp_path, "SAETransformerBridge", {"device": "cpu", "device_map": "auto"}))
