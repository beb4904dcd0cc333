"""One rule about BOS, and one probability for one sequence of tokens, whatever asks."""

import torch

from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.host.prompt_passes import CachedPasses, evaluating
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


def test_a_cache_changes_nothing_inside_an_intervention_or_outside(host):
    model, ids = host.model, TOKENS[:1]
    for strength in (0.0, 3.0):
        with add_direction(model, "blocks.1.hook_resid_post", normal(D_MODEL), strength), evaluating(model):
            whole = model(ids)[0]
            passes = CachedPasses(model, ids[:, :8])
            for length in range(8, ids.shape[1]):
                torch.testing.assert_close(passes.logits()[0], whole[length - 1], rtol=1e-4, atol=1e-4)
                passes.append(ids[:, length])
