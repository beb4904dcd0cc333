"""Random dictionaries at every kind of hook, for tests of attribution."""

import torch
from sae_lens import SAE

from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.snmf import SNMFDictionary
from tests.models_zoo import D_MLP, D_MODEL


def make(architecture, hook, d_in=D_MODEL, *, write=None, d_out=None, d_sae=24, seed=0, **options):
    """A SAELens SAE or transcoder with random weights; with ``write`` it is a transcoder."""
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": write is None,
        "metadata": {"hook_name": hook, "hook_name_out": write},
    }
    if write is not None:
        config["d_out"] = d_out or d_in
    sae = SAE.from_dict(config | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "threshold" in name:
                parameter.abs_()
    return sae


def own(d_mlp):
    """One of each of this package's dictionaries: regions of an MLP output, and groups of another MLP's neurons."""
    generator = torch.Generator().manual_seed(5)
    units = torch.nn.functional.normalize(torch.randn(24, D_MODEL, generator=generator), dim=1)
    center = 0.1 * torch.randn(D_MODEL, generator=generator)
    place = {"hook_name": "blocks.0.hook_mlp_out"}
    regions = ExemplarPartition.from_regions(units[:12], units[12:], center, 0.8, k=3, metadata=place)
    features = torch.randn(9, d_mlp, generator=generator)
    return [regions, SNMFDictionary.from_features(features, metadata={"hook_name": "blocks.2.mlp.hook_post"})]


def cases(architecture):
    """Dictionaries by what is special about where they are; a place is named as HookedTransformer names it."""
    d_mlp = D_MLP[architecture]
    mlp_out = "blocks.{}.hook_mlp_out"
    return {
        "none": [],
        "stream": [make("standard", "blocks.1.hook_resid_post")],
        "middle": [make("standard", "blocks.1.hook_resid_mid")],
        "input": [make("standard", "blocks.0.hook_resid_pre")],
        "embedding": [make("standard", "hook_embed")],
        "mlp": [make("jumprelu", mlp_out.format(1))],
        "normalising": [make("topk", mlp_out.format(0), k=5, normalize_activations="layer_norm")],
        "neurons": [make("standard", "blocks.1.mlp.hook_post", d_mlp)],
        "attention": [make("standard", "blocks.1.hook_attn_out")],
        "heads": [make("standard", "blocks.2.attn.hook_z")],
        "transcoders": [
            make("transcoder", f"blocks.{i}.hook_resid_mid", write=mlp_out.format(i), seed=i) for i in (0, 2)
        ],
        "skip": [
            make("skip_transcoder", f"blocks.{i}.hook_resid_mid", write=mlp_out.format(i), seed=i) for i in (1, 2)
        ],
        "own": own(d_mlp),
        "several": [
            make("standard", "blocks.0.hook_resid_post"),
            make("standard", mlp_out.format(1)),
            make("jumprelu", "blocks.1.hook_resid_post", seed=1),
            make("standard", "blocks.2.mlp.hook_post", d_mlp),
        ],
    }
