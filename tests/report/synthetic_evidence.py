"""Made-up evidence for the page, with texts that try to be more than text."""

import math

import numpy as np

from saelens_ext.report.evidence_section import (
    EvidenceSection,
    EvidenceTable,
    ForestPlot,
    ForestRow,
    Line,
    LineFigure,
)

HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=2">\u202eabc'
KINDS = ("unsupervised", "supervised", "control")
ABOUT = {"model": "SmolLM2-135M-Instruct", "hook": "blocks.15.hook_out", "dictionaries": {"EP p1": 776}}


def make_section(n_groups=3, n_methods=5, *, hostile=True, n_lines=4, **changes):
    """A section of some groups, methods and figures."""
    generator = np.random.default_rng(0)
    names = [f"method {i}" for i in range(n_methods - 1)] + [HOSTILE if hostile else "a method with quite a long name"]
    rows = [
        ForestRow(label=name, estimate=e, low=e - 0.05, high=e + 0.04, n_units=1234, group=group, kind=KINDS[i % 3])
        for group in ([f"set: {g}" for g in range(n_groups)] or [""])
        for i, name in enumerate(names)
        if (e := 0.5 + 0.4 * generator.random())
    ]
    rows[0] = ForestRow(label="no interval", estimate=0.61, low=math.nan, high=math.nan, n_units=2, group=rows[0].group)
    x = tuple(np.linspace(0, 1, 30).tolist())
    lines = [
        Line(label=f"{names[i % n_methods]} {i}", x=x, y=tuple(v ** (i + 1) for v in x), kind=KINDS[i % 3])
        for i in range(n_lines)
    ]
    table = EvidenceTable(
        title="Comparisons",
        columns=("set", "method", "difference", "p", "p_holm", "n_units", "missing"),
        rows=tuple(
            (f"set {i}", names[i % n_methods], 0.0123456 * (i - 1), 0.00004 + i / 30, 1.0, 1234, math.nan)
            for i in range(20)
        ),
        note="Paired differences.",
    )
    given = {
        "kind": "novelty",
        "title": f"Novelty {HOSTILE if hostile else ''}",
        "question": "Does it find unfamiliar text?",
        "verdict": f"EP is no better than as many random activations. {HOSTILE if hostile else ''}",
        "forest": ForestPlot(axis="AUROC", rows=tuple(rows), chance=0.5),
        "tables": (table,),
        "figures": (
            LineFigure(
                title="ROC",
                x_label="false positive rate",
                y_label="true positive rate",
                lines=tuple(lines),
                note="Of all.",
            ),
            LineFigure(
                title="One point",
                x_label="percentile",
                y_label="AUROC",
                lines=(Line(label="news", x=(1.0,), y=(0.8,)),),
            ),
        ),
        "units": "Documents.",
        "controls": {names[-1]: f"What it is: {HOSTILE if hostile else 'a control'}."},
        "failures": (f"entropy on code: {HOSTILE}",) if hostile else (),
        "settings": {"seed": 0, "rates": [0.01, 0.05], "text": HOSTILE if hostile else "plain"},
    }
    return EvidenceSection(**given | changes)
