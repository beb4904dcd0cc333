"""The saved tutorials are whole, and speak of names that exist. Running them is ``python tutorials/run.py --check``."""

import ast
import importlib
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


def test_they_are_numbered():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


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
        # It stands where the model was loaded, so that removing the sign is all there is to do.
        assert lines[lines.index(swap) - 1] in ("model = load_demo_model()", "model = load_organism()")

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


# --- badges ---

URL = "https://github.com/some-one/some.name"


@pytest.fixture
def badges(monkeypatch):
    pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(TUTORIALS)
    return importlib.import_module("badges")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badges_are_those_of_the_repository_that_pyproject_names(badges, path):
    url = badges.repository()
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell.get("id", "").startswith("colab-")]
    expected = [] if url is None else badges.badge_cells(path.name, url)
    assert [source(cell) for cell in found] == [cell.source for cell in expected]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_badge_is_put_behind_the_heading_and_the_rest_stays(badges, path):
    import nbformat

    before = nbformat.read(path, as_version=4)
    once = badges.with_badge(nbformat.read(path, as_version=4), path.name, URL)
    nbformat.validate(once)
    assert badges.with_badge(nbformat.from_dict(once), path.name, URL) == once
    heading, badge, install, *rest = once.cells
    assert (
        heading.source.startswith("# ")
        and f"/github/some-one/some.name/blob/main/tutorials/{path.name})" in badge.source
    )
    assert f'"saelens-ext[demo,tutorials] @ git+{URL}"' in install.source
    code = [cell for cell in once.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kept = [cell for cell in before.cells if not cell.id.startswith("colab-")]
    assert [cell.source for cell in [heading, *rest]] == [cell.source for cell in kept]
    assert [len(cell.get("outputs", [])) for cell in rest] == [len(cell.get("outputs", [])) for cell in kept[1:]]


def test_the_install_cell_does_nothing_where_the_package_is_and_installs_where_it_is_not(badges, monkeypatch):
    (_, cell) = badges.badge_cells("x.ipynb", URL)
    ran = []
    monkeypatch.setattr("subprocess.run", lambda *popenargs, **kwargs: ran.append(popenargs[0]))
    exec(cell.source, {})
    assert ran == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    exec(cell.source, {})
    assert [command[-1] for command in ran] == [f"saelens-ext[demo,tutorials] @ git+{URL}", badges.PACKAGED[-1]]


@pytest.mark.parametrize(
    "url", ["http://github.com/a/b", "https://github.com/a", "https://example.org/a/b", "https://github.com/a/b/c"]
)
def test_an_address_that_colab_cannot_open_is_refused(badges, url, tmp_path):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\n[project.urls]\nRepository = "{url}"\n')
    with pytest.raises(ValueError, match='must read "https://github.com/OWNER/NAME", got'):
        badges.repository(tmp_path / "pyproject.toml")


def test_without_a_repository_it_says_where_to_name_one(badges, monkeypatch, capsys):
    monkeypatch.setattr(badges, "repository", lambda pyproject=None: None)
    assert badges.main([]) == 1 and "under [project.urls]" in capsys.readouterr().err
