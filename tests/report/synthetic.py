"""Fits, profiles and lenses made up for the report's tests, with the texts most likely to break a page."""

from functools import cache
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saelens_ext.analysis.examples import Examples
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_result import ExemplarFitResult, Provenance
from saelens_ext.ops.calibration import ThresholdEstimate
from saelens_ext.report.dictionary.regions import region_data

HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script>",
    "<!--",
    "-->",
    "<![CDATA[",
    '<img src=x onerror="window.pwned=1">',
    "\"';--",
    "\\u003cscript\\u003e\\",
    "\u202eright to left",
    "\u200f",
    "\u2028",
    "\u2029",
    "👩\u200d💻",
    "&lt;b&gt;",
    "{{ 7*7 }}",
    "{% raw %}",
    "${window.pwned=1}",
    "javascript:window.pwned=1",
    "\x00",
    "\x1b[31m",
    "\t\t",
    "\n\n",
    "  ",
    "unbroken" * 400,
    "שלום",
    "مرحبا",
)
WINDOW = 96
CONTEXT = 8


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, each hostile text one token of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.values())[:25], trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def _corpus(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    text = "\n".join(topics[name] for name in sorted(topics)[:40]) + " naïve 🙂 日本語 " * 20
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def make_windows(tokenizer: PreTrainedTokenizerFast, n: int) -> Tensor:
    """Windows of real text in order, every fourth salted with hostile tokens, some short; int64 (n, WINDOW), -1
    padded.
    """
    ids = _corpus(tokenizer)
    starts = torch.arange(n) * (WINDOW - 1) % (len(ids) - WINDOW)
    windows = ids[starts[:, None] + torch.arange(WINDOW)]
    windows[:, 0] = tokenizer.bos_token_id
    hostile = torch.tensor(tokenizer.convert_tokens_to_ids(list(HOSTILE)))
    for row in range(0, n, 4):
        windows[row, 5 + 3 * torch.arange(len(HOSTILE))] = hostile.roll(row // 4)
    windows[3::7, WINDOW // 2 :] = -1
    return windows


def make_fit(
    tokenizer: PreTrainedTokenizerFast,
    k: int,
    *,
    percentile: float | None = 4.0,
    n_seen: int | None = None,
    seed: int = 0,
    **metadata: Any,
) -> ExemplarFitResult:
    """A fit of k regions; their figures are random but possible."""
    random = torch.Generator().manual_seed(seed)
    n_seen = n_seen or 20 * k
    exemplars = torch.nn.functional.normalize(torch.randn(k, 24, generator=random), dim=1)
    windows = make_windows(tokenizer, k)
    lengths = (windows >= 0).sum(dim=1)
    positions = 1 + (torch.rand(k, generator=random) * (lengths - 1)).long()
    # Put the marked token of some salted windows on a hostile token, each in turn.
    positions[::4] = torch.minimum(5 + 3 * (2 * torch.arange(len(positions[::4])) % len(HOSTILE)), lengths[::4] - 1)
    indices = torch.cat(
        [torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(n_seen - 1, generator=random)[: k - 1].sort().values]
    )
    counts = torch.randint(1, 30, (k,), generator=random)
    theta = 0.7 + percentile / 100 if percentile else 0.815
    given = ThresholdEstimate.given(theta)
    estimate = ThresholdEstimate(
        percentile=percentile, threshold=theta, low=theta - 0.0123, high=theta + 0.0087, n_pairs=1_234_567
    )
    description = {
        "model_name": "tiny-llama",
        "model_class_name": "SAETransformerBridge",
        "hook_name": "blocks.2.hook_out",
        "context_size": WINDOW,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "n_layers": 3,
        "d_model": 24,
        "dtype": "torch.float32",
    } | metadata
    center = torch.zeros(24)
    return ExemplarFitResult(
        dictionary=ExemplarPartition.from_regions(
            exemplars, exemplars, center, theta, percentile=percentile, metadata=description
        ),
        hook_name="blocks.2.hook_resid_post",
        percentile=percentile,
        threshold=estimate if percentile else given,
        stopped_because="end_of_stream",
        n_seen=n_seen,
        n_undirected=0,
        unseen_mass=int((counts == 1).sum()) / n_seen,
        unseen_mass_upper=0.0321,
        typical_norm=7.5,
        counts=counts,
        coherence=torch.rand(k, generator=random),
        exemplar_indices=indices,
        provenance=Provenance(
            document_ids=torch.arange(k) // 3,
            sequence_ids=torch.arange(k),
            positions=positions,
            token_ids=windows[torch.arange(k), positions],
            windows=windows,
        ),
    )


def make_examples(fit: ExemplarFitResult, n: int, *, descending: bool, full: bool, seed: int) -> Examples:
    """Examples from the windows of other regions; unless ``full``, some places and some whole regions are empty."""
    random = torch.Generator().manual_seed(seed)
    k, length = fit.provenance.windows.shape
    rows = torch.randint(0, k, (k, n), generator=random)
    positions = torch.randint(1, length // 2, (k, n), generator=random)
    padded = torch.nn.functional.pad(fit.provenance.windows, (CONTEXT, CONTEXT), value=-1)
    contexts = padded[rows[..., None], positions[..., None] + torch.arange(2 * CONTEXT + 1)]
    values = torch.rand(k, n, generator=random).sort(dim=1, descending=descending).values
    if not full:
        kept = torch.randint(0, n + 1, (k, 1), generator=random)
        empty = torch.arange(n) >= kept
        values[empty], positions[empty], contexts[empty] = torch.nan, -1, -1
    return Examples(
        values=values,
        token_ids=contexts[..., CONTEXT],
        document_ids=torch.where(positions < 0, -1, rows // 3),
        positions=positions,
        contexts=contexts.int(),
    )


def make_profile(fit: ExemplarFitResult, *, n_examples: int = 10, seed: int = 1) -> DictionaryProfile:
    """A profile of the fit's dictionary with heavy-tailed masses; with three regions or more, the last has no
    member.
    """
    random = torch.Generator().manual_seed(seed)
    k = fit.n_regions
    counts = (40 * torch.rand(k, generator=random) ** -0.9).long().clamp(max=5000)
    mean = 0.2 + 0.4 * torch.rand(k, generator=random)
    coherence, farthest = 1 - mean * torch.rand(k, generator=random), mean + 0.35
    if k >= 3:
        counts[-1] = 0
        coherence[-1] = mean[-1] = farthest[-1] = torch.nan
    return DictionaryProfile(
        hook_name=fit.hook_name,
        hook_aliases=(fit.hook_name,),
        n_activations=int(counts.sum()) + 5,
        n_unassigned=5,
        context=CONTEXT,
        latent_names=tuple(f"region {i}" for i in range(k)),
        counts=counts,
        mean_activation=torch.rand(k, generator=random),
        max_activation=torch.rand(k, generator=random),
        top=make_examples(fit, n_examples, descending=False, full=True, seed=2),
        boundary=make_examples(fit, 5, descending=True, full=False, seed=3),
        coherence=coherence,
        mean_distance=mean,
        max_distance=farthest,
    )


def make_lens(fit: ExemplarFitResult, tokenizer: PreTrainedTokenizerFast, *, n: int = 10, seed: int = 4) -> LensResult:
    """A lens that promotes hostile tokens among others."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, len(tokenizer), (2, fit.n_regions, n), generator=random)
    ids[0, :, 1] = torch.tensor(tokenizer.convert_tokens_to_ids(list(HOSTILE)))[
        torch.arange(fit.n_regions) % len(HOSTILE)
    ]
    logits = (9 * torch.rand(2, fit.n_regions, n, generator=random)).sort(dim=2, descending=True).values
    return LensResult(
        promoted_ids=ids[0], promoted_logits=logits[0], suppressed_ids=ids[1], suppressed_logits=-logits[1]
    )


EVALS = {
    "model_behavior_preservation": {"kl_div_score": 0.61234, "kl_div_with_ablation": 8.25, "kl_div_with_sae": 3.198},
    "model_performance_preservation": {"ce_loss_score": 0.7, "ce_loss_without_sae": 3.1, "ce_loss_with_sae": 5.0},
    "reconstruction_quality": {
        "explained_variance": float("nan"),
        "mse": 12345.678,
        "cossim": 0.8125,
        "an_unknown_figure": 0.000012,
    },
    "sparsity": {"l0": 1.0, "l1": 6.125},
    "token_stats": {"total_tokens_eval_reconstruction": 8192, "total_tokens_eval_sparsity_variance": 4096},
}

GENERATIONS = [
    {"label": "Unsteered", "prompt": "The capital of France", "text": " is Paris.\nIt lies on the Seine."},
    {
        "label": "Steered along region 7",
        "prompt": "The capital of France",
        "text": 'The capital of France </p><script>window.pwned=1</script> & "friends" \u202eabc',
    },
    {"label": "Region 7 ablated", "prompt": "The capital of France", "text": " is" + " " + "long" * 200},
]


def make_inputs(k: int = 220) -> SimpleNamespace:
    """All arguments of a report on the middle one of three fits."""
    tokenizer = make_tokenizer()
    chosen = make_fit(tokenizer, k, n_seen=12_345)
    finer = make_fit(tokenizer, 2 * k, percentile=1.0, n_seen=12_345, seed=5)
    coarser = make_fit(tokenizer, 30, percentile=10.0, n_seen=4096, seed=6)
    fits = [finer, chosen, coarser]
    return SimpleNamespace(
        fits=fits,
        chosen=chosen,
        profile=make_profile(chosen),
        lens=make_lens(chosen, tokenizer),
        tokenizer=tokenizer,
        evals=EVALS,
        generations=GENERATIONS,
        title='Regions of <b>tiny</b> & "co"',
    )


def region_data_of(fit: ExemplarFitResult, inputs: SimpleNamespace) -> dict[str, Any]:
    """What the page's script gets for another fit of as many regions."""
    return region_data(fit, inputs.profile, inputs.lens, inputs.tokenizer)
