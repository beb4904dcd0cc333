"""Long continuations are scored, attributed and steered in chunks of positions, and embedded few at a time."""

from dataclasses import replace

import pytest
import torch

from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.attribution import shown
from saelens_ext.continuations.attribution.attribute import attribute_continuations, attribution_completeness
from saelens_ext.continuations.embed import embed_continuations
from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.continuations.steering.steer import steer_continuations
from saelens_ext.host import prompt_passes
from saelens_ext.host.models import resolve_hook
from saelens_ext.host.prompt_passes import CachedPasses
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.steering.sampling import continuation_log_probs
from tests.continuations._dictionaries import make
from tests.live_bytes import LiveBytes
from tests.models_zoo import HOSTED, make_model

PREFIX = "The assert statement"
MANY = {"max_sources": 10**6, "special_positions": True}
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 320, (n,), generator=GENERATOR).tolist() for n in (38, 4, 29)]

hosts = pytest.mark.parametrize(
    ("architecture", "model_class"),
    HOSTED,
    ids=lambda value: value.replace("SAETransformer", ""),
)


def dictionaries():
    return [make("standard", "blocks.0.hook_attn_out"), make("standard", "blocks.1.hook_out")]


@pytest.fixture
def chunked(monkeypatch):
    """Lets rows be cut into chunks of few columns from here on."""

    def start(pairs=200):
        monkeypatch.setattr(prompt_passes, "_MAX_PATTERN", pairs)
        monkeypatch.setattr(prompt_passes, "_FEWEST_COLUMNS", 2)

    return start


def passes(model, work):
    """How many tokens a row had in each pass of some work, and its result."""
    seen = []
    assert prompt_passes.is_causal(model)
    prompt_passes.is_resumable(model)  # both are tried on tokens of their own
    layer = model.original_model.get_input_embeddings() if hasattr(model, "original_model") else model.embed
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    try:
        return work(), seen
    finally:
        handle.remove()


@pytest.mark.slow
@hosts
def test_chunks_of_a_continuation_give_what_it_gives_whole(architecture, model_class, chunked):
    model = make_model(architecture, model_class)
    found = score_continuations(model, PREFIX, ROWS)
    expected = {}
    for backend in ("linear", "gradient", "relp"):
        try:
            shown.check_backend(model, backend)
        except ValueError:
            continue
        expected[backend] = attribute_continuations(model, dictionaries(), found, backend=backend, **MANY)
    assert "gradient" in expected
    chunked()
    for backend, whole in expected.items():
        assert shown.runs_in_chunks(model, backend)
        attribute = lambda: attribute_continuations(model, dictionaries(), found, backend=backend, verify=False, **MANY)  # noqa: E731
        cut, seen = passes(model, attribute)
        # The prefix is read whole.
        assert sorted(seen)[-2] <= len(found.prefix_ids) + 4 < 38
        # Sums of large terms that cancel: in float64 the two differ by 1e-7 of the largest.
        largest = float(whole.signatures.abs().max())
        torch.testing.assert_close(cut.signatures, whole.signatures, rtol=1e-4, atol=3e-5 * max(largest, 1))
        for name, column in whole.columns.items():
            torch.testing.assert_close(cut.columns[name], column, rtol=1e-4, atol=1e-5)
    cut, seen = passes(model, lambda: score_continuations(model, PREFIX, ROWS))
    assert len(seen) > 12
    torch.testing.assert_close(cut.log_probs, found.log_probs, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@hosts
def test_a_long_prompt_is_sampled_from_in_chunks(architecture, model_class, chunked):
    model = make_model(architecture, model_class)
    prompt = "The assert statement is a way to put a test into a program"
    options = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 1.0, "deduplicate": False, "seed": 1}
    expected, whole = passes(model, lambda: sample_continuations(model, prompt, 3, **options))
    chunked()
    found, seen = passes(model, lambda: sample_continuations(model, prompt, 3, **options))
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=1e-4)
    n = len(found.prefix_ids)
    if prompt_passes.has_kv_cache(model):
        assert whole[0] == n and sum(seen[:-4]) == n and max(seen) <= 2, "the least that a chunk has"
    with model.hooks(fwd_hooks=[(resolve_hook(model, "blocks.1.hook_resid_post"), lambda x, hook: x)]):
        _, seen = passes(model, lambda: sample_continuations(model, prompt, 3, **options))
    assert seen[0] == n, "hooks may count positions"


def test_memory_to_sample_from_a_long_prompt_grows_with_its_keys_and_values_alone(chunked):
    model = make_model("llama", "SAETransformerBridge")

    def most(n):
        ids = torch.randint(3, 320, (8, n), generator=GENERATOR)
        with LiveBytes() as live, torch.no_grad():
            CachedPasses(model, ids).logits()
        return live.most

    chunked()
    short, long = most(20), most(50)
    # Three blocks' keys and values of 2 heads of 8 numbers, once, and once more while they grow.
    of_the_rest = 30 * 8 * 3 * 2 * 16 * 4
    assert long - short <= 2 * of_the_rest < 30 * 8 * 320 * 4, "the logits of all tokens would be more"


@hosts
def test_a_prompt_has_no_logits_where_the_host_can_leave_them_out(architecture, model_class):
    """With hooks at the unembedding it has, since they may go by the places of tokens."""
    model, seen = make_model(architecture, model_class), []
    model.unembed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    prompt, rows = torch.tensor([0, *ROWS[2]]), [[7, 8, 9, 10], [11], [12, 13]]
    with torch.no_grad():
        found = continuation_log_probs(model, prompt, rows)
        ids = [torch.cat([prompt, torch.tensor(row)])[None] for row in rows]
        expected = [model(one).float().log_softmax(-1)[0, len(prompt) - 1 : -1] for one in ids]
        for scores, each, row in zip(found, expected, rows, strict=True):
            torch.testing.assert_close(scores, each[range(len(row)), row], rtol=1e-4, atol=1e-4)
        assert seen[0] == (5 if model_class == "SAETransformerBridge" else len(prompt) + 4)
        place = resolve_hook(model, "unembed.hook_out")
        del seen[:]
        with model.hooks(fwd_hooks=[(place, lambda x, hook: x)]):
            continuation_log_probs(model, prompt, rows)
    assert seen == [len(prompt) + 4]


def test_the_parts_of_a_long_continuation_make_up_its_target(chunked):
    model = make_model("llama", "SAETransformerBridge")
    found = score_continuations(model, PREFIX, ROWS)
    whole = attribution_completeness(model, dictionaries(), found)
    chunked()
    cut, seen = passes(model, lambda: attribution_completeness(model, dictionaries(), found))
    assert len(seen) > 40 and cut.relative_gap.max() < 1e-4
    for name in ("target", "prefix", "continuation", "bias"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # the latter with a sliding window of 12
def test_answers_behind_long_reasoning_and_effects_on_them(architecture, chunked):
    model = make_model(architecture, "SAETransformerBridge")
    found = mark_answers(model, score_continuations(model, PREFIX, ROWS), span=(-2, None))
    whole = attribute_continuations(model, dictionaries(), found, **MANY)
    # The short row's: through a window of 12 the prefix does not reach the end of the long ones.
    effects = steer_continuations(model, dictionaries(), whole, whole.signatures[1], top=3, strengths=(-1, 1))
    chunked()
    cut = attribute_continuations(model, dictionaries(), found, **MANY)
    torch.testing.assert_close(cut.signatures, whole.signatures, rtol=1e-4, atol=1e-5)
    again = steer_continuations(model, dictionaries(), whole, whole.signatures[1], top=3, strengths=(-1, 1))
    for measure, changes in effects.changes.items():
        torch.testing.assert_close(again.changes[measure], changes, rtol=1e-4, atol=5e-5)


def test_what_cannot_be_cut_is_taken_whole(chunked, caplog, monkeypatch):
    model = make_model("llama", "SAETransformerBridge")
    found = score_continuations(model, PREFIX, ROWS)
    whole = attribute_continuations(model, dictionaries(), found, **MANY)
    chunked()
    point = model.hook_dict[resolve_hook(model, "blocks.2.hook_resid_post")]
    point.add_hook(lambda x, hook: None)  # it may count positions
    try:
        for work in (
            lambda: score_continuations(model, PREFIX, ROWS[:1]),
            lambda: attribute_continuations(model, dictionaries(), found, **MANY),
        ):
            result, seen = passes(model, work)
            assert max(seen) == len(found.prefix_ids) + 38
        assert torch.equal(result.signatures, whole.signatures) or torch.allclose(result.signatures, whole.signatures)
    finally:
        point.remove_hooks()
    # A cache that forgets is found out.
    started = prompt_passes.KVCache.started
    monkeypatch.setattr(prompt_passes.KVCache, "started", lambda cache, past=(): started(cache))
    monkeypatch.setattr(shown, "_FAULTS", type(shown._FAULTS)())
    result, seen = passes(model, lambda: attribute_continuations(model, dictionaries(), found, **MANY))
    assert max(seen) == len(found.prefix_ids) + 38
    assert caplog.text.count("Long continuations are attributed in one piece on this model") == 1
    torch.testing.assert_close(result.signatures, whole.signatures, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["linear", "gradient", "relp", "score"])
def test_memory_grows_with_the_keys_and_values_of_a_continuation_and_with_nothing_else(work, chunked):
    model = make_model("llama", "SAETransformerBridge")

    def most(length):
        found = score_continuations(model, PREFIX, [(ROWS[0] + ROWS[2])[:length]])
        with LiveBytes() as live:
            if work == "score":
                score_continuations(model, PREFIX, [found.ids_of(0)])
            else:
                attribute_continuations(model, dictionaries(), found, backend=work, **MANY)
        return live.most

    chunked(64)
    most(24)
    short, long = most(24), most(48)
    # Three blocks' keys and values of 2 heads of 8 numbers. Attribution has them of the pass and of its twin without
    # sources, the past of a chunk, the gradients, and copies for all 4 heads of queries; scoring has them once.
    of_a_token = 3 * 2 * 16 * 4
    assert long - short <= 24 * of_a_token * (2 if work == "score" else 8)


@pytest.mark.slow
def test_passes_of_an_embedder_do_not_grow_with_the_texts(monkeypatch):
    texts = ["is so", "was " * 60 + "so", "is one " * 50, "is"]
    model = make_model("llama", "SAETransformerBridge")
    found = score_continuations(model, PREFIX, [[33], [34, 35], [36], [37, 38]])
    found = replace(found, texts=tuple(texts))
    embedder = load_sentence_model(None)
    sizes = []
    handle = embedder[0].register_forward_hook(
        lambda module, inputs, output: sizes.append(output["token_embeddings"].shape[:2].numel())
    )
    try:
        whole = embed_continuations(found, embedder)
        assert max(sizes) > 200
        sizes.clear()
        monkeypatch.setattr(prompt_passes, "_MAX_BATCH_TOKENS", 130)
        few = embed_continuations(found, embedder)
        assert max(sizes) <= 130 and len(sizes) == 3
        torch.testing.assert_close(few.embeddings, whole.embeddings, rtol=1e-4, atol=1e-6)
    finally:
        handle.remove()
