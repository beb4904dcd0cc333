"""Time of asking prompts under ablations, against plain batched generation of as many tokens; prints one JSON line.

Run as ``python tests/benchmarks/bench_behaviour.py`` for 200 prompts, 8 conditions and 28 tokens on the demo model. The
prompts are questions of one shape, so that they have few lengths, as in both runs; no answer ends early in one run and
not in the other, since times are per token. Times are those of the processor. The bound is a ratio of 3.
"""

import argparse
import json
import time
import warnings

import torch

from saelens_ext.demo.packaged import load_demo_model
from saelens_ext.evals.behaviour.passes import Asking, Condition
from saelens_ext.host.continued_text import ids_after
from saelens_ext.steering.behaviour import begins_with
from saelens_ext.steering.sampling import SamplingOptions, sample_texts

BOUND = 3.0
WORDS = ("bread", "rivers", "copper", "violins", "winter", "maps", "engines", "salt", "birds", "glass")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--conditions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=28)
    parser.add_argument("--hook", default="blocks.15.hook_out")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = load_demo_model()
    n = arguments.prompts
    prompts = [f"Question {i + 100}: what do {WORDS[i % 10]} and {WORDS[i // 10 % 10]} share?" for i in range(n)]
    generator = torch.Generator().manual_seed(0)
    d = int(model.cfg.d_model)
    conditions = [Condition(name="no ablation")] + [
        Condition(name=str(i), directions=torch.randn(1, d, generator=generator))
        for i in range(arguments.conditions - 1)
    ]
    asking = Asking(
        model=model, behaviour=begins_with(), chat_template=False, max_new_tokens=arguments.tokens,
        centers={arguments.hook: torch.zeros(d)},
    )  # fmt: skip
    options = SamplingOptions(max_new_tokens=arguments.tokens, temperature=0)
    start = time.process_time()
    plain = sample_texts(model, prompts, n=len(conditions), options=options, batch_size=64)
    between = time.process_time()
    asked = asking.ask(prompts, conditions)
    end = time.process_time()
    n_plain = sum(len(ids) for text, each in zip(prompts, plain) for ids in ids_after(model, text, each))
    n_asked = sum(
        len(ids)
        for verdicts in asked
        for text, one in zip(prompts, verdicts)
        for ids in ids_after(model, text, [one.text])
    )
    ratio = ((end - between) / n_asked) / ((between - start) / n_plain)
    print(
        json.dumps(
            {
                "bench": "behaviour",
                "prompts": n,
                "conditions": len(conditions),
                "tokens": arguments.tokens,
                "seconds_plain": round(between - start, 1),
                "seconds_ablated": round(end - between, 1),
                "tokens_plain": n_plain,
                "tokens_ablated": n_asked,
                "ratio": round(ratio, 2),
                "bound": BOUND,
                "within_bound": ratio <= BOUND,
            }
        )
    )


if __name__ == "__main__":
    main()
