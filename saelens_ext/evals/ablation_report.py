"""An `AblationEvidence` in words, tables and answers side by side."""

import pandas as pd

from saelens_ext.evals.evidence import evidence_table
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.report.evidence_section import AnswerSet, EvidenceTable


def random_sentences(table: pd.DataFrame) -> str:
    """What comparisons with random regions say."""
    sentences = []
    for row in table.to_dict("records"):
        start = (
            f"Of {row['n_draws']} draws of random regions {row['as_large'] or 'none'} did as much as {row['method']}"
        )
        least = min(1.0, len(table) / (1 + row["n_draws"]))
        if least >= LEVEL:
            end = f"p = {row['p']:.2g} before correction; with so few draws none below {LEVEL:g} is possible after it"
        else:
            end = f"corrected p = {row['p_holm']:.2g}" + ("" if row["p_holm"] < LEVEL else ", which is not a claim")
        sentences.append(f"{start} ({end}).")
    return " ".join(sentences)


def side_effects(summary: pd.DataFrame, methods: list[str]) -> str:
    """What the tested ablations do besides."""
    sentences = []
    for method in methods:
        own = summary[summary["method"] == method].set_index("metric")["estimate"]
        parts = [
            text.format(own[metric])
            for metric, text in (
                ("kl", "a divergence of {:.3g} nats per token"),
                ("perplexity_ratio", "a perplexity of {:.3g} times the former on neutral texts"),
                ("contrast", "a rate of {:.2g} on contrast prompts"),
            )
            if metric in own
        ]
        if parts:
            sentences.append(f"Side effects of {method}: {', '.join(parts)}.")
    return " ".join(sentences)


def random_table(table: pd.DataFrame) -> list[EvidenceTable]:
    """Comparisons with random regions, if any."""
    note = "p = (1 + draws with as large a fall) / (1 + draws); p_holm is corrected over the directions tested."
    return [evidence_table("Against random regions", table, note)] if len(table) else []


def answer_sets(answers: pd.DataFrame) -> tuple[AnswerSet, ...]:
    """Answers to each prompt under each condition."""
    return tuple(
        AnswerSet(
            prompt=str(prompt), answers={str(name): str(text) for name, text in row.items() if isinstance(text, str)}
        )
        for prompt, row in answers.iterrows()
    )
