"""The model card of a repository of dictionaries: a README.md with a part that is written here, and the rest left
alone.

The written part lies between two comments. In it every dictionary has a section, between comments of its own that
carry its row of the table, so that one push rewrites one section and keeps the others.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

BEGIN = "<!-- saelens_ext: written by push_to_hub from here; text outside these comments is kept -->"
END = "<!-- saelens_ext: end -->"
_BLOCK = re.compile(r"<!-- saelens_ext: written by push_to_hub.*?<!-- saelens_ext: end -->", re.S)
_SECTION = re.compile(
    r"<!-- saelens_ext: dictionary (\{.*?\}) -->\n(.*?)\n<!-- saelens_ext: end of dictionary -->", re.S
)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)(?:\n)?---\s*(?:\n|\Z)", re.S)
_TAGS = ("saelens", "saelens-ext", "mechanistic-interpretability", "sparse-dictionary")

HINT = (
    "Without `import saelens_ext`, SAELens stops with a `KeyError` that names the architecture: "
    "`pip install saelens-ext`, import it, and load again. It need only be imported once, before loading."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the card says of one dictionary."""

    sae_id: str
    """Its folder."""
    kind: str
    """What it is, in two words."""
    size: str
    """Latents and width."""
    place: str
    """Model and hook."""
    text: str
    """The section under its heading, in Markdown."""

    def __str__(self) -> str:
        # A ">" in a value could end the comment.
        row = json.dumps({name: getattr(self, name) for name in _ROW}).replace(">", "\\u003e")
        return f"<!-- saelens_ext: dictionary {row} -->\n{self.text}\n<!-- saelens_ext: end of dictionary -->"


_ROW = ("sae_id", "kind", "size", "place")


@dataclass(frozen=True, kw_only=True)
class FrontMatter:
    """What the front matter of the card should say."""

    tags: Sequence[str] = field(default_factory=tuple)
    """Added to those which are there."""
    base_model: str | None = None
    """Added to those which are there."""
    license: str | None = None
    """Put in the place of the one that is there."""
    results: Sequence[EvalResult] = ()
    """Put in the place of those that are there of the same dictionary."""


def write_card(old: str, repo_id: str, section: Section, front: FrontMatter, folders: Iterable[str]) -> str:
    """The card of a repository with one dictionary put in, in the place of the one of that name.

    Args:
        old: the card so far; empty for none.
        section: about the dictionary, and ``front`` for the front matter.
        folders: all folders of the repository that hold dictionaries, the new one included; those without a section
            are listed by name.

    Raises:
        ValueError: the front matter of the card is not YAML.
    """
    data, body = _split(old)
    block = _BLOCK.search(body)
    sections = {found.sae_id: found for found in _sections(block.group() if block else "")} | {section.sae_id: section}
    folders = set(folders) | {section.sae_id}
    kept = [sections[name] for name in sorted(sections) if name in folders]
    before, after = (body[: block.start()], body[block.end() :]) if block else (f"{body.rstrip()}\n\n", "\n")
    body = before + _body(repo_id, kept, sorted(folders - set(sections)), titled=not before.strip()) + after
    name = repo_id.rpartition("/")[2]
    index = _model_index(data.pop("model-index", []), name, front.results, folders - {section.sae_id})
    written = _merge(data, front, index).to_yaml(original_order=list(data))
    return f"---\n{written}\n---\n\n{body.lstrip()}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    card = card.replace("\r\n", "\n")
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        data = yaml.safe_load(found.group(1)) or {}
    except yaml.YAMLError as error:
        data = error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        reason = " ".join(str(data).split())
        where = "The front matter of the repository's README.md"
        raise ValueError(f"{where} is not readable ({reason}). Correct it on the Hub and push again.")
    return data, card[found.end() :]


def _merge(data: dict[str, Any], front: FrontMatter, index: list[Any]) -> ModelCardData:
    data = {"library_name": "saelens", **data}
    data["tags"] = list(dict.fromkeys([*_listed(data.get("tags")), *_TAGS, *front.tags]))
    data["base_model"] = list(dict.fromkeys([*_listed(data.get("base_model")), *_listed(front.base_model)])) or None
    if front.license is not None:
        data["license"] = front.license
    card = ModelCardData(**data)
    if index:
        card["model-index"] = index
    return card


def _model_index(index: Any, name: str, results: Sequence[EvalResult], others: Collection[str]) -> list[Any]:
    """The results in the front matter: those of other dictionaries and what others wrote stay."""
    kept: list[Any] = []
    ours: list[EvalResult] = []
    for entry in index if isinstance(index, list) else [index]:
        try:
            found, parsed = model_index_to_eval_results([entry])
        except (KeyError, TypeError, AttributeError, ValueError):
            found, parsed = None, []
        if found == name:
            ours += parsed
        else:
            kept.append(entry)
    ours = [result for result in ours if _sae_id(result) is None or _sae_id(result) in others]
    if not (ours or results):
        return kept
    return kept + ModelCardData(model_name=name, eval_results=[*ours, *results]).to_dict()["model-index"]


def _sae_id(result: EvalResult) -> Any:
    return result.metric_args.get("sae_id") if isinstance(result.metric_args, dict) else None


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _sections(block: str) -> list[Section]:
    found = []
    for row, text in _SECTION.findall(block):
        try:
            found.append(Section(**{name: str(json.loads(row)[name]) for name in _ROW}, text=text))
        except (ValueError, KeyError):
            continue  # edited by hand beyond recognition: the folder is then listed by its name alone
    return found


def _body(repo_id: str, sections: Sequence[Section], others: Sequence[str], titled: bool) -> str:
    rows = [[f"`{s.sae_id}`", s.kind, s.size, s.place] for s in sections]
    rows += [[f"`{name}`", "SAELens SAE", "", ""] for name in others]
    parts = [BEGIN]
    if titled:
        parts.append(f"# {repo_id.rpartition('/')[2]}")
    parts += [
        "Dictionaries of a language model's activations, in the file format of "
        "[SAELens](https://github.com/decoderesearch/SAELens). Those made by `saelens-ext` are built from observed "
        "activations instead of trained by gradient descent.",
        "## Dictionaries",
        table(["sae_id", "what", "latents × width", "of"], rows),
        *([HINT] if any(not section.kind.startswith("SAELens") for section in sections) else []),
        *map(str, sections),
        END,
    ]
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    """A value as it can stand in a table: on one line, and neither a cell's end nor a comment in it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").replace("<!--", "&lt;!--").split())


def hub_model_name(name: Any) -> str | None:
    """The name of a model on the Hub that a model goes by in TransformerLens; None where that is not sure."""
    if not isinstance(name, str) or Path(name).exists():
        return None
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        return name
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(name))
    except ValueError:
        return None


def facts(values: Mapping[str, Any]) -> str:
    """Facts as a table, those that are not known left out."""
    known = {name: value for name, value in values.items() if value is not None and value != {} and value != []}
    rows = [[name, f"`{value}`" if isinstance(value, str) else value] for name, value in known.items()]
    return table(["setting", "value"], rows)
