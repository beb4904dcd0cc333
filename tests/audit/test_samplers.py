"""Audits whose continuations come from another sampler, and folders that know which."""

import json

import pytest

from saelens_ext.audit.audit import audit_continuations
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.samplers.sampler import Draw
from saelens_ext.host.endpoint import EndpointUnavailableError
from tests.audit.test_audit import OPTIONS, PREFIX
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

FEW = OPTIONS | {"validate": False}


class Lists:
    """A sampler of texts in a list, which fails at a number."""

    def __init__(self, name="a", fails_at=None):
        self.name, self.fails_at, self.asked = name, fails_at, []

    def describe(self):
        return {"kind": "lists", "name": self.name}

    def draw(self, prefix, prefix_ids, numbers, options, stop):
        self.asked += numbers
        if self.fails_at in numbers:
            raise EndpointUnavailableError("nobody answers")
        words = ("is", "was", "has", "had", "can", "will", "may", "must")
        return [Draw(text=f" {words[n % 8]} {words[n // 8 % 8]}") for n in numbers]


@pytest.fixture(scope="module")
def setting():
    model = make_model("llama", "SAETransformerBridge")
    return model, [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)]


@pytest.mark.slow
def test_a_folder_is_of_one_sampler(setting, tmp_path):
    model, dictionaries = setting
    options = {"folder": tmp_path, **FEW}
    found = audit_continuations(model, PREFIX, dictionaries, sampler=Lists(), **options)
    (one,) = found.prefixes
    assert one.continuations.texts[:2] == (" is is", " was is") and len(one.continuations) == 16
    assert one.continuations.metadata["sampling"]["sampler"] == found.about["sampler"] == {"kind": "lists", "name": "a"}
    assert json.loads(next(tmp_path.glob("prefix_*/audit.json")).read_text())["about"]["sampler"]["name"] == "a"
    again = Lists()
    (same,) = audit_continuations(model, PREFIX, dictionaries, sampler=lambda: again, **options).prefixes
    assert same.continuations.texts == one.continuations.texts and not again.asked
    for other in (Lists("b"), None):
        with pytest.raises(ValueError, match="holds an audit with another about"):
            audit_continuations(model, PREFIX, dictionaries, sampler=other, **options)
    page = found.save_html(tmp_path / "page.html").read_text()
    assert "kind lists; name a" in page


@pytest.mark.slow
def test_what_fails_is_not_recorded_as_the_prompts_failure(setting, tmp_path):
    model, dictionaries = setting
    options = {"folder": tmp_path, "on_failure": "record", **FEW}
    prompts = [PREFIX, "An expression list"]
    with pytest.raises(EndpointUnavailableError):
        audit_continuations(model, prompts, dictionaries, sampler=Lists(fails_at=3), **options)
    found = audit_continuations(model, prompts, dictionaries, sampler=Lists(), **options)
    assert len(found.prefixes) == 2 and not found.failures


def test_the_model_draws_nothing(setting, monkeypatch):
    with pytest.raises(ValueError, match="continuations and sampler are both given"):
        audit_continuations(setting[0], PREFIX, setting[1], continuations=[" a", " b"], sampler=Lists())
    monkeypatch.setattr("saelens_ext.continuations.collected.draw_continuations", None)
    found = sample_continuations(setting[0], PREFIX, 70, sampler=Lists())
    assert len(found) == 64 and found.columns["count"].sum() == found.metadata["sampling"]["n_draws"] == 700


class Nothing(Lists):
    def draw(self, *arguments):
        return []


def test_a_sampler_without_continuations(setting):
    with pytest.raises(ValueError, match="The sampler Nothing gave no continuation"):
        sample_continuations(setting[0], PREFIX, 2, sampler=Nothing())
