"""Importing the package registers its architectures and loads nothing else before it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import saelens_ext as sx

LISTING = """
import sys
import sae_lens
before = set(sys.modules)
import saelens_ext
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sae_lens.registry.SAE_CLASS_REGISTRY)
print(*sorted(set(saelens_ext.__all__) - set(dir(saelens_ext))))
"""


@pytest.mark.slow
def test_the_import_loads_only_the_dictionaries():
    result = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=True)
    packages, architectures, unlisted = result.stdout.splitlines()
    assert set(packages.split()) <= {"saelens_ext", "lazy_loader"}
    assert {"exemplar_partition", "snmf"} <= set(architectures.split()) and not unlisted


def test_every_public_name_is_there():
    assert all(getattr(sx, name) is not None for name in sx.__all__)
    assert "RayActivationStream" in sx.__all__ and "SNMFSection" not in sx.__all__


def test_importing_twice_does_not_touch_the_network_or_print(capfd):
    import saelens_ext  # noqa: F401

    assert capfd.readouterr() == ("", "")


def test_benchmarks_import_what_is_there():
    """Nobody runs the benchmarks on every change."""
    missing = []
    for path in sorted((Path(__file__).parent / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("saelens_ext"):
                module = importlib.import_module(node.module)
                missing += [f"{path.name}: {name.name}" for name in node.names if not hasattr(module, name.name)]
    assert missing == []
