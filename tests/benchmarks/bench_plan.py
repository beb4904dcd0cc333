"""What a large build and a large audit take: rates of this machine, and a plan from them; prints one JSON line.

Run as ``python tests/benchmarks/bench_plan.py``; ``--exemplars 2000 --passes 2000`` is a quick run. Three costs are
measured as multiples of the bare matrix product of the same size, run right before: growing a partition that has its
regions already (``build``), assignment (``assign``) and profiling (``profile``). Forward passes that stop at the middle
layer are measured as the share of that product's rate that they reach (``passes``). The plan multiplies these with the
operations that each stage has, for a machine whose products run at ``--tflops``, and adds up its tensors' bytes.
"""

import argparse
import json

import torch
from _timing import add_device, place, timed

from saelens_ext.activations.matrix_stream import MatrixStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.ops.leader_clustering import LeaderClustering

HOOK = "blocks.15.hook_out"
GB = 1e9


def clustered(width: int, exemplars: int, device: str) -> tuple[LeaderClustering, torch.Tensor]:
    """A clustering with about so many regions, and activations that belong to them, one in a hundred to none."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(exemplars, width, generator=generator).to(device)
    clustering = LeaderClustering(torch.zeros(width, device=device), 0.5)
    clustering.partial_fit(anchors)
    x = anchors[torch.randint(exemplars, (4096,), generator=generator).to(device)]
    x = x + 0.5 * torch.randn(x.shape, generator=generator).to(device)
    x[::100] = torch.randn(x[::100].shape, generator=generator).to(device)
    return clustering, x


def ratios(width: int, exemplars: int, device: str) -> tuple[dict[str, float], float]:
    """Seconds of each over those of the bare product, and the rate of that, in operations a second."""
    clustering, x = clustered(width, exemplars, device)
    center = torch.zeros(width, device=device)
    regions = ExemplarPartition.from_regions(
        clustering.exemplars, clustering.member_means, center, 0.5, metadata={"hook_name": "rows"}
    )
    rows = regions.exemplars.detach()
    buffer = torch.empty(1024, len(rows), device=x.device)
    product = lambda: [torch.mm(part, rows.T, out=buffer) for part in x.split(1024)]  # noqa: E731
    work = {
        "build": lambda: clustering.partial_fit(x),
        "assign": lambda: regions.assign(x),
        "profile": lambda: profile_dictionary(regions, MatrixStream(x, "rows"), n_background=0),
    }
    found, rate = {}, 0.0
    for name, run in work.items():
        product()
        bare = timed(product, device)[0]
        found[name], rate = timed(run, device)[0] / bare, 2 * len(x) * rows.numel() / bare
    return found, rate


def passes(tokens: int, device: str) -> float:
    """Operations a second of passes through the demo model that stop at the middle layer."""
    model = load_demo_model(device=device)
    embedding = int(model.cfg.d_vocab) * int(model.cfg.d_model)  # is looked up, and the unembedding is not reached
    in_layers = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) - embedding
    used = in_layers * (int(HOOK.split(".")[1]) + 1) / int(model.cfg.n_layers)
    stream = ActivationStream(model, load_demo_corpus(), HOOK, max_tokens=tokens)
    sum(len(batch) for batch in ActivationStream(model, load_demo_corpus(), HOOK, max_tokens=200))
    seconds, n = timed(lambda: sum(len(batch) for batch in stream), device)
    return 2 * used * n / seconds


def plan(args: argparse.Namespace, ratio: dict[str, float], share: float) -> dict[str, dict[str, float]]:
    """Hours and gigabytes of each stage."""
    n, d, k, rate = args.tokens, args.plan_width, args.regions, args.tflops * 1e12
    forward, product = args.parameters * n, 2.0 * n * k * d  # half of the layers, two operations a parameter
    hours = lambda operations: round(operations / rate / 3600, 1)  # noqa: E731
    drawn = args.prompts * args.continuations * args.continuation_tokens
    audited = 2.0 * args.parameters * drawn
    return {
        "passes to the middle layer": {
            "operations": forward,
            "hours": hours(forward / share),
            "gb": args.parameters * 2 / GB,
        },
        "build": {"operations": product, "hours": hours(product * ratio["build"]), "gb": 2 * 12 * k * d / GB},
        "profile": {"operations": 2 * product, "hours": hours(product * ratio["profile"]), "gb": (8 + 8) * k * d / GB},
        "dictionary": {"gb": 8 * k * d / GB},
        "activations handed over": {"gb": 4.0 * n * d / GB},
        "sampling": {"operations": audited, "hours": hours(audited / share)},
        "attribution": {"operations": 3 * audited, "hours": hours(3 * audited / share)},
        "signatures": {"gb": 4.0 * args.prompts * args.continuations * args.sources / GB},
    }


def main() -> None:
    """Measure, and print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--exemplars", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=8_000, help="tokens of the measured passes")
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--plan-width", type=int, default=4096)
    parser.add_argument("--regions", type=int, default=100_000)
    parser.add_argument("--parameters", type=float, default=8e9, help="of the model of the plan")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--continuations", type=int, default=256)
    parser.add_argument("--continuation-tokens", type=int, default=64, help="with the prefix")
    parser.add_argument("--sources", type=int, default=5_000, help="of a signature")
    parser.add_argument("--tflops", type=float, default=100.0, help="rate of products of the machine of the plan")
    add_device(parser)
    args = parser.parse_args()
    ratio, rate = ratios(args.width, args.exemplars, args.device)
    share = passes(args.passes, args.device) / rate
    result = {
        "benchmark": "plan",
        "exemplars": args.exemplars,
        "width": args.width,
        "over_product": {name: round(value, 2) for name, value in ratio.items()},
        "passes_share_of_product_rate": round(share, 2),
        "product_gflops": round(rate / 1e9),
        "tflops_of_the_plan": args.tflops,
        "plan": plan(args, ratio, share),
    }
    print(json.dumps(result | place(args.device)))


if __name__ == "__main__":
    main()
