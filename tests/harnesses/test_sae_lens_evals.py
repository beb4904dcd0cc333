"""SAELens' own harness on dictionaries of this package, run as it is: by object, and by name from a (faked) hub."""

import warnings

import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, evals
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_ext import ExemplarPartition, SNMFDictionary
from tests import models_zoo
from tests.harnesses.faked_hub import snapshot_of

MODEL, RELEASE, REPO = "gpt2", "ours", "someone/dictionaries"
CONTEXT = 16
RESIDUAL, NEURONS = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"


def unit_rows(n: int, d: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)


def dictionaries() -> dict[str, SAE]:
    metadata = {"model_name": MODEL, "context_size": CONTEXT, "prepend_bos": True}
    rows = unit_rows(24, models_zoo.D_MODEL)
    return {
        "partition": ExemplarPartition.from_regions(
            rows, rows, torch.zeros(models_zoo.D_MODEL), 0.7, k=3, metadata=metadata | {"hook_name": RESIDUAL}
        ),
        "neurons": SNMFDictionary.from_features(
            torch.randn(10, models_zoo.D_MLP["gpt2"], generator=torch.Generator().manual_seed(1)),
            metadata=metadata | {"hook_name": NEURONS},
        ),
    }


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_texts):
    """A hub cache with a tiny random model called gpt2 and our dictionaries, known to SAELens as a release; a
    corpus.
    """
    home = tmp_path / "home"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # TransformerLens sends the name through its own alias first.
    for name in (MODEL, f"openai-community/{MODEL}"):
        model = models_zoo.make_hf_model("gpt2")
        model.config.n_ctx = models_zoo.N_CTX  # in the published config, and read by TransformerLens
        model.save_pretrained(snapshot_of(home, name))
        models_zoo.make_tokenizer().save_pretrained(snapshot_of(home, name))
    made = dictionaries()
    for name, dictionary in made.items():
        dictionary.save_model(snapshot_of(home, REPO) / name)
    same, zeros = {name: name for name in made}, dict.fromkeys(made, 0.0)
    monkeypatch.setitem(
        get_pretrained_saes_directory(),
        RELEASE,
        PretrainedSAELookup(RELEASE, REPO, MODEL, None, same, zeros, zeros, dict.fromkeys(made), {}, None),
    )
    Dataset.from_dict({"text": list(tiny_texts) * 8}).to_json(tmp_path / "corpus" / "train.jsonl")
    return tmp_path


def finite(metrics: dict) -> bool:
    return all(torch.isfinite(torch.tensor(value)) for group in metrics.values() for value in group.values())


@pytest.mark.slow
def test_multiple_evals_finds_loads_and_evaluates_both(hub):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = evals.multiple_evals(
            RELEASE,
            ".*",
            1,
            1,
            eval_batch_size_prompts=4,
            datasets=[str(hub / "corpus")],
            ctx_lens=[CONTEXT],
            output_dir=str(hub / "results"),
        )
    written = evals.process_results(results, str(hub / "results"))
    assert [result["sae_cfg"]["architecture"] for result in results] == ["exemplar_partition", "snmf"]
    assert all(finite(result["metrics"]) for result in results)
    assert results[0]["metrics"]["sparsity"]["l0"] == pytest.approx(3, abs=0.5)
    assert written["csv"].exists() and written["combined_json"].exists()


def test_run_evals_on_the_object_gives_what_multiple_evals_gives_on_the_name(hub):
    settings = evals.get_eval_everything_config(batch_size_prompts=4, n_eval_reconstruction_batches=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (by_name,) = evals.multiple_evals(
            RELEASE,
            "partition",
            1,
            1,
            eval_batch_size_prompts=4,
            datasets=[str(hub / "corpus")],
            ctx_lens=[CONTEXT],
            output_dir=str(hub / "results"),
        )
        sae = dictionaries()["partition"]
        model = models_zoo.make_model("gpt2", "HookedSAETransformer")
        store = ActivationsStore.from_sae(model, sae, str(hub / "corpus"), context_size=CONTEXT, device="cpu")
        store.shuffle_input_dataset(seed=42)
        metrics, features = evals.run_evals(sae, store, model, ActivationScaler(), settings)
    for group, values in metrics.items():
        assert values == pytest.approx(by_name["metrics"][group], rel=1e-3), group
    assert len(features["encoder_norm"]) == sae.cfg.d_sae


def test_what_multiple_evals_reads_of_the_metadata_is_there_on_a_dictionary_from_the_hub(hub):
    """In ``sae_lens/evals.py``: the model's name and, unpacked whether given or not, how to load it."""
    sae = SAE.from_pretrained(RELEASE, "partition")
    assert sae.cfg.metadata.model_name == MODEL
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {}


def test_keyword_arguments_recorded_at_the_build_are_kept():
    rows = unit_rows(4, 8)
    given = {"center_writing_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = ExemplarPartition.from_regions(
            rows, rows, torch.zeros(8), 0.7, metadata={"model_from_pretrained_kwargs": given}
        )
    assert sae.cfg.metadata.model_from_pretrained_kwargs == given
