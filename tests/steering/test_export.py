"""A control vector does in the plain Hugging Face model what the direction does in the host's."""

import gguf
import pytest
import torch
from safetensors import safe_open
from torch import nn

from saelens_ext import add_direction, export_direction
from saelens_ext.steering import export
from tests.architectures._hosts import LAYER, TOKENS, shared_model
from tests.models_zoo import HOSTED, ZOO, make_hf_model, make_model

COEFFICIENT = 1.7


def read_gguf(path) -> tuple[dict[int, torch.Tensor], str]:
    """As repeng reads a control vector."""
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == len(reader.tensors)
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    directions = {int(tensor.name.removeprefix("direction.")): torch.tensor(tensor.data) for tensor in reader.tensors}
    return directions, reader.get_field("controlvector.model_hint").contents()


@torch.no_grad()
def steered_by_hand(architecture: str, directions: dict[int, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the Hugging Face model with vectors added to what its blocks put out."""
    hf_model = make_hf_model(architecture)
    n_layers = hf_model.config.num_hidden_layers
    (blocks,) = [part for part in hf_model.modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers]

    def adding(vector):
        def add(module, arguments, output):
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return add

    for layer, vector in directions.items():
        blocks[layer].register_forward_hook(adding(vector))
    return hf_model(TOKENS).logits.log_softmax(dim=-1)


def expected_refusal(row, place: str) -> bool:
    """Whether what a direction does to the block's output depends on the activations."""
    if place == "mlp.hook_post":
        return row.post_norm or row.experts
    return (place == "hook_attn_out" and not row.parallel) or place == "hook_resid_mid"


PLACES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "mlp.hook_post", "hook_resid_post")


@pytest.mark.parametrize(("architecture", "model_class"), HOSTED)
def test_a_control_vector_is_the_direction(architecture, model_class, tmp_path):
    row, model = ZOO[architecture], shared_model(architecture, model_class)
    for layer, place in [(LAYER, place) for place in PLACES] + [(LAYER + 1, "hook_resid_pre")]:
        hook_name = f"blocks.{layer}.{place}"
        width = row.d_mlp if place == "mlp.hook_post" else model.cfg.d_model
        direction = torch.randn(width, generator=torch.Generator().manual_seed(3))
        arguments = (model, hook_name, direction, COEFFICIENT, tmp_path / f"{place}.gguf")
        if expected_refusal(row, place) or (layer == LAYER and place == "hook_resid_pre"):
            with pytest.raises(ValueError, match="control vector|no single output matrix|has no hook"):
                export_direction(*arguments)
            continue
        directions, hint = read_gguf(export_direction(*arguments))
        assert list(directions) == [LAYER] and hint == make_hf_model(architecture).config.model_type
        with torch.no_grad(), add_direction(model, hook_name, direction, COEFFICIENT):
            expected = model(TOKENS).log_softmax(dim=-1)
        torch.testing.assert_close(steered_by_hand(architecture, directions), expected, rtol=1e-3, atol=1e-3)


def test_a_safetensors_file_holds_the_same(tiny_bridge, tmp_path):
    direction = torch.randn(tiny_bridge.cfg.d_model)
    vectors, hint = read_gguf(export_direction(tiny_bridge, "blocks.1.hook_out", direction, -2.0, tmp_path / "x.gguf"))
    torch.testing.assert_close(vectors[1], -2.0 * direction / direction.norm(), rtol=1e-4, atol=1e-5)
    path = export_direction(tiny_bridge, "blocks.1.hook_out", direction, -2.0, tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("direction.1"), vectors[1])
        assert file.metadata()["controlvector.model_hint"] == hint == "llama"


def test_half_precision_and_hooks_of_the_user(tiny_bridge, tmp_path):
    direction = torch.randn(tiny_bridge.cfg.d_model)
    arguments = ("blocks.1.hook_out", direction, 3.0, tmp_path / "x.gguf")
    exact = read_gguf(export_direction(tiny_bridge, *arguments))[0][1]
    seen = []
    with tiny_bridge.hooks(fwd_hooks=[("blocks.1.hook_out", lambda x, hook: seen.append(0) or x * 2)]):
        assert torch.allclose(read_gguf(export_direction(tiny_bridge, *arguments))[0][1], exact, atol=1e-5)
    half = make_model("llama", "SAETransformerBridge").to(torch.bfloat16)
    rounded = read_gguf(export_direction(half, *arguments))[0][1]
    assert torch.allclose(rounded, exact, atol=0.05)


def test_what_cannot_be_exported(tiny_bridge, tmp_path):
    direction = torch.ones(tiny_bridge.cfg.d_model)
    with pytest.raises(ValueError, match=r"must end in \.gguf or \.safetensors, got .*x\.bin"):
        export_direction(tiny_bridge, "blocks.1.hook_out", direction, 1.0, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="must not be 0"):
        export_direction(tiny_bridge, "blocks.1.hook_out", direction, 0, tmp_path / "x.gguf")
    for hook_name in ("hook_embed", "blocks.0.hook_resid_pre", "blocks.0.hook_out", "blocks.1.hook_resid_pre"):
        with pytest.raises(ValueError, match="block 1"):
            export_direction(tiny_bridge, hook_name, direction, 1.0, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="ln_final.*no control vector"):
        export_direction(tiny_bridge, "ln_final.hook_in", direction, 1.0, tmp_path / "x.gguf")


def test_a_full_disk_leaves_nothing_behind(tiny_bridge, tmp_path, monkeypatch):
    def full(path, *args):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setitem(export._WRITERS, ".gguf", full)
    with pytest.raises(OSError, match="No space"):
        export_direction(tiny_bridge, "blocks.1.hook_out", torch.ones(32), 1.0, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
