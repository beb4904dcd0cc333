"""The saved tutorials are whole, and speak of names that exist. Running them is ``python tutorials/run.py --check``."""

import ast
import json
import re
from pathlib import Path

import pytest

import saelens_ext

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
LARGEST = 600_000  # bytes
# A path of whoever ran it: of a home or temporary directory, an installation, or another user's drive.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users|var|private)/|site-packages|[A-Z]:\\\\")


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def names_used(code: str) -> set[str]:
    """The names that code takes from the package: ``sx.name`` and ``from saelens_ext.module import name``."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sx":
            found.add(node.attr)
    return found


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEachTutorial:
    def test_it_is_a_valid_notebook_of_a_readable_size(self, path):
        nbformat = pytest.importorskip("nbformat")
        nbformat.validate(nbformat.read(path, as_version=4))
        assert path.stat().st_size < LARGEST

    def test_it_ran_from_top_to_bottom_without_an_error(self, path):
        code = cells(path, "code")
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert not [output for output in outputs if output.get("name") == "stderr"], (
            "progress bars or warnings were saved"
        )

    def test_it_shows_pictures_and_tables(self, path):
        data = [output["data"] for cell in cells(path, "code") for output in cell["outputs"] if "data" in output]
        assert sum("image/png" in shown for shown in data) >= 3
        assert sum("<table" in "".join(shown.get("text/html", "")) for shown in data) >= 3

    def test_one_commented_line_swaps_in_a_model_of_the_hub(self, path):
        lines = "\n".join(source(cell) for cell in cells(path, "code")).splitlines()
        (swap,) = [line for line in lines if re.match(r"# model = ", line)]
        call = ast.parse(swap.removeprefix("# ")).body[0].value
        assert ast.unparse(call.func) == "sx.load_model"
        # It stands where the demo model was loaded, so that removing the sign is all there is to do.
        assert lines[lines.index(swap) - 1] == "model = load_demo_model()"

    def test_it_names_no_place_on_a_machine(self, path):
        for cell in cells(path, "code"):
            shown = [
                "".join(output.get("text", ""))
                + "".join("".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
                for output in cell["outputs"]
            ]
            assert not MACHINE_PATH.search("\n".join([source(cell), *shown]))

    def test_every_name_that_it_takes_from_the_package_exists(self, path):
        used = set().union(*(names_used(source(cell)) for cell in cells(path, "code")))
        assert used, "it uses nothing of the package"
        assert not {name for name in used if not hasattr(saelens_ext, name)}

    def test_its_imports_work(self, path):
        imports = [
            node
            for cell in cells(path, "code")
            for node in ast.parse(source(cell)).body
            if isinstance(node, ast.ImportFrom) and node.module.startswith("saelens_ext")
        ]
        for node in imports:
            module = __import__(node.module, fromlist=["_"])
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]

    def test_prose_comes_before_code(self, path):
        kinds = [cell["cell_type"] for cell in json.loads(path.read_text())["cells"]]
        assert kinds[0] == "markdown"
        assert kinds.count("markdown") >= kinds.count("code") - 2
