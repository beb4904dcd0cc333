"""What the README and the documentation tell a reader to type works, and what they link to exists.

The Python blocks of a page run from top to bottom in one namespace, on a tiny model and a few documents: lines that
load a model by name or name a dataset of the hub are replaced. Blocks of class ``no-run`` need a hub, a cluster or the
packaged model.
"""

import re
from pathlib import Path

import pytest

import saelens_ext as sx

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python *(\{\.no-run\})?\n(.*?)```", re.DOTALL)
# What a tiny model with three layers of width 32 can do stands in for what a page asks of GPT-2.
SMALLER = [
    (r'"NeelNanda/pile-10k"', "dataset"),
    (r"blocks\.6\.", "blocks.1."),
    (r"n_components=100", "n_components=20"),
    (r"max_tokens=[\d_]+", "max_tokens=600, context_size=32"),
    (r"context_size=32, max_tokens=600, context_size=32", "max_tokens=600, context_size=32"),
    (r"held_out=0\.1", "held_out=0.25"),
    (r"n=200", "n=20, max_new_tokens=6, betas=(1.0,), gammas=(0.5,), n_clusters=(1, 20)"),
    (r"n=48, max_new_tokens=8", "n=20, max_new_tokens=6, betas=(1.0,), gammas=(0.5,), n_clusters=(1, 20)"),
    (r"percentile=[24]\b", "percentile=20"),
    (r"packaged_concepts\(\)", "packaged_concepts(n_per_side=5)[:6]"),
    (r"percentiles=\(2, 8\)", "percentiles=(20, 30)"),
    (r'_out", 2\]', '_out", 20]'),
]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> str:
    blocks = [code for marked, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not marked]
    lines = [line for block in blocks for line in block.splitlines()]
    text = "\n".join(line for line in lines if not re.match(r"(model|dataset) = ", line))
    for pattern, replacement in SMALLER:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=named)
def test_the_code_of_a_page_runs(page, tiny_bridge, tiny_texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"sx": sx, "model": tiny_bridge, "dataset": tiny_texts * 2}
    exec(compile(code_of(page), named(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_of_code_are_such_for_every_renderer(page):
    """Behind the language, superfences reads nothing but ``{.class}``; of a block with more it makes running text."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [fence for fence in fences if not re.fullmatch(r"(\w+( \{\.[\w-]+\})?)?", fence)] == []
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{named(page)} links to {target}"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_reference_lists_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: saelens_ext\.(\w+)$", text, re.MULTILINE))
    assert listed == set(sx.__all__)
