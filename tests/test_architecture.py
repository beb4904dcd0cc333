"""Data flows down the page once: which module may import which, and how large a room may grow."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "saelens_ext"

# Folders, lowest first. A module imports from its own folder and from the floors below, and any may use COMMON.
COMMON = ["_checks", "_files"]
LAYERS = [
    ["ops", "workers"],
    ["host"],
    ["activations"],
    ["dictionaries", "steering"],
    ["analysis", "concepts", "continuations", "demo"],
    ["published", "report", "runner"],
    ["audit", "evals", "hub", "serve"],
    ["cli"],
]
# Thin other names of modules, for imports that are older than the folders.
ALIASES = {"models": "host.models"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def folder(module: str) -> str:
    return ALIASES.get(module, module).split(".")[0]


def layer(module: str) -> int:
    for rank, names in enumerate(LAYERS):
        if folder(module) in names:
            return rank
    if module in COMMON:
        return -1
    raise AssertionError(f"{module} lies in no folder of LAYERS; the root holds no module but those named there")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("saelens_ext.") in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "saelens_ext"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    for name in imports(MODULES[module]):
        assert name != "saelens_ext", f"{module} imports the package root"
        imported = name.removeprefix("saelens_ext.")
        here, there = folder(module), folder(imported)
        assert here == there or layer(imported) < layer(module), f"{module} imports {imported} from above or beside"


@pytest.mark.parametrize(
    "place", sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}, key=str), ids=lambda place: place.name
)
def test_every_folder_says_what_belongs_there(place):
    assert "Belongs here:" in (ast.get_docstring(ast.parse((place / "__init__.py").read_text())) or "")


def test_there_are_no_import_cycles():
    graph = {module: {name.removeprefix("saelens_ext.") for name in imports(path)} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def rooms(module: str) -> int:
    """How many folders a module of the package lies in."""
    return len(MODULES[module].relative_to(PACKAGE).parts) - 1


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder(m) in ("evals", "ops") and rooms(m) == 1))
def test_what_rooms_share_imports_none_of_them(module):
    own = {name.removeprefix("saelens_ext.") for name in imports(MODULES[module])}
    assert not [name for name in own if folder(name) == folder(module) and rooms(name) > 1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rooms_stay_small(module):
    text = MODULES[module].read_text()
    assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 60, f"{module}.{node.name} is too long"
