"""One rule about BOS, and one probability for one sequence of tokens, whatever asks."""

import torch

from saelens_ext import ActivationStream
from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.host.prompt_passes import CachedPasses, prompt_ids
from saelens_ext.ops.modes import evaluating
from saelens_ext.steering.interventions import add_direction
from tests.architectures._hosts import TOKENS, normal
from tests.models_zoo import D_MODEL

TEXT = "The assert statement"


def log_probs(model, prefix_ids, ids):
    """Of tokens behind a prefix, from one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix_ids, *ids]]))[0].double()
    start = len(prefix_ids) - 1
    return logits.log_softmax(dim=-1)[range(start, start + len(ids)), list(ids)].float()


def test_sampling_and_scoring_agree(host):
    model = host.model
    drawn = sample_continuations(model, TEXT, 5, max_new_tokens=6, seed=3)
    scored = score_continuations(model, TEXT, [drawn.ids_of(row) for row in range(len(drawn))])
    assert drawn.prefix_ids == scored.prefix_ids and drawn.lengths.tolist() == scored.lengths.tolist()
    torch.testing.assert_close(drawn.log_probs, scored.log_probs, rtol=0, atol=1e-4)
    for row in range(len(drawn)):
        ids = drawn.ids_of(row)
        expected = log_probs(model, drawn.prefix_ids, ids)
        torch.testing.assert_close(drawn.log_probs[row, : len(ids)], expected, rtol=0, atol=1e-4)


def test_a_text_behind_a_prefix_has_the_tokens_it_has_there(host):
    model, tokenizer = host.model, host.model.tokenizer
    for rest in (" is (x)", ", (x)", " lead é"):
        start = list(prompt_ids(model, TEXT))
        whole = prompt_ids(model, TEXT + rest).tolist()
        assert whole[: len(start)] == start, "these texts are cut at a token"
        scored = score_continuations(model, TEXT, [rest])
        assert scored.ids_of(0) == whole[len(start) :], (rest, tokenizer.convert_ids_to_tokens(scored.ids_of(0)))
        torch.testing.assert_close(scored.log_probs[0], log_probs(model, start, whole[len(start) :]), rtol=0, atol=1e-4)


def test_a_cache_changes_nothing_inside_an_intervention_or_outside(host):
    model, ids = host.model, TOKENS[:1]
    for strength in (0.0, 3.0):
        with add_direction(model, "blocks.1.hook_resid_post", normal(D_MODEL), strength), evaluating(model):
            whole = model(ids)[0]
            passes = CachedPasses(model, ids[:, :8])
            for length in range(8, ids.shape[1]):
                torch.testing.assert_close(passes.logits()[0], whole[length - 1], rtol=1e-4, atol=1e-4)
                passes.append(ids[:, length])


def starts(model, text):
    """The first tokens of a text by everything that reads one."""
    batch = next(iter(ActivationStream(model, [text], "hook_embed", context_size=32, exclude_special_tokens=False)))
    window = batch.windows[0]
    return {
        "prompt": prompt_ids(model, text).tolist(),
        "stream": window[window >= 0].tolist(),
        "sampled": list(sample_continuations(model, text, 1, max_new_tokens=1).prefix_ids),
        "scored": list(score_continuations(model, text, [[5, 6]]).prefix_ids),
    }


def test_bos_is_where_the_model_itself_puts_it(host):
    expected = host.model.to_tokens(TEXT)[0].tolist()
    assert (expected[0] == 0) == host.row.prepends_bos
    assert starts(host.model, TEXT) == dict.fromkeys(("prompt", "stream", "sampled", "scored"), expected)
