"""Explain latents with delphi (eai-delphi 0.1.3) for dictionaries of this package, asking a loopback judge.

    python -m venv delphi
    delphi/bin/pip install torch==2.13.0
    delphi/bin/pip install torch==2.13.0 saelens-ext faiss-cpu orjson blobfile aiofiles asyncer
    delphi/bin/pip install --no-deps eai-delphi==0.1.3 eai-sparsify
    python tests/harnesses/prepare_inputs.py FOLDER                      # in the development environment
    delphi/bin/python tests/harnesses/run_delphi.py FOLDER

(--no-deps: it asks for vllm and bitsandbytes, which are for judges on a GPU; an empty module stands for the client that
uses vllm here.)
"""

import asyncio
import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.harnesses import faked_hub
from tests.harnesses.openai_stub import openai_stub
from tests.harnesses.prepare_inputs import LAYER, REPO

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT, WINDOW, SEQUENCES, LATENTS = 64, 32, 128, 8
# The Hugging Face module at which delphi reads, and whether it reads what goes in (neurons) or comes out.
PLACES = {
    "exemplar_partition": (f"model.layers.{LAYER}", False),
    "snmf": (f"model.layers.{LAYER}.mlp.down_proj", True),
    "topk": (f"model.layers.{LAYER}", False),
}


def main(folder: Path) -> None:
    """Cache, sample and explain the most active latents of each dictionary."""
    faked_hub.use_only(folder / "home")
    sys.modules["delphi.clients.offline"] = types.SimpleNamespace(Offline=None)
    import torch
    from delphi.clients.openrouter import OpenRouter
    from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
    from delphi.explainers import DefaultExplainer
    from delphi.latents import LatentCache, LatentDataset
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import saelens_ext  # noqa: F401 (registers the architectures)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rows = [
        json.loads(line)["text"]
        for line in (folder / "data/Skylion007/openwebtext/train.jsonl").read_text().splitlines()
    ]
    ids = torch.tensor(tokenizer("\n".join(rows))["input_ids"])[: SEQUENCES * CONTEXT].reshape(SEQUENCES, CONTEXT)
    for name, (place, before) in PLACES.items():
        sae = SAE.from_pretrained(REPO, name)
        cache = LatentCache(model, {place: sae.encode}, batch_size=16, transcode=before)
        cache.run(ids.numel(), ids)
        raw = folder / "results" / "delphi" / name
        cache.save_splits(1, raw)
        cache.save_config(
            raw, CacheConfig(cache_ctx_len=CONTEXT, batch_size=16, n_tokens=ids.numel(), n_splits=1), MODEL
        )
        chosen = cache.hookpoint_firing_counts[place].topk(LATENTS).indices.sort().values
        dataset = LatentDataset(
            raw,
            SamplerConfig(n_examples_train=8, n_examples_test=4, n_quantiles=4, train_type="mix"),
            ConstructorConfig(example_ctx_len=WINDOW, min_examples=12, n_non_activating=5),
            tokenizer,
            modules=[place],
            latents={place: chosen},
        )
        records = list(dataset)
        with openai_stub() as (url, requests):
            explainer = DefaultExplainer(OpenRouter("a judge", base_url=f"{url}/chat/completions"))
            explanations = [asyncio.run(explainer(record)).explanation for record in records[:1]]
        print(
            json.dumps(
                {
                    "dictionary": name,
                    "latents": len(chosen),
                    "with enough examples": len(records),
                    "with non-activating windows": sum(bool(record.not_active) for record in records),
                    "asked": len(requests),
                    "explanation": explanations,
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
