"""What a model does with a prompt, judged by its answer or by how likely its openings are, and the prompts to ask.

A verdict is a number per answer in [0, 1], the extent to which it shows the behaviour (NaN: no verdict). Where a model
always or never shows it in words, the odds of openings show how near it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np

from saelens_ext import _checks
from saelens_ext.evals.concepts_data import normal_form
from saelens_ext.host.chat_template import Prompt, in_words, listed_prompts

PARTS = ("build", "choose", "test", "contrast")


@_checks.normalising
@dataclass(frozen=True, kw_only=True)
class OpeningOdds:
    """A behaviour measured without generating: how much likelier its openings are than those of other answers.

    The log-odds are log sum P(opening) over ``shows`` minus the same over ``lacks``, in nats. They tell prompts and
    interventions apart even where the model always or never shows the behaviour in words.
    """

    shows: tuple[str, ...]
    """How answers that show the behaviour begin, each at least one token, such as "I'm sorry"."""
    lacks: tuple[str, ...]
    """How answers without it begin."""
    threshold: float | int = 0.0
    """Log-odds in nats above which a prompt counts as showing the behaviour."""

    def __post_init__(self) -> None:
        for side in ("shows", "lacks"):
            object.__setattr__(self, side, tuple(_checks.texts(getattr(self, side), side, "opening")))
        shared = sorted(set(self.shows) & set(self.lacks))
        if shared or not all((*self.shows, *self.lacks)):
            raise ValueError(
                f"An opening must have a text and stand on one side, got {shared or ['']}; shows and lacks are how "
                "answers with and without the behaviour begin."
            )
        if not np.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, in nats, got {self.threshold!r}.")


@_checks.normalising
@dataclass(frozen=True, kw_only=True)
class PromptSplit:
    """Prompts, each with one use, so that what is reported was chosen on others.

    A prompt is a text, or a conversation: messages with "role" ("system", "user", "assistant") and "content", of which
    the last may be the beginning of the answer.

    Raises:
        ValueError: a part without a prompt, or a prompt in two parts. Prompts are compared role by role, without case
            and outer spaces; a text is the same as a conversation that only asks it.
    """

    build: tuple[Prompt, ...]
    """The dictionary's statistics, or in a sweep the dictionary itself, come from these."""
    choose: tuple[Prompt, ...]
    """Regions are chosen by what the model does with these; some show the behaviour and some do not."""
    test: tuple[Prompt, ...]
    """Ablations are judged by these, which should show the behaviour."""
    contrast: tuple[Prompt, ...] = ()
    """Side effects are judged by these, which should not show it."""

    def __post_init__(self) -> None:
        for part in PARTS:
            given = getattr(self, part)
            if part != "contrast" or len(given):
                object.__setattr__(self, part, tuple(listed_prompts(given, part)))
        keyed = {part: {_key(prompt): prompt for prompt in getattr(self, part)} for part in PARTS}
        for first, second in combinations(PARTS, 2):
            shared = [in_words(prompt) for key, prompt in keyed[first].items() if key in keyed[second]]
            if shared:
                raise ValueError(
                    f"{first} and {second} share {len(shared)} prompts, for example {shared[0]!r} (compared without "
                    "case and outer spaces). What chooses must not report: take them out of one part."
                )

    @classmethod
    def divide(
        cls,
        shows: Iterable[Prompt],
        lacks: Iterable[Prompt],
        *,
        fractions: Sequence[float | int] = (0.4, 0.3, 0.3),
        seed: int = 0,
    ) -> "PromptSplit":
        """Divide prompts that should show a behaviour, and prompts that should not, at random.

        ``build`` and ``choose`` get some of either kind, ``test`` the rest of the first and ``contrast`` of the second.
        A prompt that is given twice is used once.

        Args:
            shows: prompts that should bring the behaviour about, at least 3, texts or conversations.
            lacks: prompts that should not, at least 3.
            fractions: of either kind for build, choose and the rest, each above 0, together 1.
            seed: of the order.

        Raises:
            ValueError: too few prompts, other fractions, or a prompt on both sides.

        Examples:
            >>> split = sx.PromptSplit.divide([f"Hate {i}" for i in range(10)], [f"Love {i}" for i in range(10)])
            >>> [len(getattr(split, part)) for part in ("build", "choose", "test", "contrast")]
            [8, 6, 3, 3]
        """
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must be three numbers above 0 that add up to 1, got {tuple(fractions)}.")
        generator = np.random.default_rng(seed)
        parts: list[list[list[Prompt]]] = []
        for side, name in ((shows, "shows"), (lacks, "lacks")):
            different = list({_key(prompt): prompt for prompt in listed_prompts(list(side), name)}.values())
            if len(different) < 3:
                raise ValueError(
                    f"{name} has {len(different)} different prompts; at least 3 are needed, and better 60."
                )
            own = [different[place] for place in generator.permutation(len(different))]
            first = min(max(1, round(fractions[0] * len(own))), len(own) - 2)
            second = min(max(1, round(fractions[1] * len(own))), len(own) - first - 1)
            parts.append([own[:first], own[first : first + second], own[first + second :]])
        (build, choose, test), (other_build, other_choose, contrast) = parts
        return cls(
            build=_alternating(build, other_build), choose=_alternating(choose, other_choose),
            test=tuple(test), contrast=tuple(contrast),
        )  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """The number of prompts of each part."""
        return {field.name: len(getattr(self, field.name)) for field in fields(self)}


def _key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What equal prompts have in common: roles, and what each says without case and outer spaces."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tuple((one["role"], normal_form(one["content"])) for one in messages)


def _alternating(first: Sequence[Prompt], second: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Both lists, evenly mixed, so that neither kind comes first everywhere."""
    placed = [((number + 0.5) / len(side), one) for side in (first, second) for number, one in enumerate(side)]
    return tuple(one for _, one in sorted(placed, key=lambda entry: entry[0]))
