"""Audits of many prompts: one is held at a time, workers give the same to the bit, and an index leads to all pages."""

import gc
import json
import os
import weakref

import joblib
import pytest
import torch

from saelens_ext.audit import audit as audit_module
from saelens_ext.audit.audit import audit_continuations
from saelens_ext.continuations.audit_stages import stages as stages_module
from saelens_ext.continuations.audit_stages.kept import own_folder
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.report.audit.wording import quoted
from tests.audit.test_audit import OPTIONS, same
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model
from tests.report.parsed_page import Page

PROMPTS = ["The assert statement", "An expression list", "Why <b>not</b>"]


def load():
    return make_model("llama", "SAETransformerBridge")


def dictionaries(model):
    return [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=32)]


@pytest.fixture(scope="module")
def alone():
    """Of one process, without a folder."""
    model = load()
    return audit_continuations(model, PROMPTS, dictionaries(model), **OPTIONS)


@pytest.mark.slow
def test_with_a_folder_one_prompt_is_held_and_the_results_are_the_same(alone, tmp_path, monkeypatch):
    held, most = weakref.WeakSet(), []
    kept = audit_module.audit_prefix

    def watched(*args, **kwargs):
        gc.collect()
        most.append(len(held))
        found = kept(*args, **kwargs)
        held.add(found)
        return found

    monkeypatch.setattr(audit_module, "audit_prefix", watched)
    audit = audit_continuations(load, PROMPTS, dictionaries, folder=tmp_path, **OPTIONS)
    gc.collect()
    assert most == [0, 0, 0] and len(held) == 0
    same(alone, audit)
    assert audit.verdict == alone.verdict
    prefixes = weakref.WeakSet(audit.prefixes)
    gc.collect()
    assert len(prefixes) == 1
    assert [one.prompt for one in audit.prefixes[1:]] == PROMPTS[1:] and audit.prefixes[-1].prompt == PROMPTS[-1]
    with pytest.raises(IndexError):
        audit.prefixes[3]
    # What is kept of a prompt does not depend on which others there are, nor on their order.
    asked = []
    monkeypatch.setattr(audit_module, "audit_prefix", lambda subject, question, *more: asked.append(question.words))
    other = audit_continuations(load, [PROMPTS[2], PROMPTS[0]], dictionaries, folder=tmp_path, **OPTIONS)
    assert not asked and [one.prompt for one in other.outlines] == [PROMPTS[2], PROMPTS[0]]
    assert other.outlines[0].modes.equals(audit.outlines[2].modes)

    def failing(subject, question, *more):
        asked.append(question.words)
        raise ValueError("not audited")

    monkeypatch.setattr(audit_module, "audit_prefix", failing)
    more = {"folder": tmp_path, "on_failure": "record", **OPTIONS}
    wider = audit_continuations(load, ["One more", *PROMPTS], dictionaries, **more)
    assert asked == list(wider.failures) == ["One more"] and [one.prompt for one in wider.outlines] == PROMPTS


@pytest.mark.slow
def test_over_workers_it_is_the_same_to_the_bit(alone, tmp_path):
    loaded = []

    def counted():
        loaded.append(1)
        return load()

    with joblib.parallel_config(backend="sequential"):
        audit = audit_continuations(counted, PROMPTS, dictionaries, folder=tmp_path, n_workers=2, **OPTIONS)
    same(alone, audit)
    assert len(loaded) == 2  # once here, once in the worker
    again = audit_continuations(counted, PROMPTS, dictionaries, folder=tmp_path, n_workers=2, **OPTIONS)
    same(alone, again)
    assert len(loaded) == 3, "nothing is left to do, so no worker loads a model"


def test_what_workers_need(tmp_path):
    model = load()
    with pytest.raises(ValueError, match="n_workers=2 needs folder=, on storage that all workers share"):
        audit_continuations(load, PROMPTS, dictionaries, n_workers=2, **OPTIONS)
    with pytest.raises(ValueError, match="needs a model for each worker: give a function .* instead of a SAETransf"):
        audit_continuations(model, PROMPTS, dictionaries(model), n_workers=2, folder=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="workers must be one of 'joblib', 'ray', got 'dask'"):
        audit_continuations(load, PROMPTS, dictionaries, workers="dask", **OPTIONS)
    with pytest.raises(ValueError, match="on_failure must be one of 'raise', 'record', got 'ignore'"):
        audit_continuations(load, PROMPTS, dictionaries, on_failure="ignore", **OPTIONS)
    models = iter([load(), make_model("gpt2", "SAETransformerBridge")])
    with joblib.parallel_config(backend="sequential"), pytest.raises(ValueError, match="A worker audits another model"):
        audit_continuations(lambda: next(models), PROMPTS, dictionaries, folder=tmp_path, n_workers=2, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_failures_are_recorded_and_shown(n_workers, tmp_path, monkeypatch):
    sample = stages_module.sample_continuations

    def one_row(model, prefix, *args, **kwargs):
        found = sample(model, prefix, *args, **kwargs)
        return found.select([0]) if prefix == PROMPTS[2] else found

    monkeypatch.setattr(stages_module, "sample_continuations", one_row)
    options = OPTIONS | {"validate": False, "folder": tmp_path, "n_workers": n_workers}
    with joblib.parallel_config(backend="sequential"):
        audit = audit_continuations(load, PROMPTS, dictionaries, on_failure="record", **options)
        with pytest.raises(ValueError, match="1 of 3 prefixes could not be audited; 'Why <b>not</b>': .* gave 1 cont"):
            audit_continuations(load, PROMPTS, dictionaries, **options)
        with pytest.raises(ValueError, match="1 of 1 prefixes could not be audited|gave 1 continuation"):
            audit_continuations(
                load, PROMPTS[2:], dictionaries, on_failure="record", **options | {"folder": None, "n_workers": 1}
            )
    assert [one.prompt for one in audit.prefixes] == PROMPTS[:2]
    assert list(audit.failures) == PROMPTS[2:] and "gave 1 continuation(s)" in audit.failures[PROMPTS[2]]
    page = audit.save_index(tmp_path / "pages").read_text()
    assert "Why &lt;b&gt;not&lt;/b&gt;" in page and "gave 1 continuation(s)" in page and "<b>not</b>" not in page


@pytest.mark.slow
def test_a_test_that_cannot_be_made_is_kept(tmp_path, monkeypatch):
    def nothing(*args, **kwargs):
        raise stages_module.NothingToTest("No mode has a latent.")

    monkeypatch.setattr(stages_module, "validate_clusters", nothing)
    first = audit_continuations(load, PROMPTS[:1], dictionaries, folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(stages_module, "validate_clusters", None)
    again = audit_continuations(load, PROMPTS[:1], dictionaries, folder=tmp_path, **OPTIONS)
    assert first.prefixes[0].not_validated == again.prefixes[0].not_validated == "No mode has a latent."


@pytest.mark.slow
def test_the_index(alone, tmp_path):
    path = alone.save_index(tmp_path)
    page = Page(path.read_text())
    links = [value for name, value in page.attributes if name == "href" and value.startswith("pages/")]
    assert links == [f"pages/{number:03d}.html" for number in range(3)]
    for link, prompt in zip(links, PROMPTS, strict=True):
        text = (tmp_path / link).read_text()
        assert '<a href="../index.html">' in text and prompt.split()[0] in text
    assert alone.verdict.headline in page.text
    for prompt, one in zip(PROMPTS, alone.prefixes, strict=True):
        assert prompt in page.text
        largest = one.modes().sort_values("weight", ascending=False, kind="stable")["text"][:3]
        assert all(" ".join(quoted(text).split()) in page.text for text in largest)
    assert path.read_text() == alone.save_index(tmp_path / "again").read_text()


# --- real workers ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:joblib", "ignore::ResourceWarning")
@pytest.mark.parametrize("workers", ["joblib", "ray"])
def test_a_worker_that_is_killed_ends_the_call_and_the_next_goes_on(workers, tmp_path, request):
    if workers == "ray":
        request.getfixturevalue("cluster")
    here, killed = os.getpid(), tmp_path / "killed"
    kept_of = lambda prompt: own_folder(tmp_path / "audit", Question(prompt=prompt))  # noqa: E731

    def dying():
        """A model whose process is killed during the second prompt that it audits."""
        model = load()
        first = kept_of(PROMPTS[0]) / "clustering.json"

        def die(x, hook):
            if os.getpid() != here and first.exists() and not killed.exists():
                killed.touch()
                os._exit(9)

        model.blocks[0].hook_out.add_hook(die, is_permanent=True)
        return model

    # With its hook, for which steering takes another path, and rounds otherwise.
    alone = audit_continuations(dying, PROMPTS, dictionaries, **OPTIONS)
    options = OPTIONS | {"folder": tmp_path / "audit", "n_workers": 2, "workers": workers}
    with pytest.raises(RuntimeError, match="A worker died .*the same call goes on from there"):
        audit_continuations(dying, PROMPTS, dictionaries, **options)
    assert killed.exists()
    done = kept_of(PROMPTS[0]) / "continuations"
    before = {path: path.stat().st_mtime_ns for path in done.iterdir()}
    audit = audit_continuations(dying, PROMPTS, dictionaries, **options)
    same(alone, audit)
    assert {path: path.stat().st_mtime_ns for path in done.iterdir()} == before
    assert json.loads((kept_of(PROMPTS[2]) / "audit.json").read_text())["prefix"] == PROMPTS[2]


def test_nothing_of_a_prompt_is_left_in_the_overview(alone):
    """100 prompts fit in memory: an outline holds no continuations, embeddings or signatures."""
    for outline in alone.outlines:
        for value in vars(outline).values():
            assert not isinstance(value, PrefixAudit | torch.Tensor)
            assert type(value).__name__ != "ContinuationSet"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["joblib", "ray"])
def test_another_model_in_a_worker_is_said_as_it_is(workers, cluster, tmp_path):
    here = os.getpid()

    def other_there():
        return make_model("llama", "SAETransformerBridge", seed=int(os.getpid() != here))

    options = OPTIONS | {"folder": tmp_path, "n_workers": 2, "workers": workers}
    with pytest.raises(ValueError, match="A worker audits another model, dictionary or embedder"):
        audit_continuations(other_there, PROMPTS, dictionaries, **options)
