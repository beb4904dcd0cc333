"""What planting a refusal changes in the demo model, as compare_models sees it; prints one JSON line per comparison.

Run as ``python tests/benchmarks/bench_compare_models.py``: the demo model against the organism with a planted refusal,
and against itself, where nothing was trained. Partitions are made of the prompts that the organism was trained with,
in the chat template, and of documents of the demo corpus; the prompts judged are others.
"""

import argparse
import json
import time
import warnings

import torch

import saelens_ext as sx
from saelens_ext.demo.organism import load_organism, organism_prompts
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.host.chat_template import asked


def texts_of(model, n_chats, n_corpus):
    """Chats of either kind, and documents of the corpus cut to one window."""
    prompts = [prompt for side in organism_prompts("train") for prompt in side]
    chats = [asked(model.tokenizer, prompt, chat_template=True).text for prompt in prompts]
    return chats + [text[:400] for text in load_demo_corpus()["text"][:n_corpus]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hook", default="blocks.20.hook_out")
    parser.add_argument("--percentile", type=float, default=4.0)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--corpus", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--against", nargs="+", default=["organism", "itself"])
    parser.add_argument("--calibration", default="base")
    parser.add_argument("--html", default=None)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    base, organism = load_demo_model(), load_organism()
    new = organism_prompts("new")
    prompts = {name: list(side[: arguments.prompts]) for name, side in zip(new._fields, new)}
    texts = texts_of(base, arguments.chats, arguments.corpus)
    for name in arguments.against:
        tuned = {"organism": organism, "itself": base}[name]
        start = time.process_time()
        found = sx.compare_models(
            base, tuned, texts, hook_name=arguments.hook, prompts=prompts, chat_template=True,
            percentile=arguments.percentile, n_replicas=arguments.replicas, calibration=arguments.calibration,
        )  # fmt: skip
        seconds = time.process_time() - start
        if arguments.html and name == "organism":
            found.save_html(arguments.html)
        gained = found.gained().head(5)
        regions = found.shift.regions
        print(
            json.dumps(
                {
                    "bench": "compare_models",
                    "tuned": name,
                    **vars(arguments),
                    "seconds": round(seconds, 1),
                    "regions": {side: [fit.n_regions for fit in own.values()] for side, own in found.fits.items()},
                    "activations": found.profiles["first"].n_activations,
                    "verdict": found.verdict().split("\n"),
                    "states": found.checkpoints.by_quintile().to_dict("records"),
                    "shift": found.shift.summary().round(3).to_dict("records"),
                    "gained": gained.assign(contexts=gained["contexts"].str[:2]).to_dict("records"),
                    "shifted": regions[regions["p_holm"] < 0.05].round(4).to_dict("records"),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
