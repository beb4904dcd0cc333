"""Dictionaries of every kind and a stream of known activations to profile them on."""

from dataclasses import fields, is_dataclass
from types import SimpleNamespace

import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition

D, K, HOOK = 6, 12, "blocks.0.hook_out"


TENSORS = ("counts", "mean_activation", "max_activation", "coherence", "mean_distance", "max_distance")


class CutStream(ActivationStream):
    """Given rows as a stream, cut into batches of any number of rows."""

    max_tokens = model = None

    def __init__(self, x: torch.Tensor, rows: int = 1000, window: int = 9, hook_name: str = HOOK):
        n, self.rows = len(x), rows
        self.hook_names = self.requested_hook_names = (hook_name,)
        sequence_ids, positions = torch.arange(n) // window, torch.arange(n) % window + 1
        windows = torch.full((int(sequence_ids[-1]) + 1, window + 1), -1)
        windows[:, 0] = 1
        windows[sequence_ids, positions] = token_ids = 100 + torch.arange(n) * 7 % 50
        self.columns = {
            "token_ids": token_ids,
            "sequence_ids": sequence_ids,
            "positions": positions,
            "document_ids": sequence_ids // 2,
        }
        self.x, self.windows = x, windows

    def __iter__(self):
        for rows in torch.arange(len(self.x)).split(self.rows):
            columns = {name: column[rows] for name, column in self.columns.items()}
            yield ActivationBatch(
                activations={self.hook_names[0]: self.x[rows]}, windows=self.windows, first_sequence_id=0, **columns
            )

    def describe(self):
        return {}


def integers(*shape: int, low: int = -4, high: int = 5, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: products of them are exact in any order, and ties are many."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


class Regions(StandardSAE):
    """A dictionary with regions that knows no centre: the nearest of its rows by dot product."""

    def assign(self, x):
        best = (x @ self.W_dec.T).max(dim=1)
        regions = torch.where(best.values < -2, -1, best.indices)
        return SimpleNamespace(regions=regions, distances=10 - best.values).__dict__.values()


def filled(sae: SAE, seed: int = 3) -> SAE:
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed + i))
    return sae


def options(**extra):
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny")
    return {"d_in": D, "d_sae": K, "metadata": metadata, **extra}


def partition(**extra) -> ExemplarPartition:
    rows = torch.nn.functional.normalize(torch.randn(2 * K, D, generator=torch.Generator().manual_seed(5)), dim=1)
    return ExemplarPartition.from_regions(rows[:K], rows[K:], torch.ones(D), 0.9, metadata={"hook_name": HOOK}, **extra)


DICTIONARIES = {
    "standard": lambda: filled(StandardSAE(StandardSAEConfig(**options()))),
    "standard_normalised": lambda: filled(
        StandardSAE(StandardSAEConfig(**options(normalize_activations="layer_norm")))
    ),
    "topk": lambda: filled(TopKSAE(TopKSAEConfig(**options(k=3)))),
    "jumprelu": lambda: filled(JumpReLUSAE(JumpReLUSAEConfig(**options()))),
    "transcoder": lambda: filled(Transcoder(TranscoderConfig(**options(d_out=5, apply_b_dec_to_input=False)))),
    "regions": lambda: filled(Regions(StandardSAEConfig(**options()))),
    "partition": partition,
    "partition_signed": lambda: partition(readout="cosine", basis="mean"),
}


def expected_context(stream: CutStream, row: int, context: int) -> list[int]:
    window, position = (
        stream.windows[stream.columns["sequence_ids"][row]].tolist(),
        int(stream.columns["positions"][row]),
    )
    return [window[j] if 0 <= j < len(window) else -1 for j in range(position - context, position + context + 1)]


def assert_examples(examples, stream, ranked: list[list[tuple[float, int]]], n: int, context: int) -> None:
    """``ranked[j]``: (value, row) of latent j in the order expected."""
    for j, rows in enumerate(ranked):
        rows = rows[:n]
        assert torch.allclose(examples.values[j, : len(rows)], torch.tensor([value for value, _ in rows]), atol=1e-5)
        assert examples.values[j, len(rows) :].isnan().all() and examples.values.shape[1] == n
        for name in ("token_ids", "document_ids", "positions"):
            expected = [int(stream.columns[name][row]) for _, row in rows] + [-1] * (n - len(rows))
            assert getattr(examples, name)[j].tolist() == expected, (name, j)
        contexts = [expected_context(stream, row, context) for _, row in rows]
        contexts += [[-1] * (2 * context + 1)] * (n - len(rows))
        assert examples.contexts[j].tolist() == contexts


def assert_same(left: DictionaryProfile, right: DictionaryProfile) -> None:
    for field in fields(DictionaryProfile):
        a, b = getattr(left, field.name), getattr(right, field.name)
        pairs = [(a, b)]
        if is_dataclass(a):
            pairs = [(getattr(a, part.name), getattr(b, part.name)) for part in fields(a)]
        for one, other in pairs:
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)), field.name
            else:
                assert one == other, field.name
