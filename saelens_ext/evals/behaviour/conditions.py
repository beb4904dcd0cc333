"""What is ablated to test where a behaviour lives: the regions found, and controls that resemble them.

Symbols
    m  directions of a condition
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals.behaviour.localisation import Localisation
from saelens_ext.evals.behaviour.passes import Condition
from saelens_ext.evals.evidence import Failure
from saelens_ext.host.flat_sae import latent_rows

NOTHING = "no ablation"
RANDOM, GAUSSIAN, DIFFERENCE = "random regions", "Gaussian direction", "difference of means"
BASES = ("exemplar", "mean")
MOST_MATCHED = 0.05
"""A matched region shows the behaviour at most at this rate."""


def region_conditions(
    found: Localisation, n_directions: Sequence[int], bases: Sequence[str]
) -> tuple[list[Condition], list[Failure]]:
    """The candidates' directions, the first m of them for each m, and what there are too few for."""
    made, failures = list[Condition](), list[Failure]()
    for m in dict.fromkeys(n_directions):
        chosen = [candidate.region for candidate in found.candidates[:m]]
        if len(chosen) < m:
            failures.append(
                Failure(f"the first {m} regions", "", f"There are {len(chosen)} candidates; nothing is ablated.")
            )
            continue
        what = f"region {chosen[0]}" if m == 1 else f"regions {', '.join(map(str, chosen))}"
        for basis in _bases_of(found.dictionary, bases):
            described = (
                f"The {basis} {'direction' if m == 1 else 'directions'} of {what}, the best by rate times members."
            )
            name = f"{what} ({basis})" if basis in BASES else what
            made.append(
                Condition(
                    name=name,
                    kind="unsupervised",
                    directions=directions_of(found, chosen, basis),
                    description=described,
                )
            )
    return made, failures


def control_conditions(
    found: Localisation,
    n_directions: Sequence[int],
    bases: Sequence[str],
    lacking: Mapping[str, Tensor],
    *,
    n_random: int,
    seed: int,
) -> tuple[list[Condition], list[Failure]]:
    """The controls: matched and wrong region, random regions, a Gaussian direction, the difference of means.

    ``lacking`` is by hook the mean last position of the prompts without the behaviour, ``(d,)``.
    """
    made, failures = list[Condition](), list[Failure]()
    basis = _bases_of(found.dictionary, bases)[0]
    matched, wrong = matched_region(found), wrong_region(found)
    texts = {
        "matched region": (
            matched,
            f"a region that shows the behaviour at a rate of at most {MOST_MATCHED:g} and is the nearest to the best "
            "candidate in log10 of its activations and in coherence",
        ),
        "wrong region": (wrong, "the region that holds most prompts without the behaviour"),
    }
    for name, (region, what) in texts.items():
        if region is None:
            failures.append(Failure(name, "", "The dictionary has no such region."))
            continue
        directions = directions_of(found, [region], basis)
        description = f"Region {region}: {what}."
        made.append(Condition(name=name, directions=directions, description=description))
    draws, missed = random_regions(found, n_directions, basis, n_random=n_random, seed=seed)
    d = found.center.shape[0]
    gaussian = torch.randn(1, d, generator=torch.Generator().manual_seed(seed)).to(found.center)
    made.append(Condition(name=GAUSSIAN, directions=gaussian, description="One direction drawn from a Gaussian."))
    if bool(found.difference.norm() > 0):
        made.append(
            Condition(
                name=DIFFERENCE,
                kind="supervised",
                directions=found.difference[None],
                centers=lacking,
                description="The mean last position of the choose prompts that show the behaviour minus that of the "
                "others: a direction made with the labels. Activations get the component along it that the others "
                "have on average (arXiv 2411.09003), since neither the dictionary's centre nor 0 needs to lie on "
                "their side.",
            )
        )
    return [*made, *draws], [*failures, *missed]


def random_regions(
    found: Localisation, n_directions: Sequence[int], basis: str, *, n_random: int, seed: int
) -> tuple[list[Condition], list[Failure]]:
    """Draws of m regions other than the first m candidates, all of them where there are fewer than asked for."""
    made, failures = list[Condition](), list[Failure]()
    for m in dict.fromkeys(n_directions):
        tested = {candidate.region for candidate in found.candidates[:m]}
        others = [int(region) for region in found.regions["region"][found.regions["n"] > 0] if region not in tested]
        generator = np.random.default_rng([seed, m])
        if len(others) < m or n_random < 1:
            failures.append(Failure(random_name(m), "", f"There are {len(others)} other regions to draw {m} from."))
            continue
        order = generator.permutation(others)
        n = min(n_random, len(others)) if m == 1 else n_random
        for draw in range(n):
            drawn = [int(order[draw])] if m == 1 else generator.choice(others, size=m, replace=False).tolist()
            made.append(
                Condition(
                    name=random_name(m),
                    draw=draw,
                    directions=directions_of(found, drawn, basis),
                    description=f"{n} draws of {m} of the other regions ({basis}); rates are means over draws.",
                )
            )
    return made, failures


def random_name(m: int) -> str:
    """The name of the draws of m regions."""
    return RANDOM if m == 1 else f"{RANDOM} ({m} at once)"


def matched_region(found: Localisation) -> int | None:
    """The region without the behaviour that most resembles the best candidate; None without a candidate or region."""
    if not found.candidates:
        return None
    table = found.regions.set_index("region")
    own: Any = table.loc[found.candidates[0].region]
    enough = table[(table["members"] >= found.settings["min_members"]) & (table["rate"] <= MOST_MATCHED)]
    enough = enough[enough["n"] > 0]
    if enough.empty or not own["n"] > 0:
        return None
    apart = (np.log10(enough["n"]) - np.log10(own["n"])) ** 2 + (enough["coherence"] - own["coherence"]) ** 2
    return int(apart.astype(float).idxmin())  # pyright: ignore[reportArgumentType]  # labels are whole numbers


def wrong_region(found: Localisation) -> int | None:
    """The region with most prompts that do not show the behaviour, other than the best candidate."""
    best = [candidate.region for candidate in found.candidates[:1]]
    table = found.regions[~found.regions["region"].isin(best)]
    lacking = table["members"] - table["shown"]
    return int(table.loc[lacking.idxmax(), "region"]) if len(table) and lacking.max() > 0 else None  # pyright: ignore


def directions_of(found: Localisation, regions: Sequence[int], basis: str) -> Tensor:
    """Their directions where the dictionary writes, ``(m, d)``."""
    return latent_rows(found.dictionary, list(regions), basis if basis in BASES else None)


def _bases_of(dictionary: SAE[Any], bases: Sequence[str]) -> Sequence[str]:
    """Those given, of a dictionary that has both; else its decoder's only one."""
    return bases if isinstance(dictionary, ExemplarPartition) else ("decoder",)
