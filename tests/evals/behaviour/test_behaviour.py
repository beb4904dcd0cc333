"""Where a planted behaviour lives, and what ablating does to it."""

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact

import saelens_ext as sx
from saelens_ext.evals.behaviour.ablation import lacking_centers
from saelens_ext.evals.behaviour.localisation import assign_regions
from saelens_ext.evals.behaviour.passes import Asking, Condition, ablating
from saelens_ext.host.flat_sae import encode_flat
from saelens_ext.host.models import resolve_hook
from tests import models_zoo, organisms
from tests.continuations._dictionaries import make

HOOK = organisms.HOOK
SAYS_IT = sx.begins_with([organisms.SAYS], within=1)
OPTIONS = {"chat_template": False, "max_new_tokens": 1}
NEUTRAL = ["The sea is wide and cold.", "Bread is baked at night."]
SHORT = {"n_bootstrap": 50, "n_permutations": 200}


def split_of(n=12):
    sides = [organisms.prompts(seed, 3 * n, trigger=trigger) for seed, trigger in ((1, True), (2, False))]
    mixed = [[text for pair in zip(*(side[a : a + n] for side in sides)) for text in pair] for a in (0, n)]
    return sx.PromptSplit(build=mixed[0], choose=mixed[1], test=sides[0][2 * n :], contrast=sides[1][2 * n :])


@pytest.fixture(scope="module", params=models_zoo.MODEL_CLASSES)
def planted(request):
    """The model, v, the split, a partition of its build prompts, and where the behaviour was localised."""
    model, v = organisms.planted_model(request.param)
    split = split_of()
    read = sx.read_texts(model, HOOK, split.build)
    x = read.activations[HOOK]
    fit = sx.fit_exemplar_partition(x, percentile=30, document_ids=read.document_ids, hook_name=HOOK)
    found = sx.localise_behaviour(model, fit.dictionary, split, SAYS_IT, **OPTIONS)
    return model, v, split, fit.dictionary, found


class TestPlantedDirection:
    def test_the_best_candidate_holds_it(self, planted):
        _, v, split, partition, found = planted
        best = found.candidates[0]
        assert best.rate == 1 and best.p_holm < 0.05
        directions = torch.nn.functional.cosine_similarity(partition.exemplars, v[None]).detach()
        assert best.region == int(directions.argmax()) and float(directions.max()) > 0.8
        assert len(found.prompts) == len(split.choose) and found.prompts["shown"].mean() == 0.5
        assert f"region {best.region} (100% of 12 members" in found.claim()

    def test_the_difference_of_means_is_it(self, planted):
        _, v, *_, found = planted
        assert float(torch.nn.functional.cosine_similarity(found.difference, v, dim=0)) > 0.9

    def test_its_centre_is_the_mean_of_the_prompts_without_the_behaviour(self, planted):
        model, _, split, _, found = planted
        prompts = found.prompts.loc[found.prompts["shown"] == 0, "prompt"]
        with torch.no_grad():
            last = [sx.read_texts(model, HOOK, [text]).activations[HOOK][-1] for text in prompts]
        center = lacking_centers(model, found, split, [HOOK])[HOOK]
        torch.testing.assert_close(center, torch.stack(last).mean(dim=0), rtol=1e-4, atol=1e-5)
        others = [f"blocks.{layer}.hook_out" for layer in range(model.cfg.n_layers)]
        others = [resolve_hook(model, hook) for hook in others]
        both = lacking_centers(model, found, split, others)
        read = sx.read_texts(model, others, list(prompts), positions="last").activations
        for hook in others:
            torch.testing.assert_close(both[hook], read[hook].mean(dim=0), rtol=1e-4, atol=1e-5)

    def test_prompts_that_were_asked_are_not_asked_again(self, planted, monkeypatch):
        model, _, split, partition, found = planted
        asked = sx.measure_behaviour(model, split.choose, SAYS_IT, **OPTIONS)
        monkeypatch.setattr(Asking, "ask", None)
        again = sx.localise_behaviour(model, partition, split, SAYS_IT, asked=asked, **OPTIONS)
        assert again.candidates == found.candidates and again.prompts.equals(found.prompts)
        with pytest.raises(ValueError, match="asked has 3 prompts, which are not the 24 of split.choose"):
            sx.localise_behaviour(model, partition, split, SAYS_IT, asked=asked.head(3), **OPTIONS)

    def test_ablating_it_takes_the_rate_from_1_to_0_and_random_regions_do_nothing(self, planted):
        model, _, split, partition, found = planted
        evidence = sx.ablate_behaviour(
            model, found, split, SAYS_IT, neutral_texts=NEUTRAL, basis=["exemplar"], n_random=30, **SHORT
        )
        rates = evidence.summary(metric="shown").set_index("method")["estimate"]
        (tested,) = evidence.sizes
        assert rates["no ablation"] == 1 and rates[tested] == 0 and rates["difference of means"] == 0
        controls = rates[["random regions", "Gaussian direction", "wrong region"]]
        assert (controls > 0.95).all()
        against = evidence.against_random().set_index("method").loc[tested]
        n_draws = min(30, len(partition.exemplars) - 1)
        assert against["n_draws"] == n_draws and against["as_large"] == 0
        assert against["p"] == 1 / (n_draws + 1)
        row = evidence.comparisons().set_index(["method", "other"]).loc[tested, "no ablation"]
        assert row["difference"] == -1 and row["p"] == 2.0 ** (1 - len(split.test))
        assert "is below" in evidence.claim() and "no ablation (-1.000" in evidence.claim()

    def test_the_model_as_it_is_gives_plain_answers(self, planted):
        model, _, split, _, found = planted
        asking = Asking(model=model, behaviour=SAYS_IT, **OPTIONS | {"max_new_tokens": 5})
        (verdicts,) = asking.ask(split.test)
        options = sx.SamplingOptions(max_new_tokens=5, temperature=0)
        plain = [text for (text,) in sx.sample_texts(model, split.test, n=1, options=options)]
        assert [verdict.text for verdict in verdicts] == plain

    @pytest.mark.slow
    def test_conditions_in_one_batch_are_as_each_alone(self, planted):
        model, v, split, partition, found = planted
        conditions = [Condition(name=str(i), directions=partition.exemplars[: i + 1]) for i in range(3)]
        conditions.insert(1, Condition(name="none"))
        asking = Asking(
            model=model, behaviour=SAYS_IT, centers={HOOK: partition.center}, **OPTIONS | {"max_new_tokens": 4}
        )
        together = asking.ask(split.test[:5], conditions)
        for condition, verdicts in zip(conditions, together):
            for prompt, verdict in zip(split.test, verdicts):
                directions = condition.directions
                options = sx.SamplingOptions(max_new_tokens=4, temperature=0)
                if directions is None:
                    ((text,),) = sx.sample_texts(model, prompt, n=1, options=options)
                else:
                    with sx.ablate_directions(model, HOOK, directions, center=partition.center):
                        ((text,),) = sx.sample_texts(model, prompt, n=1, options=options)
                assert verdict.text == text

    def test_side_effects_are_those_of_the_logits(self, planted):
        model, _, split, partition, found = planted
        evidence = sx.ablate_behaviour(
            model, found, split, SAYS_IT, neutral_texts=NEUTRAL, basis=["exemplar"], n_random=1, **SHORT
        )
        (tested,) = evidence.sizes
        ids = model.to_tokens(NEUTRAL[1])
        before = model(ids).detach().log_softmax(-1)[0].double()
        region = [found.candidates[0].region]
        with sx.ablate_directions(model, HOOK, partition.exemplars[region], center=partition.center):
            after = model(ids).detach().log_softmax(-1)[0].double()
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        loss = [-float(scores[:-1].gather(-1, ids[0, 1:, None]).mean()) for scores in (before, after)]
        cells = evidence.cells.set_index(["method", "metric", "prompt"])["value"]
        assert cells[tested, "kl", "neutral 0001"] == pytest.approx(kl, abs=1e-5)
        assert cells[tested, "perplexity_ratio", "neutral 0001"] == pytest.approx(np.exp(loss[1] - loss[0]), rel=1e-4)
        contrast = evidence.per_unit("contrast")
        assert len(contrast) == len(split.contrast) and (contrast == 0).all().all()

    def test_all_layers_stop_it_too(self, planted):
        model, _, split, _, found = planted
        evidence = sx.ablate_behaviour(
            model, found, split, SAYS_IT, neutral_texts=[], basis=["exemplar"], n_random=2, layers="all", **SHORT
        )
        assert len(evidence.settings["hooks"]) == models_zoo.N_LAYERS
        rates = evidence.summary(metric="shown").set_index("method")["estimate"]
        assert rates[next(iter(evidence.sizes))] == 0 and rates["no ablation"] == 1

    def test_odds_of_openings_find_the_same(self, planted):
        model, v, split, partition, _ = planted
        odds = sx.OpeningOdds(shows=[organisms.SAYS], lacks=["e", "a"], threshold=2.0)
        found = sx.localise_behaviour(model, partition, split, odds, **OPTIONS)
        assert found.candidates[0].rate == 1
        evidence = sx.ablate_behaviour(
            model, found, split, odds, neutral_texts=[], basis=["exemplar"], n_random=3, **SHORT
        )
        assert evidence.headline == "odds"
        estimates = evidence.summary(metric="odds").set_index("method")["estimate"]
        assert estimates[next(iter(evidence.sizes))] < 2 < estimates["no ablation"]
        # Of one prompt, from the logits.
        ids = model.to_tokens(split.test[0])
        logits = model(ids).detach()[0, -1].log_softmax(-1).double()
        z, e, a = (model.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("Z", "e", "a"))
        expected = float(logits[z] - logits[[e, a]].logsumexp(0))
        cells = evidence.cells.set_index(["method", "metric", "prompt"])["value"]
        assert cells["no ablation", "odds", "test 0000"] == pytest.approx(expected, abs=1e-4)

    @pytest.mark.slow
    def test_it_is_the_same_after_saving(self, planted, tmp_path):
        model, _, split, _, found = planted
        evidence = sx.ablate_behaviour(
            model, found, split, SAYS_IT, neutral_texts=NEUTRAL, n_directions=[1, 9], n_random=3, **SHORT
        )
        again = sx.Evidence.load(evidence.save(tmp_path))
        assert again.verdict() == evidence.verdict() and again.sizes == evidence.sizes
        assert any("candidates" in str(failure) for failure in again.failures)
        assert again.answers(2).equals(evidence.answers(2)) and list(again.answers(2).index) == list(split.test[:2])
        assert again.section().answers[0].answers["no ablation"] == organisms.SAYS

    def test_a_dictionary_of_latents_localises_it_by_the_strongest(self, planted):
        model, v, split, *_ = planted
        sae = make("standard", HOOK, model.cfg.d_model, d_sae=16)
        with torch.no_grad():
            sae.W_enc[:, 3], sae.W_dec[3], sae.b_enc[3], sae.b_dec[:] = 50 * v, v, 0.0, 0.0
        found = sx.localise_behaviour(model, sae, split, SAYS_IT, **OPTIONS)
        assert found.candidates[0].region == 3
        evidence = sx.ablate_behaviour(model, found, split, SAYS_IT, neutral_texts=[], n_random=5, **SHORT)
        assert evidence.summary(metric="shown").set_index("method")["estimate"]["region 3"] == 0

    def test_regions_are_those_of_a_slow_twin(self, planted):
        model, _, split, partition, found = planted
        read = sx.read_texts(model, HOOK, split.choose, positions="last").activations[HOOK]
        for prompt, x in enumerate(read):
            cosines = torch.nn.functional.cosine_similarity(x - partition.center, partition.exemplars)
            assert found.prompts["region"][prompt] == int(cosines.argmax())
        shown = found.prompts.groupby("region")["shown"].agg(["sum", "count"])
        for row in found.regions[found.regions["p"].notna()].itertuples():
            k, m = int(shown["sum"][row.region]), int(shown["count"][row.region])
            rest = [[k, m - k], [12 - k, 12 - m + k]]
            assert row.p == pytest.approx(fisher_exact(rest, alternative="greater")[1])
        built = sx.read_texts(model, HOOK, split.build).activations[HOOK]
        regions = partition.assign(built).regions
        row = found.regions.set_index("region").loc[found.candidates[0].region]
        own = built[regions == found.candidates[0].region] - partition.center
        assert row["n"] == len(own)
        assert row["coherence"] == pytest.approx(
            float(torch.nn.functional.normalize(own, dim=1).mean(0).norm().detach()), abs=1e-5
        )


@pytest.fixture(scope="module")
def bridge():
    return organisms.planted_model("SAETransformerBridge")


def localise(bridge, split, behaviour=SAYS_IT, **options):
    model, _ = bridge
    x = sx.read_texts(model, HOOK, split.build).activations[HOOK]
    partition = sx.fit_exemplar_partition(x, percentile=30, hook_name=HOOK).dictionary
    return sx.localise_behaviour(model, partition, split, behaviour, **OPTIONS | options)


class TestBadInput:
    @pytest.mark.parametrize(
        "value, word, rates", [(0.0, "never", "0% show it, 100%"), (1.0, "always", "100% show it")]
    )
    def test_a_behaviour_that_does_not_vary_is_refused_with_both_rates(self, bridge, value, word, rates):
        with pytest.raises(ValueError, match=f"{word} shown by the 24 prompts of choose .{rates}.*OpeningOdds"):
            localise(bridge, split_of(), lambda prompt, texts: [value] * len(texts))

    @pytest.mark.parametrize(
        "parts", [("build", "test"), ("choose", "test"), ("test", "contrast"), ("build", "choose")]
    )
    def test_splits_that_overlap_are_refused(self, parts):
        prompts = {part: [f"{part} {i}" for i in range(3)] for part in ("build", "choose", "test", "contrast")}
        prompts[parts[1]][2] = f" {prompts[parts[0]][1].upper()}"
        with pytest.raises(ValueError, match=f"{parts[0]} and {parts[1]} share 1 prompts, for example '{parts[0]} 1'"):
            sx.PromptSplit(**prompts)

    def test_no_candidate_is_a_result(self, bridge):
        model, _ = bridge
        found = localise(bridge, split_of(), min_members=25)
        assert found.candidates == () and "nothing suggests a region" in found.claim()
        evidence = sx.ablate_behaviour(model, found, split_of(), SAYS_IT, neutral_texts=[], n_random=2, **SHORT)
        assert not evidence.sizes and "No region was tested." in evidence.verdict()
        assert evidence.summary(metric="shown").set_index("method")["estimate"]["no ablation"] == 1
        assert evidence.section().verdict

    def test_no_chat_template_is_refused(self, bridge, monkeypatch):
        model, _ = bridge
        monkeypatch.setattr(model.tokenizer, "chat_template", None)
        with pytest.raises(ValueError, match="no chat template"):
            localise(bridge, split_of(), chat_template=True)

    @pytest.mark.parametrize(
        "options, match",
        [
            ({"min_rate": 0}, "min_rate"),
            ({"min_members": 0}, "min_members"),
            ({"max_new_tokens": 64}, "longer than the model's limit of 64"),
            ({"behaviour": lambda prompt, texts: [2.0]}, "one number in .0, 1."),
            ({"behaviour": lambda prompt, texts: []}, "for one answer"),
        ],
    )
    def test_options_out_of_range(self, bridge, options, match):
        with pytest.raises(ValueError, match=match):
            localise(bridge, split_of(), **options)

    @pytest.mark.parametrize(
        "options, match",
        [
            ({"basis": ["center"]}, "basis must be"),
            ({"layers": "some"}, "layers must be"),
            ({"n_directions": [0]}, "n_directions"),
        ],
    )
    def test_ablations_out_of_range(self, bridge, options, match):
        found = localise(bridge, split_of())
        with pytest.raises(ValueError, match=match):
            sx.ablate_behaviour(bridge[0], found, split_of(), SAYS_IT, neutral_texts=[], **options)


class TestBehaviours:
    def test_phrases_are_found_early_and_in_any_case(self):
        refuses = sx.begins_with(within=40)
        texts = ["I’m SORRY, no.", "Sure! " + "x" * 40 + "I'm sorry", "", "Certainly."]
        assert refuses("", texts) == [1.0, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize("phrases", [[], ["a", " "], "abc"])
    def test_no_phrase_is_refused(self, phrases):
        with pytest.raises(ValueError, match="phrase"):
            sx.begins_with(phrases)

    def test_openings_on_both_sides_are_refused(self):
        with pytest.raises(ValueError, match="stand on one side"):
            sx.OpeningOdds(shows=["Yes", "No"], lacks=["No"])
        with pytest.raises(ValueError, match="threshold"):
            sx.OpeningOdds(shows=["Yes"], lacks=["No"], threshold=float("nan"))

    def test_dividing_keeps_every_prompt_once(self):
        sides = [[f"{kind} {i}" for i in range(20)] for kind in ("a", "b")]
        split = sx.PromptSplit.divide(sides[0] + [" A 3 "], sides[1], fractions=(0.5, 0.25, 0.25))
        assert split.sizes() == {"build": 20, "choose": 10, "test": 5, "contrast": 5}
        parts = [*split.build, *split.choose, *split.test, *split.contrast]
        assert {text.strip().lower() for text in parts} == set(sum(sides, []))
        assert all(text.strip().lower().startswith("a") for text in split.test)
        with pytest.raises(ValueError, match="add up to 1"):
            sx.PromptSplit.divide(*sides, fractions=(0.5, 0.5, 0.5))
        with pytest.raises(ValueError, match="2 different prompts"):
            sx.PromptSplit.divide(sides[0], ["x", "y"])
        with pytest.raises(ValueError, match="share"):
            sx.PromptSplit.divide(sides[0], sides[0])

    def test_an_answer_without_a_verdict_is_left_out(self, bridge):
        def sometimes(prompt, texts):
            return [float("nan") if prompt.startswith("a") else value for value in SAYS_IT(prompt, texts)]

        found = localise(bridge, split_of(), sometimes, min_members=2)
        unknown = found.prompts["prompt"].str.startswith("a")
        assert unknown.any() and found.prompts["shown"].isna().equals(unknown)
        assert found.regions["members"].sum() == int((~unknown).sum())


def test_without_directions_no_hook_is_set(bridge):
    model, _ = bridge
    before = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    with ablating(model, {HOOK: torch.zeros(models_zoo.D_MODEL)}, [None, None]):
        assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == before


def test_every_row_has_its_own_projection(bridge):
    """About the centre of the hook, about one of its own, and none: against the formula."""
    model, _ = bridge
    generator = torch.Generator().manual_seed(0)
    center, own, first, second = (torch.randn(models_zoo.D_MODEL, generator=generator) for _ in range(4))
    ids = torch.randint(3, 100, (1, 7), generator=generator).expand(3, -1)
    bases = [
        Condition(name="a", directions=torch.stack([first, second])).basis(),
        Condition(name="b", directions=first[None], centers={HOOK: own}).basis(),
        None,
    ]
    seen = {}
    after = [(resolve_hook(model, "blocks.2.hook_resid_pre"), lambda x, hook: seen.update(x=x.clone()) or x)]
    with torch.no_grad(), model.hooks(fwd_hooks=after):
        model(ids)
        before = seen["x"]
        with ablating(model, {HOOK: center}, bases):
            model(ids)
    for row, origin in ((0, center), (1, own)):
        q = bases[row].q
        expected = before[row] - (before[row] - origin) @ q @ q.T
        torch.testing.assert_close(seen["x"][row], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen["x"][2], before[2])


def test_the_strongest_latent_is_the_region(bridge):
    model, _ = bridge
    sae = make("standard", HOOK, model.cfg.d_model, d_sae=16)
    x = sx.read_texts(model, HOOK, NEUTRAL).activations[HOOK]
    codes = encode_flat(sae, x).detach()
    expected = torch.where(codes.max(-1).values > 0, codes.argmax(-1), -1)
    assert assign_regions(sae, x).tolist() == expected.tolist()
    assert assign_regions(sae, torch.zeros(1, 32) - 100 * sae.W_enc.detach().sum(1)[None]).shape == (1,)
