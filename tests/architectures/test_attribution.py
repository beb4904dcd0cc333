"""Attribution is complete, a true derivative, or conserved, as its backend promises; or it is refused, saying why."""

import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations, attribution_completeness
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.source_table import KINDS
from saelens_ext.host.models import resolve_hook
from tests.architectures._hosts import LAYER
from tests.continuations._dictionaries import make

ALL = {"kinds": KINDS, "special_positions": True, "max_sources": 10**6}
STREAM = f"blocks.{LAYER}.hook_resid_post"
BIASED = ("gpt2", "qwen2", "pythia", "gptj", "gpt_neo", "bloom", "gpt_oss")


def refused(host, backend):
    """What cannot be frozen: patterns that a bridge only shows, and what happens inside experts."""
    shows_only = type(host.model).__name__ == "SAETransformerBridge" and host.architecture in ("gptj", "gpt_neo")
    return shows_only or (host.row.experts and backend == "relp")


def dictionaries():
    return {
        "stream": [make("standard", STREAM)],
        "transcoder": [make("skip_transcoder", f"blocks.{LAYER}.mlp.hook_in", write=f"blocks.{LAYER}.hook_mlp_out")],
    }


def scored(model):
    return score_continuations(model, "The assert statement", [[70, 9, 44], [8]])


def mean_demeaned_logits(model, found, change=None):
    """The target by the model's own logits; ``change`` is a hook and a function there."""
    targets = []
    for row in range(len(found)):
        ids = [*found.prefix_ids, *found.ids_of(row)]
        with torch.no_grad(), model.hooks(fwd_hooks=[change] if change else []):
            logits = model(torch.tensor([ids]))[0].double()
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        logits = cap * torch.atanh(logits / cap) if cap > 0 else logits
        columns = range(len(found.prefix_ids), len(ids))
        targets.append(sum(logits[t - 1, ids[t]] - logits[t - 1].mean() for t in columns) / len(columns))
    return torch.stack(targets).float()


@pytest.mark.parametrize("name", dictionaries())
def test_linear_is_complete_or_refused(host, name):
    given, found = dictionaries()[name], scored(host.model)
    if refused(host, "linear"):
        with pytest.raises(ValueError, match="pattern"):
            attribution_completeness(host.model, given, found)
        return
    parts = attribution_completeness(host.model, given, found)
    torch.testing.assert_close(parts.target, mean_demeaned_logits(host.model, found), rtol=1e-4, atol=1e-5)
    assert parts.relative_gap.max() < 1e-5


def test_gradient_is_the_derivative_of_the_real_model(host):
    found, step, name = scored(host.model), 2e-3, resolve_hook(host.model, STREAM)
    attributed = attribute_continuations(host.model, make("standard", STREAM), found, backend="gradient", **ALL)
    up, down = (
        mean_demeaned_logits(host.model, found, (name, lambda x, hook, scale=1 + sign * step: scale * x))
        for sign in (1, -1)
    )
    whole = attributed.columns["prefix_effect"] + attributed.columns["continuation_effect"]
    torch.testing.assert_close(whole, (up - down) / (2 * step), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("place", ["blocks.0.hook_resid_pre", STREAM])
def test_relevance_is_conserved_or_refused(host, place):
    found = scored(host.model)
    if refused(host, "relp"):
        with pytest.raises(ValueError, match="pattern|activation function|expert"):
            attribute_continuations(host.model, make("standard", place), found, backend="relp")
        return
    columns = attribute_continuations(host.model, make("standard", place), found, backend="relp", **ALL).columns
    whole = columns["prefix_effect"] + columns["continuation_effect"]
    if host.architecture in BIASED:
        assert (whole - columns["target"]).abs().max() > 1e-3, "then there is no bias; move it to the other set"
    else:
        torch.testing.assert_close(whole, columns["target"], rtol=1e-4, atol=1e-4)
