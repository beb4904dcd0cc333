"""Importing the package again, anew, beside another plugin, or not at all."""

import importlib
import json
import sys
from contextlib import contextmanager

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY

import saelens_ext
from saelens_ext import ExemplarPartition, SNMFDictionary
from saelens_ext.dictionaries import decoder_only, exemplar_partition
from saelens_ext.dictionaries.registering import register

OWN = ("exemplar_partition", "snmf")


@contextmanager
def kept_as_it_was():
    """Put SAELens' registry and the package's modules back behind a test that changes them."""
    registry = dict(SAE_CLASS_REGISTRY)
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "saelens_ext"}
    contents = {name: dict(vars(module)) for name, module in modules.items()}
    try:
        yield
    finally:
        SAE_CLASS_REGISTRY.clear()
        SAE_CLASS_REGISTRY.update(registry)
        for name in [name for name in sys.modules if name.split(".")[0] == "saelens_ext"]:
            del sys.modules[name]
        sys.modules.update(modules)
        for name, module in modules.items():
            vars(module).clear()
            vars(module).update(contents[name])


@pytest.fixture
def registry():
    with kept_as_it_was():
        yield SAE_CLASS_REGISTRY


def partition() -> ExemplarPartition:
    rows = torch.eye(4)[:3]
    return ExemplarPartition.from_regions(rows, rows, torch.zeros(4), 0.3, metadata={"hook_name": "blocks.0.hook_out"})


def test_a_second_import_and_a_reload_change_nothing(registry):
    before = dict(registry)
    importlib.import_module("saelens_ext")
    importlib.reload(saelens_ext)
    assert registry == before
    assert registry["exemplar_partition"][0] is ExemplarPartition and registry["snmf"][0] is SNMFDictionary


def test_a_class_that_a_notebook_reloaded_is_the_one_that_loads_give(registry, tmp_path):
    partition().save_model(tmp_path)
    old = saelens_ext.ExemplarPartition
    importlib.reload(exemplar_partition)
    assert (
        type(SAE.load_from_disk(tmp_path)) is old
    )  # until the package itself is reloaded, all of it holds the old class
    importlib.reload(saelens_ext)
    new = saelens_ext.ExemplarPartition
    assert new is exemplar_partition.ExemplarPartition and new is not old
    assert type(SAE.load_from_disk(tmp_path)) is new
    assert type(SAE.from_dict(partition().cfg.to_dict())) is new
    # Modules that were not reloaded still hold the old one.
    assert type(old.load_from_disk(tmp_path)) is new
    assert type(new.load_from_disk(tmp_path)) is new


def test_modules_that_were_thrown_out_and_imported_anew(registry, tmp_path):
    partition().save_model(tmp_path)
    for name in ("saelens_ext", "saelens_ext.dictionaries.exemplar_partition", "saelens_ext.dictionaries.registering"):
        del sys.modules[name]
    anew = importlib.import_module("saelens_ext")
    assert anew is not saelens_ext
    assert type(SAE.load_from_disk(tmp_path)) is anew.ExemplarPartition is not ExemplarPartition


class OtherPartition(StandardSAE):
    """What another plugin could register."""


@pytest.mark.parametrize("taken", OWN)
def test_a_name_that_another_plugin_has_taken(registry, taken):
    for name in [name for name in registry if name.startswith(OWN)]:
        del registry[name]
    registry[taken] = (OtherPartition, StandardSAEConfig)
    before = dict(registry)
    with pytest.raises(ValueError) as caught:
        importlib.reload(saelens_ext)
    message = str(caught.value)
    package = __name__.split(".")[0]
    assert (
        f"The architecture '{taken}' is registered with SAELens already, as {__name__}.OtherPartition, registered by "
        f"another package, '{package}'" in message
    )
    assert "Use the two packages in separate processes" in message
    assert registry == before  # none of ours without the others
    # What the message says to do.
    exec(message[message.index("from sae_lens.registry") : message.rindex("`")])
    importlib.reload(saelens_ext)
    assert registry[taken][0].__module__.startswith("saelens_ext.")


def test_the_same_class_registered_before_is_fine(registry):
    for name in [name for name in registry if name.startswith("snmf")]:
        del registry[name]
    registry["snmf"] = (SNMFDictionary, saelens_ext.SNMFDictionaryConfig)
    importlib.reload(saelens_ext)
    assert registry["snmf"] == (SNMFDictionary, saelens_ext.SNMFDictionaryConfig)


def test_the_name_in_the_file_is_no_name_elsewhere(tmp_path):
    """Both names load; configs go by the plain one."""
    sae = partition()
    sae.save_model(tmp_path)
    written = json.loads((tmp_path / "cfg.json").read_text())
    assert written["architecture"] == "exemplar_partition (pip install saelens-ext, import saelens_ext)"
    assert sae.cfg.to_dict()["architecture"] == "exemplar_partition"
    for name in ("exemplar_partition", written["architecture"]):
        (tmp_path / "cfg.json").write_text(json.dumps(written | {"architecture": name}))
        for loaded in (
            SAE.load_from_disk(tmp_path),
            ExemplarPartition.load_from_disk(tmp_path),
            SAE.from_dict(written | {"architecture": name}),
        ):
            assert type(loaded) is ExemplarPartition
            assert loaded.cfg.to_dict()["architecture"] == loaded.cfg.architecture() == "exemplar_partition"
        assert saelens_ext.ExemplarPartitionConfig.from_dict(written | {"architecture": name}).d_sae == 3
    with pytest.raises(ValueError, match="is of architecture 'exemplar_partition'; SNMFDictionaryConfig takes 'snmf'"):
        saelens_ext.SNMFDictionaryConfig.from_dict(written)


def test_registering_several_is_all_or_none(registry):
    class Free(StandardSAE):
        pass

    before = dict(registry)
    with pytest.raises(
        ValueError, match=r"The architecture 'standard' is registered with SAELens already, as sae_lens\."
    ):
        register({"free": (Free, StandardSAEConfig), "standard": (Free, StandardSAEConfig)})
    assert registry == before
    assert decoder_only.DecoderOnlySAE.__subclasses__()


def test_types_are_shipped():
    assert (importlib.resources.files("saelens_ext") / "py.typed").is_file()
