"""Directions as control vectors, through the command."""

import json
import shutil

import torch
from sae_lens import SAE
from safetensors.torch import load_file

from tests.cli.conftest import HOOK, NEURONS


def test_a_latent_as_a_control_vector(built, command, tmp_path):
    found = command("export", built["fine"], "--latent=3", f"--output_path={tmp_path / 'x.safetensors'}", "--json")
    assert found.status == 0, found.err
    (name, vector), *more = load_file(tmp_path / "x.safetensors").items()
    dictionary = SAE.load_from_disk(built["fine"])
    norm = dictionary.cfg.metadata.typical_norm
    assert not more and name == "direction.1" and found.data["hook_name"] == HOOK
    torch.testing.assert_close(vector, 0.5 * norm * dictionary.W_dec[3].detach(), rtol=1e-4, atol=1e-5)
    assert found.data["coefficient"] == 0.5 * norm
    given = command(
        "export", built["snmf"], "--latent=1", "--coefficient=-2", f"--output_path={tmp_path / 'y.safetensors'}"
    )
    assert given.status == 0 and given.out.startswith(f"-2 of latent 1 at {NEURONS}: ")
    assert load_file(tmp_path / "y.safetensors")["direction.1"].shape == vector.shape


def test_what_cannot_be_exported(built, command, tmp_path):
    for options, message in [
        (["--latent=3", f"--output_path={tmp_path / 'x.bin'}"], "must end in .gguf or .safetensors"),
        (["--latent=999999", f"--output_path={tmp_path / 'x.gguf'}"], "999999"),
        ([f"--output_path={tmp_path / 'x.gguf'}"], "--latent"),
        (["--latent=3", "--basis=median", f"--output_path={tmp_path / 'x.gguf'}"], "median"),
    ]:
        found = command("export", built["fine"], *options)
        assert found.status != 0 and message in found.err, found.err
    assert not list(tmp_path.iterdir())


def test_batches_for_neuronpedia(built, command, tmp_path):
    names = "--model_id=tiny", "--source=1-res-ep"
    found = command("neuronpedia", built["fine"], *names, f"--dry_run={tmp_path / 'batches'}", "--json")
    assert found.status == 0, found.err
    features = [one for path in (tmp_path / "batches").iterdir() for one in json.loads(path.read_text())["features"]]
    assert len(features) == found.data["n_features"] == SAE.load_from_disk(built["fine"]).cfg.d_sae
    assert all(one["topLogits"] for one in features)
    features = command("neuronpedia", built["snmf"], *names, f"--dry_run={tmp_path / 'neurons'}")
    assert features.status == 0 and features.out.startswith("4 features in 1 batches written to ")
    (batch,) = (tmp_path / "neurons").iterdir()
    assert all(one["topLogits"] for one in json.loads(batch.read_text())["features"])


def test_what_neuronpedia_has_to_know(built, command, tmp_path):
    found = command("neuronpedia", built["fine"], "--source=1-res-ep")
    assert found.status == 2 and "--model_id=gpt2-small" in found.error
    shutil.copytree(built["fine"], tmp_path / "bare")
    (tmp_path / "bare" / "profile.json").unlink()
    (tmp_path / "bare" / "profile.safetensors").unlink()
    found = command("neuronpedia", tmp_path / "bare", "--model_id=tiny", "--source=1-res-ep")
    assert found.status == 1 and "saelens-ext profile" in found.error
