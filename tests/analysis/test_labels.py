"""Labels of planted features, of noise, and of what is broken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from saelens_ext.analysis.labels import Labels, label_latents
from saelens_ext.analysis.labels_examples import ExampleRows
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.ops.label_score import Scorer
from tests.analysis import planted
from tests.analysis.planted import SILENT, THE_TOKEN, THE_WORD, TOKEN, TOPIC, WORDS


@pytest.fixture(scope="module")
def tokenizer():
    return planted.make_tokenizer()


@pytest.fixture(scope="module")
def profile():
    return planted.make_profile()


@pytest.fixture(scope="module")
def labels(profile, tokenizer):
    return label_latents(profile, tokenizer)


def lens_of(profile, ids):
    """A lens in which every latent promotes the tokens given."""
    promoted = torch.tensor(ids).expand(profile.d_sae, -1)
    logits = torch.zeros(promoted.shape)
    return LensResult(promoted_ids=promoted, promoted_logits=logits, suppressed_ids=promoted, suppressed_logits=logits)


@pytest.mark.slow
def test_a_latent_of_one_token_is_called_by_it(labels):
    label = labels[TOKEN]
    assert label.text.split(" … ")[0] == WORDS[THE_TOKEN]
    assert label.auroc > 0.95 and label.low > 0.8 and label.distinguishes
    assert label.score_text.startswith("AUROC")


def test_a_latent_of_one_word_nearby_is_called_by_that_word(labels):
    label = labels[TOPIC]
    assert WORDS[THE_WORD] in label.text.split("… ")[1].split(", ") and label.auroc > 0.9 and label.distinguishes


def test_a_latent_that_never_fires_has_no_label(labels):
    label = labels[SILENT]
    assert label.text == "" and not label.distinguishes and np.isnan(label.auroc) and label.n_members == 0
    assert label.score_text == "no label"


def test_labels_of_noise_are_shown_as_such(labels):
    noise = [labels[latent] for latent in range(planted.N_PLANTED, len(labels))]
    named = [label for label in noise if label.text]
    assert len(named) >= 20
    assert sum(label.distinguishes for label in noise) <= 0.15 * len(noise)
    poor = next(label for label in named if not label.distinguishes)
    assert poor.score_text.startswith("not distinguishable from chance: AUROC")


@pytest.mark.slow
def test_the_null_is_calibrated_over_many_latents_that_mean_nothing(tokenizer):
    profile = planted.make_profile(n_noise=500, seed=5)
    labels = label_latents(profile, tokenizer)
    p_values = labels.p_value[planted.N_PLANTED :]
    p_values = p_values[~p_values.isnan()].numpy()
    assert len(p_values) > 300
    for level in (0.05, 0.2, 0.5):
        # Ties make the test stricter than its level, never looser, beyond three standard errors.
        assert (p_values <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / len(p_values))
    assert abs(labels.auroc[planted.N_PLANTED :].nanmean() - 0.5) < 0.03


@pytest.mark.parametrize("n_random", [0, 8])
def test_what_made_a_label_never_scores_it(tokenizer, n_random):
    profile = planted.make_profile(n_random=n_random)
    rows = ExampleRows(profile, tokenizer, seed=0)
    splits = list(rows.splits(make=True))
    assert sum(len(split.members) > 2 for split in splits) > 30
    for latent, split in enumerate(splits):
        made = set(rows.windows[split.making].tolist())
        scored = np.concatenate([split.members, split.others])
        assert not made & set(rows.windows[scored].tolist())
        assert set(rows.latents[split.members].tolist()) <= {latent}
        assert len(set(rows.windows[split.members].tolist())) == len(split.members)  # one per window
        own = rows.latents == latent
        places = set(zip(rows.windows[: len(own)][own].tolist(), rows.positions[: len(own)][own].tolist()))
        assert not places & set(zip(rows.windows[split.others].tolist(), rows.positions[split.others].tolist()))


@pytest.mark.slow
def test_a_label_cannot_be_scored_by_heart(tokenizer):
    """Were a label scored on what made it, noise would look meaningful; the same noise held out does not."""
    profile = planted.make_profile(n_noise=200, seed=9)
    labels = label_latents(profile, tokenizer)
    rows = ExampleRows(profile, tokenizer, seed=0)
    from saelens_ext.analysis.labels_terms import ContextLabels

    splits = list(rows.splits(make=True))
    made = ContextLabels(rows, splits, False)
    by_heart = [
        Scorer(200, 0).score(made.scores(j, split.making), made.scores(j, split.others))["auroc"]
        for j, split in enumerate(splits)
        if made.texts[j] and j >= planted.N_PLANTED
    ]
    assert np.mean(by_heart) > 0.6 > labels.auroc[planted.N_PLANTED :].nanmean() + 0.05


def test_promoted_tokens_label_latents_that_make_them_follow(tokenizer):
    profile = planted.make_profile()
    # In the windows of the latent's examples the token promoted comes next.
    contexts = profile.random.contexts.clone()
    contexts[TOKEN, :, planted.CONTEXT + 1] = 33
    profile = replace(profile, random=replace(profile.random, contexts=contexts))
    with pytest.raises(ValueError, match="lens="):
        label_latents(profile, tokenizer, method="promoted")
    labels = label_latents(profile, tokenizer, method="promoted", lens=lens_of(profile, [33, 34]))
    assert labels.method == "promoted" and labels[TOKEN].text == f"{WORDS[32]} / {WORDS[33]}"
    assert labels[TOKEN].auroc > 0.95 and labels[TOKEN].distinguishes
    noise = labels.distinguishes[planted.N_PLANTED :]
    assert noise.double().mean() < 0.2
    with pytest.raises(ValueError, match="lens is of 2"):
        label_latents(profile, tokenizer, lens=lens_of(replace(profile, counts=torch.ones(2)), [1]))


@pytest.mark.slow
def test_labels_are_the_same_again_and_survive_a_save(profile, tokenizer, labels, tmp_path):
    again = label_latents(profile, tokenizer, progress=True)
    assert again.texts == labels.texts and again.auroc.nan_to_num(-1).equal(labels.auroc.nan_to_num(-1))
    loaded = Labels.load(labels.save(profile.save(tmp_path)), profile)
    assert loaded.texts == labels.texts and loaded.settings == labels.settings
    assert list(map(repr, loaded)) == list(map(repr, labels))
    assert loaded.to_dataframe().equals(labels.to_dataframe())
    content = json.loads((tmp_path / "labels.json").read_text())
    assert content["format_version"] == 1
    with pytest.raises(ValueError, match="do not belong together"):
        Labels.load(tmp_path, replace(profile, hook_name="elsewhere", hook_aliases=("elsewhere",)))
    (tmp_path / "labels.json").write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(ValueError, match="upgrade"):
        Labels.load(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(content | {"texts": content["texts"][1:], "d_sae": 42}))
    with pytest.raises(ValueError, match="damaged"):
        Labels.load(tmp_path)


@pytest.mark.slow
def test_some_latents_only(profile, tokenizer, labels):
    some = label_latents(profile, tokenizer, latents=[TOKEN, 5])
    assert some.texts[TOKEN] == labels.texts[TOKEN] and {i for i, text in enumerate(some.texts) if text} <= {TOKEN, 5}
    for wrong in ([-1], [profile.d_sae], []):
        with pytest.raises(ValueError, match="latents"):
            label_latents(profile, tokenizer, latents=wrong)


def test_bad_input(profile, tokenizer):
    with pytest.raises(ValueError, match="method must be one of"):
        label_latents(profile, tokenizer, method="context")
    with pytest.raises(ValueError, match="n_null"):
        label_latents(profile, tokenizer, n_null=0)
    with pytest.raises(ValueError, match="give that of the model"):
        label_latents(profile, planted.make_tokenizer(WORDS[:50]))
    empty = torch.full_like(profile.top.token_ids, -1)
    with pytest.raises(ValueError, match="holds no example"):
        label_latents(replace(profile, top=replace(profile.top, token_ids=empty), random=None), tokenizer)


def test_latents_seen_once_or_twice_are_not_scored_on_themselves(tokenizer):
    profile = planted.make_profile()
    ids = profile.top.token_ids.clone()
    ids[4, 1:] = -1
    rare = replace(profile, top=replace(profile.top, token_ids=ids), random=None)
    label = label_latents(rare, tokenizer)[4]
    assert label.text and np.isnan(label.auroc) and not label.distinguishes
    assert label.score_text.startswith("not scored")


@pytest.mark.slow
def test_hostile_text_stays_on_one_line_and_visible(tmp_path):
    words = ["\u202eleft", "<script>", "two\nlines", "nul\x00l", *WORDS[4:]]
    profile = planted.make_profile()
    contexts = profile.top.contexts.clone()
    for latent in range(4):
        contexts[latent, :, planted.CONTEXT] = 1 + latent
    profile = replace(profile, top=replace(profile.top, contexts=contexts))
    labels = label_latents(profile, planted.make_tokenizer(words))
    assert labels.texts[0].startswith("⟨U+202E⟩left") and labels.texts[1].startswith("<script>")
    assert labels.texts[3].startswith("nul⟨U+0000⟩l") and "\n" not in "".join(labels.texts)
    assert Labels.load(labels.save(tmp_path)).texts == labels.texts


def test_a_score_is_that_of_the_definition():
    members, others = np.array([3.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.5, 0.5])
    found = Scorer(2000, 0).score(members, others)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found["auroc"] == pytest.approx(np.mean(pairs))
    everything = Scorer(2000, 0).score(np.ones(4), np.zeros(4))
    assert everything["p_value"] == pytest.approx(1 / 70, abs=0.01)  # 8 choose 4 ways to deal them
    nothing = Scorer(100, 0).score(np.zeros(4), np.zeros(9))
    assert nothing["auroc"] == 0.5 and nothing["p_value"] == 1
    assert np.isnan(Scorer(10, 0).score(np.array([np.nan]), others)["p_value"])
