"""Options that are fields of a config: named in help and to type checkers, and refused where they are misspelt."""

import inspect
import pydoc
from typing import get_args

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_ext as sx
from saelens_ext.activations.settings import StreamOptions
from saelens_ext.continuations.audit_stages.config import AuditConfig, AuditOptions
from saelens_ext.dictionaries.fit_sae import SAETrainingOptions
from saelens_ext.dictionaries.fit_snmf import SNMFFitConfig, SNMFFitOptions
from saelens_ext.dictionaries.grow_exemplars import ExemplarFitConfig, ExemplarFitOptions, ExemplarGrowthOptions

CASES = [
    (sx.fit_exemplar_partition, ExemplarGrowthOptions, ExemplarFitConfig),
    (sx.fit_exemplar_partitions, ExemplarFitOptions, ExemplarFitConfig),
    (sx.fit_snmf, SNMFFitOptions, SNMFFitConfig),
    (sx.fit_hierarchical_snmf, SNMFFitOptions, SNMFFitConfig),
    (sx.audit_continuations, AuditOptions, AuditConfig),
    (sx.RayActivationStream.__init__, StreamOptions, sx.ActivationStream),
]


@pytest.mark.parametrize(("function", "options", "source"), CASES)
def test_the_signature_names_every_option_with_its_default(function, options, source):
    parameters = inspect.signature(source).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    shown = inspect.signature(function).parameters
    assert {name: shown[name].default for name in defaults} == defaults
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in shown.values())
    assert all(f"{name}: " in pydoc.plain(pydoc.render_doc(function)) for name in defaults)


@pytest.mark.parametrize(("function", "options", "source"), [*CASES, (sx.fit_sae, SAETrainingOptions, None)])
def test_type_checkers_read_the_options_off_the_annotation(function, options, source):
    (rest,) = [
        annotation
        for annotation in inspect.unwrap(function).__annotations__.values()
        if get_args(annotation) == (options,)
    ]
    assert "Unpack" in str(rest)


def test_every_option_of_every_sae_that_saelens_trains_is_named():
    taken = {"d_in", "d_sae", "metadata", "device", "reshape_activations"}
    named = {name for _, kind in SAE_TRAINING_CLASS_REGISTRY.values() for name in kind.__dataclass_fields__}
    assert set(SAETrainingOptions.__annotations__) == named - taken
    assert "l1_coefficient" in inspect.signature(sx.fit_sae).parameters
