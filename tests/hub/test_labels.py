"""Labels go with a dictionary to the Hub, and are on its card."""

import pytest
import torch

from saelens_ext.analysis.labels import Labels
from saelens_ext.hub import load_from_hub, push_to_hub

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

REPO = "lab/dictionaries"


def made_labels(profile, texts):
    k = profile.d_sae
    score = torch.full((k,), 0.9).double()
    p_value = torch.where(torch.arange(k) < 2, 0.001, 0.5).double()
    return Labels(
        method="contexts",
        hook_name=profile.hook_name,
        texts=tuple(texts),
        outputs=(),
        sentences=(),
        auroc=score,
        auroc_low=score.clone(),
        auroc_high=score.clone(),
        null_high=score.clone(),
        p_value=p_value,
        n_members=torch.full((k,), 5),
        n_others=torch.full((k,), 50),
        settings={"seed": 0},
    )


def test_labels_come_back_and_are_on_the_card(hub, made):
    k = made.profile.d_sae
    labels = made_labels(made.profile, ["Monday", "<img src=x> | [a](b) `c`", *["other"] * (k - 3), ""])
    push_to_hub(made.partition, REPO, "p20", profile=made.profile, labels=labels)
    found = load_from_hub(REPO, "p20")
    assert found.labels.texts == labels.texts and torch.equal(found.labels.p_value, labels.p_value)
    card = hub.repos[REPO].files["README.md"].decode()
    assert f"| latents with a label | {k - 1} |" in card and "held out (5% level) | 2 |" in card
    assert "| 0 | Monday | 0.90 [0.90, 0.90] |" in card and "`labels.json`" in card
    assert "<img" not in card and "[a](b)" not in card and "&#60;img src=x&#62;" in card and "| other |" not in card
    # Another push, without labels, leaves none behind.
    push_to_hub(made.partition, REPO, "p20", profile=made.profile)
    assert load_from_hub(REPO, "p20").labels is None and "### Labels" not in hub.repos[REPO].files["README.md"].decode()


def test_labels_of_another_dictionary_are_refused(hub, made):
    labels = made_labels(made.profile, ["x"] * (made.profile.d_sae + 1))
    with pytest.raises(ValueError, match="labels are of"):
        push_to_hub(made.partition, REPO, "p20", labels=labels)
    assert REPO not in hub.repos
