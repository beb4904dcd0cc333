"""The summary of an SNMF section: its figures, its levels, and how its fits went, all formatted."""

from types import SimpleNamespace
from typing import Any

import torch

from saelens_ext.concepts.comparison import ConceptComparison
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.report.dictionary.summary import (
    active_fact,
    active_per_token,
    excluded,
    hook_fact,
    model_fact,
    read_from,
)
from saelens_ext.report.format import Fact, Line, count

_STOPPED = {
    "converged": ("Convergence", "the objective fell no further"),
    "max_iter": ("Iterations", "max_iter was reached; the loss might still fall"),
    "max_passes": ("Passes", "max_passes was reached; the loss might still fall"),
}
_DUPLICATE = 0.99
_PENALTY = (
    "the cosine that a feature must have with what the others leave of an activation to be active; unless it is 0, "
    "activations of any norm weigh the same in the fit"
)


def snmf_lead(section: SNMFSection) -> str:
    """What a dictionary of this kind is, for whoever meets one for the first time."""
    dictionary = section.levels[0].dictionary
    text = (
        f"This dictionary writes each activation of {count(dictionary.cfg.d_in)} neurons as a weighted sum of its "
        f"{count(dictionary.cfg.d_sae)} features. A feature is a signed group of at most "
        f"{count(_most_neurons(dictionary))} neurons, and the code that weighs it is never negative. The features were "
        "found by factorising observed activations (semi-nonnegative matrix factorisation); no gradient was followed."
    )
    if section.hierarchy is None:
        return text
    sizes = " and ".join(count(level.dictionary.cfg.d_sae) for level in section.levels[1:])
    return (
        f"{text} Coarser dictionaries of {sizes} features gather those of the one before, which gives every feature "
        "its place in concept trees. Feature 0.17 is feature 17 of level 0, the finest."
    )


def snmf_facts(section: SNMFSection) -> list[Fact]:
    """The figures of the summary, in reading order."""
    level = section.levels[0]
    config = level.dictionary.cfg
    metadata: dict[str, Any] = config.metadata.to_dict()
    made = section.made
    facts = [
        model_fact(metadata),
        hook_fact(made.hook_name, config.d_in, metadata),
        Fact("seen", "Activations fitted", count(made.n_seen), read_from(metadata)),
        Fact("excluded", "Excluded", *excluded(metadata)),
        _features(level),
        _loss(section),
        Fact("l1", "L1 penalty", f"{config.l1:g}", _PENALTY),
        active_fact(level.profile, f", of {count(level.profile.n_activations)} profiled"),
    ]
    return facts if isinstance(made, HierarchicalSNMF) else [*facts, _stopped(made)]


def _most_neurons(dictionary: SNMFDictionary) -> int:
    return int(dictionary.support.sum(dim=1).max())


def _features(level: SNMFLevel) -> Fact:
    dictionary = level.dictionary
    meaning = (
        f"of at most {count(_most_neurons(dictionary))} neurons each (sparsity {dictionary.cfg.sparsity:g}); together "
        f"they use {count(dictionary.n_neurons_used)} of {count(dictionary.cfg.d_in)} neurons"
    )
    return Fact("features", "Features", count(dictionary.cfg.d_sae), meaning)


def _loss(section: SNMFSection) -> Fact:
    meaning = "squared error of the reconstruction over the activations' sum of squares; 0 is perfect"
    held_out = _held_out(section, 0)
    if held_out is not None:
        meaning += f"; {held_out:.3f} on documents that were kept out of the fit"
    return Fact("loss", "Loss", f"{_own_loss(section, 0):.3f}", meaning)


def _own_loss(section: SNMFSection, level: int) -> float:
    made = section.made
    return made.encode_losses[level] if isinstance(made, HierarchicalSNMF) else made.loss


def _held_out(section: SNMFSection, level: int) -> float | None:
    measured, made = section.levels[level].held_out_loss, section.made
    return made.held_out_loss if measured is None and not isinstance(made, HierarchicalSNMF) else measured


def _stopped(fit: SNMFFitResult) -> Fact:
    value, meaning = _STOPPED.get(fit.stopped_because, (fit.stopped_because, ""))
    return Fact("stopped", "Stopped by", value, f"{meaning}, after {count(len(fit.history))} steps")


# --- the table ---


def level_rows(section: SNMFSection) -> list[Line]:
    """One line per dictionary: the levels, and with a hierarchy the dictionary fitted without one, if it was given."""
    hierarchy, fit = section.hierarchy, section.fit
    if hierarchy is None:
        return [_line("This dictionary", section, 0, fit)]
    names = [(f"Level {number}", "the finest" if number == 0 else "") for number in range(len(section.levels))]
    lines = [
        _line(name, section, number, None, (hierarchy.losses[number], hierarchy.losses_before[number]))
        for number, name in enumerate(names)
    ]
    alone = ("Without a tree", "fitted on its own, to compare")
    return lines if fit is None else [*lines, _line(alone, section, None, fit, (None, None))]


def _line(
    name: str | tuple[str, str],
    section: SNMFSection,
    number: int | None,
    fit: SNMFFitResult | None,
    of_tree: tuple[float | None, ...] = (),
) -> Line:
    """A line about a level, or about ``fit`` alone; ``of_tree`` are the losses through the tree and before."""
    level = None if number is None else section.levels[number]
    made = fit if level is None else level
    assert made is not None
    losses = (_own_loss(section, number or 0), _held_out(section, number or 0))
    if level is None and fit is not None:
        losses = (fit.loss, fit.held_out_loss)
    silent = 0 if level is None else int((level.profile.counts == 0).sum())
    cells = {
        "Dictionary": name,
        "Features": count(made.dictionary.cfg.d_sae),
        **{key: _loss_text(value) for key, value in zip(("Loss", "Held out"), losses)},
        **{key: _loss_text(value) for key, value in zip(("Through the tree", "Before refinement"), of_tree)},
        "Active per token": "–" if level is None else active_per_token(level.profile),
        "Dead": count(fit.n_dead if fit is not None else silent),
        "Duplicates": count(fit.n_duplicate if fit is not None else n_duplicates(made.dictionary)),
        "Revived": "–" if fit is None else count(fit.n_revived),
    }
    return Line(cells, number == 0)


def _loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def n_duplicates(dictionary: SNMFDictionary) -> int:
    """How many features have a cosine above 0.99 with one before them."""
    units = torch.nn.functional.normalize(dictionary.W_dec.detach().float(), dim=1)
    return int(((units @ units.T).tril(-1) > _DUPLICATE).any(dim=1).sum())


# --- the concept ---


def concept_table(comparison: ConceptComparison | None) -> SimpleNamespace | None:
    """How well methods detect a concept, formatted."""
    if comparison is None:
        return None
    (up, down), (other_up, other_down) = comparison.n_choosing, comparison.n_judging
    lead = (
        f"Each method chose the one of its scores that best separates {count(up)} sentences with the concept from "
        f"{count(down)} without. What counts is how that score does on {count(other_up)} and {count(other_down)} other "
        "sentences: the best of many looks better than it is on those that chose it."
    )
    lines = [
        Line(
            {
                "Method": row.method,
                "Chose from": count(row.n_scores),
                "Chosen": row.chosen,
                "AUROC where it chose": f"{row.chosen_auroc:.2f}",
                "AUROC on the others": (f"{row.auroc:.2f}", f"[{row.auroc_low:.2f}, {row.auroc_high:.2f}]"),
                "Log ratio": f"{row.log_ratio:.2f}",
            }
        )
        for row in comparison.rows
    ]
    return SimpleNamespace(name=comparison.concept, lead=lead, lines=lines)


# --- the curves ---


def loss_plots(section: SNMFSection) -> list[SimpleNamespace]:
    """How the objectives of the fits fell."""
    plots = []
    if section.fit is not None:
        name = "Fit" if section.hierarchy is None else "Fit without a tree"
        plots.append(_plot(f"{name}: objective after each step", section.fit.history))
    if section.hierarchy is not None:
        plots.append(
            _plot("Refinement of all levels together: objective after each iteration", section.hierarchy.history)
        )
    return [plot for plot in plots if plot is not None]


def _plot(title: str, history: list[float]) -> SimpleNamespace | None:
    """A falling curve as the points of an SVG polyline in a box of 100 by 40, with its ends."""
    if not history:
        return None
    low, high = min(history), max(history)
    across, down = max(1, len(history) - 1), max(high - low, torch.finfo(torch.float32).tiny)
    points = " ".join(f"{100 * i / across:.2f},{2 + 36 * (high - value) / down:.2f}" for i, value in enumerate(history))
    first, last = f"{history[0]:.4f}", f"{history[-1]:.4f}"
    return SimpleNamespace(title=title, points=points, first=first, last=last, steps=count(len(history)))
