"""Neuron activations of the demo model on a bank of mixed text, and on labelled sentences; read once, kept in a file.

The texts are those of the wheel of sae-probes (``pip install --no-deps sae-probes==0.4.2``): headlines, reviews, code,
encyclopaedic text, questions, arithmetic, and so on. The bank is cut from 60 of its sets, by document, and shares no
text with the labelled sentences, which are of 14 others, and the demo's sentences with and without days of the week.
"""

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas
import pyarrow
import torch

LAYERS = (8, 15)
CONCEPTS = (
    "21_headline_istrump",
    "23_headline_ischina",
    "65_high-school",
    "68_credit-card",
    "74_magnetic-field",
    "79_human-rights",
    "85_mental-health",
    "92_glue_sst2",
    "96_spam_is",
    "105_click_bait",
    "130_temp_cat_Frequency",
    "140_news_class_Technology",
    "152_it_tick_Hardware",
    "159_code_Python",
)
_POSITIVE = ("1", "True", "bigram", "clickbait")
_SENTENCES = 64
_SENTENCE_LETTERS = 110
_DOCUMENT_LETTERS = 320
_DOCUMENTS = 8
_MOST_SETS = 60
_BANK_TOKENS = 29_000


@dataclass(frozen=True)
class Activations:
    """Activations of some texts, a row per token, with where each is from."""

    rows: torch.Tensor
    """``(n, 1536)``, float16."""
    positions: torch.Tensor
    """``(n,)`` place in the text, 1 being behind BOS."""
    documents: torch.Tensor
    """``(n,)`` number of the text, ascending."""


def mixed_text(layer: int) -> tuple[Activations, Activations, list[tuple[str, range, range]]]:
    """The bank, the sentences, and for each concept its name, the sentences that show it and those that do not."""
    path = Path(os.environ.get("SAELENS_EXT_BENCH_DIR", tempfile.gettempdir())) / "saelens_ext_bench_mixed.pt"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(_collect(), partial)
        partial.replace(path)
    kept = torch.load(path, weights_only=True, mmap=True)
    bank, sentences = (
        Activations(kept[part][f"layer{layer}"], kept[part]["positions"], kept[part]["documents"])
        for part in ("bank", "sentences")
    )
    return bank, sentences, [(name, range(*shown), range(*other)) for name, shown, other in kept["concepts"]]


def _collect() -> dict:
    from saelens_ext.demo.packaged import load_demo_model
    from saelens_ext.demo.sentences import NEUTRAL, WEEKDAYS

    texts, concepts = [], []
    for name in CONCEPTS:
        frame = _labelled(name)
        shown = frame.target.astype(str).isin(_POSITIVE)
        for part in (frame[shown], frame[~shown]):
            texts += [text[:_SENTENCE_LETTERS] for text in part.prompt[:_SENTENCES]]
        end = len(texts)
        concepts.append((name, (end - 2 * _SENTENCES, end - _SENTENCES), (end - _SENTENCES, end)))
    end = len(texts)
    texts += [*WEEKDAYS, *NEUTRAL]
    concepts.append(("days of the week", (end, end + len(WEEKDAYS)), (end + len(WEEKDAYS), len(texts))))
    model = load_demo_model()
    return {
        "bank": _read(model, _bank_texts(set(texts)), _BANK_TOKENS),
        "sentences": _read(model, texts, None),
        "concepts": concepts,
    }


def _labelled(name: str) -> "pandas.DataFrame":
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or spec.origin is None:
        raise SystemExit("The texts are those of sae-probes: pip install --no-deps sae-probes==0.4.2")
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    # pandas reads zstd only with a package that is not installed; pyarrow comes with datasets.
    with pyarrow.input_stream(str(folder / f"{name}.csv.zst"), compression="zstd") as file:
        return pandas.read_csv(file)


def _bank_texts(used: set[str]) -> list[str]:
    """The first texts of each set in turn, so that any prefix is mixed; sets of bare names hold too few tokens."""
    folder = Path(importlib.util.find_spec("sae_probes").origin).parent / "data" / "cleaned_data"
    names = sorted(file.name.removesuffix(".csv.zst") for file in folder.glob("*.csv.zst"))
    names = [name for name in names if name not in CONCEPTS]
    columns = []
    for name in names:
        prompts = _labelled(name).prompt.astype(str)
        prompts = [text[:_DOCUMENT_LETTERS] for text in prompts[_SENTENCES : _SENTENCES + 4 * _DOCUMENTS]]
        if sorted(map(len, prompts))[len(prompts) // 2] >= 40:
            columns.append([text for text in prompts if text[:_SENTENCE_LETTERS] not in used][:_DOCUMENTS])
    rows = zip(*columns[:_MOST_SETS], strict=True)
    return list(dict.fromkeys(text for row in rows for text in row))


def _read(model, texts: list[str], max_tokens: int | None) -> dict[str, torch.Tensor]:
    from saelens_ext.activations.stream import ActivationStream

    hooks = [f"blocks.{layer}.mlp.out.hook_in" for layer in LAYERS]
    stream = ActivationStream(model, texts, hooks, context_size=128, max_tokens=max_tokens)
    rows, positions, documents = {hook: [] for hook in hooks}, [], []
    for batch in stream:
        for hook in hooks:
            rows[hook].append(batch.activations[hook].half())
        positions.append(batch.positions)
        documents.append(batch.document_ids)
    return {f"layer{layer}": torch.cat(rows[hook]) for layer, hook in zip(LAYERS, hooks, strict=True)} | {
        "positions": torch.cat(positions),
        "documents": torch.cat(documents),
    }
