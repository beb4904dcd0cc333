"""Labels go with a dictionary to the Hub, and are on its card."""

import pytest
import torch

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import profile_dictionaries
from saelens_ext.hub import load_from_hub, pull_from_hub, push_to_hub
from saelens_ext.hub.contents import read_folder

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


def profiles_of(hierarchy, tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts, "blocks.1.mlp.out.hook_in", context_size=32, max_tokens=300)
    return profile_dictionaries(hierarchy.dictionaries, stream, n_examples=2)


def test_labels_and_profiles_of_the_levels_of_a_hierarchy_come_back(hub, made, tiny_bridge, tiny_texts):
    profiles = profiles_of(made.hierarchy, tiny_bridge, tiny_texts)
    labels = [made_labels(one, [f"level {n} latent {i}" for i in range(one.d_sae)]) for n, one in enumerate(profiles)]
    push_to_hub(made.hierarchy, REPO, "tree", profile=profiles, labels=labels)
    found = load_from_hub(REPO, "tree")
    assert [one.labels.texts for one in found.levels] == [one.texts for one in labels]
    assert all(torch.equal(one.profile.counts, profile.counts) for one, profile in zip(found.levels, profiles))
    assert found.labels is None and found.profile is None
    # A level by itself, as SAELens' users load it, has its own.
    assert load_from_hub(REPO, "tree/level_1").labels.texts == labels[1].texts
    card = hub.repos[REPO].files["README.md"].decode()
    assert "### Labels of level_0" in card and "| 0 | level 1 latent 0 |" in card and "level_l/labels.json" in card
    push_to_hub(made.hierarchy, REPO, "tree")
    assert all(one.labels is one.profile is None for one in load_from_hub(REPO, "tree").levels)


def test_what_lies_in_the_folders_of_levels_is_pushed_and_pulled(hub, made, tiny_bridge, tiny_texts, tmp_path):
    profiles = profiles_of(made.hierarchy, tiny_bridge, tiny_texts)
    made.hierarchy.save(tmp_path / "tree")
    made_labels(profiles[1], ["x"] * profiles[1].d_sae).save(profiles[1].save(tmp_path / "tree" / "level_1"))
    push_to_hub(tmp_path / "tree", REPO, "tree")
    pulled = read_folder(pull_from_hub(REPO, "tree", tmp_path / "pulled"))
    assert [one.labels is None for one in pulled.levels] == [True, False]
    assert torch.equal(pulled.levels[1].profile.counts, profiles[1].counts)


def test_labels_that_are_not_those_of_the_levels_are_refused(hub, made, tiny_bridge, tiny_texts):
    first, second = (
        made_labels(one, ["x"] * one.d_sae) for one in profiles_of(made.hierarchy, tiny_bridge, tiny_texts)
    )
    with pytest.raises(ValueError, match="A hierarchy of 2 levels takes labels as a list of 2, .*, got one"):
        push_to_hub(made.hierarchy, REPO, "tree", labels=first)
    with pytest.raises(ValueError, match="as a list of 2, the finest level first, got 1"):
        push_to_hub(made.hierarchy, REPO, "tree", labels=[first])
    with pytest.raises(ValueError, match="The labels are of 3 latents, and not of the dictionary"):
        push_to_hub(made.hierarchy, REPO, "tree", labels=[second, first])
    with pytest.raises(ValueError, match="Several profiles or labels are those of a hierarchy"):
        push_to_hub(made.partition, REPO, "p20", labels=[first])
    assert REPO not in hub.repos
