"""Directions as control vectors, through the command."""

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
