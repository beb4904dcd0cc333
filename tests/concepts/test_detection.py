"""Concept detection and differences of means, against loops over sentences and tokens, on both model classes."""

import math
from functools import cache

import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.concepts import sentence_scores as concepts
from saelens_ext.concepts.detection import compare_sentences, concept_scores
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import (
    diff_means,
    difference_of,
    held_out_diff_means,
    sentence_sums,
    split_sentences,
)
from saelens_ext.concepts.sentence_scores import sentence_scores
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.demo.sentences import NEUTRAL, WEEKDAYS
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.host.models import resolve_hook
from saelens_ext.ops.detection import log_ratio
from tests import models_zoo

RESIDUAL, NEURONS = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"
D, D_MLP = models_zoo.D_MODEL, models_zoo.D_MLP["llama"]
CONTEXT = 16

SENTENCES = [
    "The cat sat.",
    "A statement may be continued over several lines, and it then needs no backslash inside of brackets at all.",
    "Numbers: 1, 22, 333.",
    "An end</s> in the middle, and a<pad> too.",
    "x y z",
    "def f(x): return x + 1",
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["tiny_hooked", "tiny_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


def dictionaries() -> dict[str, object]:
    def options(**extra):
        return {"d_in": D, "d_sae": 12, "metadata": SAEMetadata(hook_name=RESIDUAL), **extra}

    torch.manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(24, D), dim=1)
    metadata = {"hook_name": RESIDUAL}
    made = {
        "standard": StandardSAE(StandardSAEConfig(**options())),
        "layer_norm": StandardSAE(StandardSAEConfig(**options(normalize_activations="layer_norm"))),
        "topk": TopKSAE(TopKSAEConfig(**options(k=3))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**options())),
        "partition": ExemplarPartition.from_regions(units[:12], units[12:], torch.randn(D), 0.8, metadata=metadata),
        "partition_cosine": ExemplarPartition.from_regions(
            units[:12], units[12:], torch.randn(D), 0.8, readout="cosine", metadata=metadata
        ),
        "snmf": SNMFDictionary.from_features(units[:12] * (units[12:] > 0), metadata=metadata),
    }
    for name in ("standard", "layer_norm", "topk", "jumprelu"):
        made[name].b_dec.data.normal_(std=0.5)
    return made


DICTIONARIES = tuple(dictionaries())


@cache
@torch.no_grad()
def token_rows(model, sentence: str, hook: str = RESIDUAL, context: int = CONTEXT) -> torch.Tensor:
    """Activations at the tokens of one sentence, window by window, without padding, special tokens left out."""
    ids = model.tokenizer(sentence, add_special_tokens=False)["input_ids"]
    rows, name = [], resolve_hook(model, hook)
    for start in range(0, len(ids), context - 1):
        window = [0, *ids[start : start + context - 1]]
        with model.hooks(
            fwd_hooks=[(name, lambda x, hook: rows.append(x[0, [i for i, t in enumerate(window) if t > 2]].flatten(1)))]
        ):
            model(torch.tensor([window]))
    return torch.cat(rows)


def by_loop(model, sentences, score, hook: str = RESIDUAL) -> torch.Tensor:
    table = []
    for sentence in sentences:
        tokens = [score(row) for row in token_rows(model, sentence, hook)]
        table.append([max(float(token[k]) for token in tokens) for k in range(len(tokens[0]))])
    return torch.tensor(table)


def cosines(row: torch.Tensor, directions, center=0.0) -> list[torch.Tensor]:
    return [torch.dot(row - center, w) / ((row - center).norm() * w.norm()) for w in directions]


# --- sentence scores ---


@pytest.mark.parametrize(
    "hook, d", [(RESIDUAL, D), (NEURONS, D_MLP), ("blocks.2.attn.hook_z", D), ("model.layers.0", D)]
)
def test_directions_are_scored_as_a_loop_over_tokens_does(model, hook, d):
    directions = normal(5, d)
    table = sentence_scores(
        model, Detector.from_directions(directions, hook), SENTENCES, context_size=CONTEXT, batch_size=3
    )
    assert torch.allclose(table, by_loop(model, SENTENCES, lambda row: cosines(row, directions), hook), atol=1e-5)
    assert table.abs().max() <= 1 + 1e-6


def test_projections_are_on_unit_directions_about_the_centre(model):
    directions, center = normal(4, D) * torch.tensor([1e-3, 1, 10, 1e6])[:, None], normal(D, seed=1)
    detector = Detector.from_directions(directions, RESIDUAL, similarity="dot", center=center)
    expected = by_loop(model, SENTENCES, lambda row: [(row - center) @ w / w.norm() for w in directions])
    assert torch.allclose(sentence_scores(model, detector, SENTENCES, context_size=CONTEXT), expected, atol=1e-4)


@pytest.mark.parametrize("name", DICTIONARIES)
@torch.no_grad()
def test_every_dictionary_is_scored_by_code_and_by_cosine(model, name):
    sae = dictionaries()[name]
    codes = sentence_scores(model, Detector.from_dictionary(sae, similarity="code"), SENTENCES, context_size=CONTEXT)
    # Least squares are solved to a tolerance, by whichever method suits the batch.
    atol = 2e-3 if name == "snmf" else 1e-4
    assert torch.allclose(codes, by_loop(model, SENTENCES, lambda row: sae.encode(row[None])[0]), atol=atol)

    def inside(row):
        return sae.run_time_activation_norm_fn_in(row[None])[0] if name == "layer_norm" else row

    found = sentence_scores(model, Detector.from_dictionary(sae), SENTENCES, context_size=CONTEXT)
    assert torch.allclose(
        found, by_loop(model, SENTENCES, lambda row: cosines(inside(row), sae.W_dec, sae.b_dec)), atol=1e-5
    )
    raw = sentence_scores(model, Detector.from_dictionary(sae, center=False), SENTENCES, context_size=CONTEXT)
    assert torch.allclose(raw, by_loop(model, SENTENCES, lambda row: cosines(inside(row), sae.W_dec)), atol=1e-5)


@torch.no_grad()
def test_the_cosine_of_a_region_is_one_minus_its_distance(tiny_bridge):
    partition = dictionaries()["partition"]
    found = sentence_scores(tiny_bridge, Detector.from_dictionary(partition), SENTENCES, context_size=CONTEXT)
    nearest = [1 - partition.assign(token_rows(tiny_bridge, s)).distances.min() for s in SENTENCES]
    assert torch.allclose(found.max(dim=1).values, torch.stack(nearest), atol=1e-5)


@pytest.mark.parametrize("similarity", ["code", "cosine", "dot"])
def test_chosen_latents_are_columns_of_all(tiny_bridge, similarity):
    sae = dictionaries()["standard"]
    whole = Detector.from_dictionary(sae, similarity=similarity)
    some = Detector.from_dictionary(sae, similarity=similarity, latents=[7, 2])
    assert some.names == ("latent 7", "latent 2")
    tables = [sentence_scores(tiny_bridge, d, SENTENCES, context_size=CONTEXT) for d in (whole, some)]
    assert torch.allclose(tables[0][:, [7, 2]], tables[1], atol=1e-6)


def test_batches_and_blocks_do_not_matter(tiny_bridge, monkeypatch):
    detector = Detector.from_directions(normal(6, D), RESIDUAL)
    tables = []
    for per_block, batch_size in ((1, 1), (13, 4), (6 * 1000, 64)):
        monkeypatch.setattr(concepts, "_SCORES_PER_BLOCK", per_block)
        tables.append(sentence_scores(tiny_bridge, detector, SENTENCES, context_size=CONTEXT, batch_size=batch_size))
    assert torch.allclose(tables[0], tables[1], atol=1e-5) and torch.allclose(tables[0], tables[2], atol=1e-5)


def test_only_blocks_of_scores_are_held(tiny_bridge, monkeypatch):
    monkeypatch.setattr(concepts, "_SCORES_PER_BLOCK", 50)
    sizes = []

    def score(x):
        sizes.append(len(x) * 10)
        return x[:, :2]

    detector = Detector(hook_name=RESIDUAL, names=("a", "b"), score=score, row_cost=10)
    sentence_scores(tiny_bridge, detector, SENTENCES, context_size=CONTEXT)
    assert max(sizes) == 50


def test_both_model_classes_give_the_same(tiny_hooked, tiny_bridge):
    detector = Detector.from_directions(normal(5, D_MLP), NEURONS)
    tables = [sentence_scores(m, detector, SENTENCES, context_size=CONTEXT) for m in (tiny_hooked, tiny_bridge)]
    assert torch.allclose(*tables, atol=1e-4)


def test_special_tokens_have_no_score(model):
    seen = []

    def score(x):
        seen.append(x)
        return x[:, :1]

    sentence_scores(
        model, Detector(hook_name="hook_embed", names=("x",), score=score, row_cost=1), SENTENCES, context_size=CONTEXT
    )
    rows = torch.cat(seen)
    n = sum(i > 2 for s in SENTENCES for i in model.tokenizer(s, add_special_tokens=False)["input_ids"])
    assert len(rows) == n
    assert not any((rows == model.W_E[special]).all(dim=1).any() for special in (0, 1, 2))


def test_a_dead_latent_and_an_activation_at_the_centre_score_zero():
    sae = dictionaries()["standard"]
    sae.W_dec.data[3] = 0
    sae.W_dec.data[4] *= 1e-30
    scores = Detector.from_dictionary(sae).score(torch.stack([sae.b_dec.detach(), normal(D)]))
    assert (scores[0] == 0).all() and scores[1, 3] == 0
    assert scores[1, 4] != 0 and torch.isfinite(scores).all()


@torch.no_grad()
def test_a_transcoder_is_compared_where_it_writes_and_coded_where_it_reads(model):
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out")
    coder = Transcoder(TranscoderConfig(d_in=D, d_out=D, d_sae=9, apply_b_dec_to_input=False, metadata=metadata))
    coder.b_dec.data.normal_()
    by_cosine, by_code = Detector.from_dictionary(coder), Detector.from_dictionary(coder, similarity="code")
    found = sentence_scores(model, by_cosine, SENTENCES, context_size=CONTEXT)
    expected = by_loop(model, SENTENCES, lambda row: cosines(row, coder.W_dec, coder.b_dec), "blocks.1.hook_mlp_out")
    assert torch.allclose(found, expected, atol=1e-5)
    found = sentence_scores(model, by_code, SENTENCES, context_size=CONTEXT)
    expected = by_loop(model, SENTENCES, lambda row: coder.encode(row[None])[0], "blocks.1.hook_resid_mid")
    assert torch.allclose(found, expected, atol=1e-5)
    coder.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="Use similarity='code'"):
        Detector.from_dictionary(coder)


# --- several detectors, other poolings ---


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("per_block", [1, 60, 10**6])
def test_the_tokens_of_a_sentence_are_pooled_as_a_loop_does(tiny_bridge, monkeypatch, pooling, per_block):
    monkeypatch.setattr(concepts, "_SCORES_PER_BLOCK", per_block)
    directions = normal(5, D)
    pool = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}[pooling]
    rows = [token_rows(tiny_bridge, s) for s in SENTENCES]
    expected = torch.stack([pool(torch.stack([torch.stack(cosines(x, directions)) for x in s])) for s in rows])
    options = {"pooling": pooling, "context_size": CONTEXT, "batch_size": 3}
    found = sentence_scores(tiny_bridge, Detector.from_directions(directions, RESIDUAL), SENTENCES, **options)
    assert torch.allclose(found, expected, atol=1e-5)


def test_several_detectors_at_several_hooks_score_as_each_by_itself(model):
    detectors = {
        "residual": Detector.from_directions(normal(5, D), RESIDUAL),
        "neurons": Detector.from_directions(normal(3, D_MLP), NEURONS, similarity="dot"),
        "codes": Detector.from_dictionary(dictionaries()["topk"], similarity="code"),
    }
    together = sentence_scores(model, detectors, SENTENCES, context_size=CONTEXT, pooling="mean")
    assert list(together) == list(detectors)
    for name, detector in detectors.items():
        alone = sentence_scores(model, detector, SENTENCES, context_size=CONTEXT, pooling="mean")
        assert torch.allclose(together[name], alone, atol=1e-6)


def test_the_directions_of_a_detector_are_those_it_scores_by():
    x, center = normal(20, D), normal(D, seed=1)
    detectors = [
        Detector.from_directions(normal(4, D) * torch.tensor([1e-3, 1, 10, 1e6])[:, None], RESIDUAL, center=center),
        Detector.from_directions(normal(D), RESIDUAL),
        *(Detector.from_dictionary(d, latents=[7, 2]) for n, d in dictionaries().items() if n != "layer_norm"),
    ]
    for detector in detectors:
        assert detector.directions.shape == (len(detector.names), D)
        assert torch.allclose(detector.directions.norm(dim=1), torch.ones(len(detector.names)))
        moved = x if detector.origin is None else x - detector.origin
        assert torch.allclose(torch.nn.functional.normalize(moved, dim=1) @ detector.directions.T, detector.score(x))
    assert [d.latents for d in detectors] == [(), ()] + [(7, 2)] * (len(detectors) - 2)
    assert detectors[0].origin is not None and detectors[1].origin is None


def test_directions_without_an_origin_in_the_activations_units_and_codes_without_directions():
    normalising, codes = (
        Detector.from_dictionary(dictionaries()[name], similarity=similarity)
        for name, similarity in (("layer_norm", "cosine"), ("standard", "code"))
    )
    rows = dictionaries()["layer_norm"].W_dec.detach()
    assert torch.allclose(normalising.directions, torch.nn.functional.normalize(rows, dim=1))
    assert normalising.origin is None and codes.directions is None and codes.latents == tuple(range(12))


def test_either_basis_of_a_partition_detects():
    partition = dictionaries()["partition"]
    for basis, rows in (("exemplar", partition.exemplars), ("mean", partition.means), (None, partition.W_dec)):
        assert torch.allclose(Detector.from_dictionary(partition, basis=basis).directions, rows, atol=1e-6)
    with pytest.raises(ValueError, match="has no means"):
        Detector.from_dictionary(dictionaries()["standard"], basis="mean")


def test_sums_of_sentences_give_the_difference_of_any_of_them(tiny_bridge):
    batches = token_activations(tiny_bridge, RESIDUAL, SENTENCES, context_size=CONTEXT)
    sums = sentence_sums(batches, RESIDUAL, len(SENTENCES), equal_norms=True)
    for up, down in (([0, 3], [1, 5]), ([2, 4, 1], [0])):
        found = difference_of(sums.of(up), sums.of(down), RESIDUAL, weighting="sentence", equal_norms=True)
        sides = [[SENTENCES[i] for i in side] for side in (up, down)]
        again = diff_means(tiny_bridge, RESIDUAL, *sides, context_size=CONTEXT)
        assert torch.allclose(found.direction, again.direction, atol=1e-5)
        assert found.distance == pytest.approx(again.distance, rel=1e-5)


# --- scores of concepts ---


def test_scores_are_the_statistics_of_the_sentence_scores(model):
    detector = Detector.from_directions(normal(7, D), RESIDUAL, names=list("abcdefg"))
    scores = concept_scores(model, detector, SENTENCES[:2], SENTENCES[2:], context_size=CONTEXT)
    expected = by_loop(model, SENTENCES, lambda row: cosines(row, normal(7, D)))
    assert torch.allclose(scores.activating, expected[:2], atol=1e-5) and torch.allclose(
        scores.neutral, expected[2:], atol=1e-5
    )
    a, b = scores.activating.double().mean(0), scores.neutral.double().mean(0)
    assert torch.equal(scores.log_ratio, log_ratio(a, b)) and torch.equal(scores.difference, a - b)
    wins = (scores.activating[:, None] > scores.neutral[None]).double().mean((0, 1))
    assert torch.allclose(scores.auroc, wins)
    assert ((scores.auroc_low < scores.auroc) | (scores.auroc == 0)).all() and (
        (scores.auroc < scores.auroc_high) | (scores.auroc == 1)
    ).all()


def test_swapping_the_sentences_turns_every_score_round(tiny_bridge):
    detector = Detector.from_directions(normal(7, D), RESIDUAL)
    one = concept_scores(tiny_bridge, detector, SENTENCES[:3], SENTENCES[3:], context_size=CONTEXT)
    other = concept_scores(tiny_bridge, detector, SENTENCES[3:], SENTENCES[:3], context_size=CONTEXT)
    assert torch.allclose(one.log_ratio, -other.log_ratio, atol=1e-5)
    assert torch.allclose(one.d_prime, -other.d_prime, atol=1e-4)
    assert torch.allclose(one.auroc, 1 - other.auroc)
    assert torch.allclose(one.auroc_low, 1 - other.auroc_high)


def test_a_mean_that_is_not_positive_has_a_score_and_says_so():
    activating = torch.tensor([[0.4, -0.1, 0.3, 0.0], [0.2, -0.1, 0.3, 0.0]])
    neutral = torch.tensor([[0.1, -0.4, -0.2, 0.0]])
    scores = compare_sentences(activating, neutral, names=list("abcd"), limit=5)
    assert scores.log_ratio.tolist() == pytest.approx([math.log(3), math.log(4), 5, 0], rel=1e-5)
    assert scores.has_positive_means.tolist() == [True, False, False, False]


def test_a_planted_feature_is_found_among_all_latents():
    planted = models_zoo.make_model("llama", "SAETransformerBridge")
    (token,) = planted.tokenizer(" the", add_special_tokens=False)["input_ids"]
    rows = normal(30, D, seed=3)
    rows[17] = planted.W_E[token].detach()
    with_it = [f"{s} the" for s in words(10, 0)]
    scores = concept_scores(planted, Detector.from_directions(rows, "hook_embed"), with_it, words(10, 1))
    assert scores.activating[:, 17].tolist() == pytest.approx([1] * 10, abs=1e-5)
    assert int(scores.difference.argmax()) == 17 and scores.auroc[17] == 1 and scores.d_prime[17] > 2


def test_the_table_has_a_row_per_score(tiny_bridge):
    partition = dictionaries()["partition"]
    table = concept_scores(
        tiny_bridge, Detector.from_dictionary(partition), SENTENCES[:2], SENTENCES[2:]
    ).to_dataframe()
    assert table["name"].tolist() == [f"region {i}" for i in range(12)]
    assert {"log_ratio", "has_positive_means", "difference", "d_prime", "auroc", "auroc_low", "auroc_high"} < set(
        table.columns
    )
    assert table.notna().all(axis=None)


# --- differences of means ---


@pytest.mark.parametrize("equal_norms", [True, False])
@pytest.mark.parametrize("weighting", ["sentence", "token"])
def test_a_difference_of_means_is_what_a_loop_gives(model, weighting, equal_norms):
    found = diff_means(
        model,
        RESIDUAL,
        SENTENCES[:3],
        SENTENCES[3:],
        weighting=weighting,
        equal_norms=equal_norms,
        context_size=CONTEXT,
        batch_size=2,
    )
    rows = [token_rows(model, s).double() for s in SENTENCES]
    if equal_norms:
        typical = math.exp(torch.cat(rows).norm(dim=1).log().mean())
        rows = [x / x.norm(dim=1, keepdim=True) * typical for x in rows]
    means = []
    for part in (rows[:3], rows[3:]):
        sentence_means = [x.mean(0) for x in part]
        means.append(sum(sentence_means) / 3 if weighting == "sentence" else torch.cat(part).mean(0))
    assert torch.allclose(found.direction.double() * found.distance, means[0] - means[1], atol=1e-4)
    assert torch.allclose(found.midpoint.double(), (means[0] + means[1]) / 2, atol=1e-4)
    assert found.direction.norm() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_its_detector_is_that_direction(tiny_bridge, center):
    made = diff_means(tiny_bridge, NEURONS, SENTENCES[:3], SENTENCES[3:])
    origin = made.midpoint if center else torch.zeros(D_MLP)
    table = sentence_scores(tiny_bridge, made.detector(center=center), SENTENCES, context_size=CONTEXT)
    assert torch.allclose(
        table, by_loop(tiny_bridge, SENTENCES, lambda row: cosines(row, [made.direction], origin), NEURONS), atol=1e-5
    )


def words(n: int, seed: int) -> list[str]:
    """Different short sentences, none of them about 'the'."""
    generator = torch.Generator().manual_seed(seed)
    syllables = ["ka", "lo", "mi", "ru", "se", "no", "pa", "du"]
    return [
        " ".join("".join(syllables[i] for i in torch.randint(8, (2,), generator=generator)) for _ in range(6))
        for _ in range(n)
    ]


def planted_model(token: str, direction: torch.Tensor, scale: float):
    changed = models_zoo.make_model("llama", "SAETransformerBridge")
    (index,) = changed.tokenizer(token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        changed.embed.W_E[index] += scale * direction
    return changed


def test_a_planted_direction_is_recovered_and_detects_sentences_that_did_not_make_it():
    direction = torch.nn.functional.normalize(normal(D, seed=5), dim=0)
    model = planted_model(" the", direction, 30.0)
    positives, neutrals = [f"{s} the {s}" for s in words(12, 0)], words(12, 1)
    result = held_out_diff_means(model, "hook_embed", positives, neutrals, equal_norms=False)
    assert float(result.diff_means.direction @ direction) > 0.95
    assert result.scores.auroc[0] == 1 and result.scores.log_ratio[0] > 0
    made_by = (
        [s for s in positives if s not in result.test_positives],
        [s for s in neutrals if s not in result.test_neutrals],
    )
    assert len(made_by[0]) == len(made_by[1]) == 6
    again = diff_means(model, "hook_embed", *made_by, equal_norms=False)
    assert torch.equal(again.direction, result.diff_means.direction)


def test_one_enormous_token_does_not_decide_the_direction():
    model = planted_model(" the", normal(D, seed=6), 1000.0)
    concept, neutrals = [f"{s} and" for s in words(10, 0)], words(10, 1)
    spoiled = [*neutrals[:-1], f"{neutrals[-1]} the"]
    for equal_norms in (True, False):
        clean, hit = (
            diff_means(model, "hook_embed", concept, n, equal_norms=equal_norms).direction for n in (neutrals, spoiled)
        )
        assert (float(clean @ hit) > 0.95) == equal_norms


def test_a_split_keeps_equal_sentences_together_and_loses_none():
    sentences = words(9, 0) * 2
    train, test = split_sentences(sentences, test_fraction=1 / 3, seed=4)
    assert sorted(train + test) == sorted(sentences) and not set(train) & set(test)
    assert len(set(test)) == 3
    assert split_sentences(sentences, test_fraction=1 / 3, seed=4) == (train, test)
    assert split_sentences(sentences, test_fraction=1 / 3, seed=5) != (train, test)
    assert [len(part) for part in split_sentences(["a", "b"], test_fraction=0.01)] == [1, 1]


# --- bad input ---


def test_sentences_without_a_score_are_named(tiny_bridge):
    detector = Detector.from_directions(normal(D), RESIDUAL)
    with pytest.raises(ValueError, match="2 of 4 sentences .*'x'"):
        sentence_scores(tiny_bridge, detector, ["x", "a b c", "</s><pad>", "d e f"])
    for empty in ([], "a string"):
        with pytest.raises(ValueError, match="list of at least one string"):
            concept_scores(tiny_bridge, detector, SENTENCES, empty)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Detector.from_directions(torch.zeros(2, D), RESIDUAL), "Direction 0 is zero"),
        (lambda: Detector.from_directions(normal(2, 3, D), RESIDUAL), "shape"),
        (lambda: Detector.from_directions(normal(2, D) / 0, RESIDUAL), "non-finite"),
        (lambda: Detector.from_directions(normal(2, D), RESIDUAL, names=["one"]), "2 directions and 1 names"),
        (lambda: Detector.from_directions(normal(2, D), RESIDUAL, center=normal(3)), "center must have shape"),
        (lambda: Detector.from_dictionary(dictionaries()["standard"], latents=[3, 12]), "0 to 11"),
        (lambda: Detector.from_dictionary(dictionaries()["standard"], latents=[]), "0 to 11"),
        (lambda: Detector.from_dictionary(StandardSAE(StandardSAEConfig(d_in=D, d_sae=4))), "Pass hook_name="),
        (lambda: compare_sentences(torch.zeros(2, 3), torch.zeros(2, 4), names=list("abc")), r"\(2, 4\)"),
        (lambda: split_sentences(["same", "same"]), "2 different sentences, got 1"),
        (lambda: split_sentences(["a", "b"], test_fraction=1.0), "test_fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_wrong_hook_and_sets_that_do_not_differ_are_refused(tiny_bridge):
    with pytest.raises(ValueError, match="last dimension must be 32"):
        sentence_scores(tiny_bridge, Detector.from_directions(normal(D), NEURONS), SENTENCES)
    with pytest.raises(ValueError, match="has no hook"):
        sentence_scores(tiny_bridge, Detector.from_directions(normal(D), "blocks.9.hook_resid_post"), SENTENCES)
    with pytest.raises(ValueError, match="same mean activation"):
        diff_means(tiny_bridge, RESIDUAL, SENTENCES, SENTENCES)
    with pytest.raises(ValueError, match="both positive and neutral"):
        held_out_diff_means(tiny_bridge, RESIDUAL, SENTENCES[:4], SENTENCES[3:])


# --- the real model ---


def test_weekdays_are_told_from_other_sentences_by_a_direction_they_did_not_make(smol):
    # Measured: 1.0 at this hook on every split of seeds 0 to 3.
    result = held_out_diff_means(smol, "blocks.15.hook_resid_post", WEEKDAYS, NEUTRAL)
    assert result.scores.auroc[0] > 0.9
    # A direction that knows nothing of weekdays does not; and single neurons do, some of them.
    neurons = concept_scores(
        smol, Detector.from_directions(torch.eye(1536), "blocks.15.mlp.hook_post"), WEEKDAYS, NEUTRAL
    )
    assert 0.35 < neurons.auroc.median() < 0.65 and neurons.auroc.max() > 0.95
