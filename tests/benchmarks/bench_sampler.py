"""How far log-probabilities of rounded weights lie from those of the same model in float32; prints JSON lines.

The model of the demo draws through ``HuggingFaceSampler`` in other dtypes, and with the weights of its linear layers
rounded to so many bits, 32 of them to a scale. Figures are nats per token, over 24 continuations of each of 3 prefixes.
"""

import argparse
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.samplers.hugging_face_sampler import HuggingFaceSampler
from saelens_ext.demo.packaged import cache_directory, load_demo_model

PREFIXES = ("The assert statement", "Once upon a time", "def main():")
KINDS = ("float32", "float16", "bfloat16", "8", "4")


def loaded(kind: str, group: int = 32) -> Any:
    """The model in a dtype, or in float32 with weights of so many bits."""
    dtype = getattr(torch, kind, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(cache_directory() / "SmolLM2-135M-Instruct", dtype=dtype)
    for name, module in model.named_modules() if kind.isdigit() else ():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            parts = module.weight.data.view(len(module.weight), -1, group)
            scale = parts.abs().amax(dim=-1, keepdim=True) / (2 ** (int(kind) - 1) - 1)
            module.weight.data = ((parts / scale).round() * scale).view_as(module.weight)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="dtypes, and numbers of bits")
    parser.add_argument("--n", type=int, default=24, help="continuations of each prefix")
    arguments = parser.parse_args()
    model = load_demo_model()
    for kind in arguments.kinds:
        sampler = HuggingFaceSampler(loaded(kind), model.tokenizer)
        options = {"top_p": 1.0, "max_new_tokens": 20, "sampler": sampler}
        found = [sample_continuations(model, one, arguments.n, **options) for one in PREFIXES]
        differences = [one.metadata["sampling"]["log_prob_difference"] for one in found]
        means = {name: sum(one[name] for one in differences) / len(found) for name in ("mean_absolute", "mean")}
        print(json.dumps({"weights": kind, **{name: round(value, 4) for name, value in means.items()}}), flush=True)


if __name__ == "__main__":
    main()
