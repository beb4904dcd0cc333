"""Time five percentiles in one pass against one, end to end on the demo model; prints one JSON line.

Run as ``python tests/benchmarks/bench_fit.py``; ``--tokens 5000`` is a quick run. ``ratio`` is the median over
``--repeats`` of (five percentiles) / (one percentile, run right before). ``over_passes`` is one
percentile over the bare passes that stop at the hook, run right after. ``stopped_ratio`` compares a pass over the
stream, which ends at the hooked layer, with full forward passes over the same windows. ``saved_ratio`` is bytes of
``cfg.json`` and ``sae_weights.safetensors`` over bytes of the exemplar matrix, at the finest percentile.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from _timing import add_device, place, timed

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.cli.tour.tour import HOOK, PERCENTILES
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions


@torch.no_grad()
def full_passes(model, stream: ActivationStream) -> None:
    """Whole forward passes over the windows of a stream."""
    for batch in stream:
        model(batch.windows.clamp_min(0).to(stream.device))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=2)
    add_device(parser)
    args = parser.parse_args()

    model = load_demo_model(device=args.device)
    stream = ActivationStream(model, load_demo_corpus(), HOOK, max_tokens=args.tokens)
    ratios, over_passes, regions = [], [], {}
    for _ in range(args.repeats):
        one, _ = timed(lambda: fit_exemplar_partitions(stream, PERCENTILES[-1:]), args.device)
        five, fits = timed(lambda: fit_exemplar_partitions(stream, PERCENTILES), args.device)
        ratios.append(five / one)
        over_passes.append(one / timed(lambda: sum(len(batch) for batch in stream), args.device)[0])
        regions = {percentile: fit.n_regions for (_, percentile), fit in fits.items()}
    finest = fits[HOOK, PERCENTILES[0]].dictionary
    with tempfile.TemporaryDirectory() as directory:
        saved = sum(Path(file).stat().st_size for file in finest.save_model(directory))
    short = ActivationStream(model, load_demo_corpus(), HOOK, max_tokens=min(args.tokens, 4000))
    stopped, _ = timed(lambda: sum(len(batch) for batch in short), args.device)
    # Reading the stream is part of this call, so what is left of it are the full passes.
    full = timed(lambda: full_passes(model, short), args.device)[0] - stopped
    result = {
        "benchmark": "fit",
        "tokens": args.tokens,
        "regions": regions,
        "one_percentile_s": round(one, 1),
        "five_percentiles_s": round(five, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "bound": 1.3,
        "over_passes": round(statistics.median(over_passes), 3),
        "over_passes_bound": 1.15,
        "stopped_ratio": round(stopped / full, 3),
        "saved_ratio": round(saved / (4 * finest.exemplars.numel()), 3),
        "saved_bound": 2.2,
    }
    print(json.dumps(result | place(args.device)))


if __name__ == "__main__":
    main()
