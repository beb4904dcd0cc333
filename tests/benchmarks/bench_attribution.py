"""Time of attribution signatures, against one backward pass per token; prints one JSON line.

Run as ``python tests/benchmarks/bench_attribution.py`` for 64 continuations of 20 tokens on the demo model. The
signature of a continuation is the mean over its tokens, so by linearity one backward pass gives it whole. Two ways of
one pass per token are timed on the same model, the same hooks and the same sources:

- ``per_token``: every token is a target of its own, with a forward and a backward pass (in batches as large as ours);
- ``per_token_shared_forward``: one forward pass per batch, its graph kept for one backward pass per token.

Both are timed on the first ``--timed`` continuations and scaled to all. The bound is a ratio of 10 to ``per_token``.
The second is the fairer the dearer a backward pass is: with the linear backend, whose backward pass skips every MLP,
the forward pass that both share is most of the time. The three signatures must agree.

``ratio_bare`` is the time of it all over that of its forward and backward passes alone: the same batches, hooks and
sites, with gradients that nothing is done with. The bound is 1.5. ``--continuations 256 --timed 0`` is the size that it
is meant for, without the passes per token.
"""

import argparse
import json
import warnings

import torch
from _timing import add_device, place, timed
from sae_lens import SAE

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.attribution.frozen_model import traced
from saelens_ext.continuations.attribution.gradients import Passes
from saelens_ext.continuations.attribution.sites import base_sites, dictionary_sites, plan_sites
from saelens_ext.continuations.attribution.sources import read_prefix, sources_of
from saelens_ext.continuations.attribution.target import Target
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.host.models import tokenizer_of
from saelens_ext.host.prompt_passes import device_of

KINDS = ("latent", "error", "mlp", "embedding")


def random_transcoder(layer: int, d_model: int) -> SAE:
    """A dictionary of random directions, about 1 % of them active."""
    generator = torch.Generator().manual_seed(layer)
    sae = SAE.from_dict(
        {
            "architecture": "transcoder",
            "d_in": d_model,
            "d_out": d_model,
            "d_sae": 8 * d_model,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "metadata": {"hook_name": f"blocks.{layer}.ln2.hook_out", "hook_name_out": f"blocks.{layer}.mlp.hook_out"},
        }
    )
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec):
            weights.copy_(torch.randn(weights.shape, generator=generator) / d_model**0.5)
        sae.b_enc.fill_(-1.0)
    return sae


class PerToken:
    """The same signatures, one token at a time."""

    def __init__(self, model, saes, continuations, backend):
        self.model, self.saes, self.set, self.backend = model, saes, continuations, backend
        own, base = dictionary_sites(model, saes), base_sites(model, backend)
        names = [name for site in [*own, *base] for name in (site.read or site.hook, site.hook)]
        prefix = read_prefix(model, torch.tensor(continuations.prefix_ids, device=device_of(model)), names)
        self.sites = plan_sites(model, own, base, prefix.order, backend)
        self.m = len(continuations.prefix_ids)
        self.target = Target(model, "mean")
        self.sources = [
            sources_of(
                site, saes[site.dictionary] if site.has_dictionary else None, prefix, KINDS, range(self.m), 10**6
            )
            for site in self.sites
        ]

    def backward(self, trace, targets, keep):
        captured = [trace.captured[site.hook] for site in self.sites]
        found = torch.autograd.grad(targets.sum(), captured, retain_graph=keep)
        return torch.cat([part.effects(g[:, : self.m]) for part, g in zip(self.sources, found)], dim=1)

    def with_own_forward(self, rows, batch_size):
        """Each token a row of the batch."""
        length = self.set.token_ids.shape[1]
        pairs = [(row, t) for row in rows for t in range(length)]
        effects = torch.zeros(len(rows), sum(len(part.kinds) for part in self.sources))
        with traced(self.model, self.sites, self.saes, self.backend) as trace:
            for begin in range(0, len(pairs), batch_size):
                part = pairs[begin : begin + batch_size]
                ids = self.set.token_ids[[row for row, _ in part]]
                Passes(self.model, trace, self.target, self.set.prefix_ids, ids).forward()
                logits = self.target.demeaned_logits(trace.final[:, self.m - 1 : -1], ids.to(trace.final.device))
                found = self.backward(trace, logits[range(len(part)), [t for _, t in part]], False)
                for (row, _), effect in zip(part, found):
                    effects[rows.index(row)] += effect.cpu() / length
        return effects

    def bare_passes(self, rows, batch_size):
        """The forward and backward passes of the batches, and nothing else."""
        with traced(self.model, self.sites, self.saes, self.backend) as trace:
            for begin in range(0, len(rows), batch_size):
                ids = self.set.token_ids[rows[begin : begin + batch_size]]
                targets = Passes(self.model, trace, self.target, self.set.prefix_ids, ids).forward()
                torch.autograd.grad(targets.sum(), [trace.captured[site.hook] for site in self.sites])

    def with_shared_forward(self, rows, batch_size):
        """One forward pass per batch, one backward pass per column of tokens."""
        parts = []
        with traced(self.model, self.sites, self.saes, self.backend) as trace:
            for begin in range(0, len(rows), batch_size):
                ids = self.set.token_ids[rows[begin : begin + batch_size]]
                Passes(self.model, trace, self.target, self.set.prefix_ids, ids).forward()
                logits = self.target.demeaned_logits(trace.final[:, self.m - 1 : -1], ids.to(trace.final.device))
                n = logits.shape[1]
                parts.append(sum(self.backward(trace, logits[:, t], t < n - 1) for t in range(n)) / n)
        return torch.cat(parts)


def main() -> None:
    """Time all three on the same model in the same run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--continuations", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dictionaries", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backend", choices=("linear", "gradient", "relp"), default="linear")
    parser.add_argument("--timed", type=int, default=8, help="continuations timed token by token")
    add_device(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = load_demo_model(device=args.device)
    text = tokenizer_of(model)(" ".join(load_demo_corpus()["text"][:20]), verbose=False)["input_ids"]
    given = [text[i * args.tokens : (i + 1) * args.tokens] for i in range(args.continuations)]
    found = score_continuations(model, "The word that follows is the name of a", given)
    saes = [
        random_transcoder(layer, model.cfg.d_model).to(args.device) for layer in range(5, 5 + 5 * args.dictionaries, 5)
    ]
    baseline = PerToken(model, saes, found, args.backend)

    def ours():
        return attribute_continuations(
            model,
            saes,
            found,
            backend=args.backend,
            batch_size=args.batch_size,
            kinds=KINDS,
            special_positions=True,
            max_sources=10**6,
        )

    attribute_continuations(model, saes, found.select([0, 1]))  # loads what torch loads on first use
    seconds, signatures = timed(ours, args.device)
    every = list(range(args.continuations))
    bare_seconds, _ = timed(lambda: baseline.bare_passes(every, args.batch_size), args.device)
    line = {
        "benchmark": "attribute_continuations",
        "backend": args.backend,
        "continuations": args.continuations,
        "tokens": args.tokens,
        "prefix_tokens": len(found.prefix_ids),
        "sources": signatures.signatures.shape[1],
        "seconds": round(seconds, 2),
        "bare_seconds": round(bare_seconds, 2),
        "ratio_bare": round(seconds / bare_seconds, 2),
        "bound_bare": 1.5,
    }
    rows = list(range(args.timed))
    ways = {"": baseline.with_own_forward, "_shared_forward": baseline.with_shared_forward}
    for name, way in ways.items() if rows else ():
        taken, others = timed(lambda way=way: way(rows, args.batch_size), args.device)
        taken *= args.continuations / args.timed
        difference = (signatures.signatures[rows] - others.cpu()).abs().max() / signatures.signatures.abs().max()
        line |= {
            f"per_token{name}_seconds": round(taken, 2),
            f"ratio{name}": round(taken / seconds, 1),
            f"largest_difference{name}": float(difference),
        }
    print(json.dumps(line | {"timed_continuations": args.timed, "bound": 10} | place(args.device)))


if __name__ == "__main__":
    main()
