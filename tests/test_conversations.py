"""Conversations wherever prompts are taken: read as the text that their template writes, and refused alike."""

import pandas as pd
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals.continuations.supernodes import EntitySwap
from saelens_ext.evals.evidence import Evidence
from saelens_ext.host.chat_template import as_conversation, in_words
from tests import organisms
from tests.models_zoo import make_model

HOOK, NEURONS = "blocks.1.hook_out", "blocks.1.mlp.hook_post"
TEMPLATE = "{{ bos_token }}{% if quiet %}Q{% endif %}{% for m in messages %}" + (
    "[{{ m['role'][0] }}]{{ m['content'] }} {% endfor %}"
)
SYSTEM, WHY = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}
SO, BECAUSE = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "As"}
TALK, BEGUN = [SYSTEM, WHY, SO, WHY], [SYSTEM, WHY, BECAUSE]
SHORT = sx.SamplingOptions(max_new_tokens=3, temperature=0)
ODDS = sx.OpeningOdds(shows=["e"], lacks=["a"])


@pytest.fixture(scope="module")
def model():
    made = make_model("llama", "SAETransformerBridge")
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def u(model):
    return torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))


def judge(concept, prompt, texts):
    return [sx.JudgeScore(len(in_words(prompt)) % 3, 1.0 + ("e" in text)) for text in texts]


def scored(model, u, prompts, how):
    found = sx.steering_score(
        model, HOOK, u, ["c"], lambda c, p, texts: [sx.JudgeScore(1, 1 + ("e" in t)) for t in texts],
        prompts=prompts, targets=(0.1,), signs=(1,), n=2, options=sx.SamplingOptions(max_new_tokens=3), **how,
    )  # fmt: skip
    return found.to_dataframe().drop(columns="prompt")


def pathway(model, u, prompts, how):
    texts = ["one two three four five six seven eight nine ten eleven twelve thirteen"] * 4
    return sx.pathway_check(model, HOOK, u, texts, coefficient=1.0, prompts=prompts, **how).cells.drop(columns="prompt")


def group_effect(model, u, prompts, how):
    found = sx.neuron_group_effect(model, NEURONS, [0, 1], [1.0, 2.0], ["e"], prompts, n_random=3, **how)
    return found.to_dataframe()


def matched(model, u, prompts, how):
    return sx.match_strength(model, HOOK, u, (0.05,), prompts=prompts, **how).to_dataframe()


def said(model, u, prompts, how):
    return pd.DataFrame(sx.sample_texts(model, prompts, n=1, options=SHORT, **how))


def steered(model, u, prompts, how):
    found = sx.steer_features(model, HOOK, u[None], prompt=prompts[0], target=0.05, options=SHORT, **how)
    return pd.DataFrame([found.unsteered, *(one.text for one in found.texts)])


def read(model, u, prompts, how):
    batch = sx.read_texts(model, HOOK, prompts, positions="last", **how)
    return pd.DataFrame(batch.activations[HOOK].tolist()).assign(token=batch.token_ids.tolist())


def odds(model, u, prompts, how):
    plain = {"chat_template": False, **how}
    return sx.measure_behaviour(model, prompts, ODDS, **plain).drop(columns="prompt")


def answers(model, u, prompts, how):
    plain = {"chat_template": False, "max_new_tokens": 3, **how}
    return sx.measure_behaviour(model, prompts, sx.begins_with(["e"]), **plain).drop(columns="prompt")


def sampled(model, u, prompts, how):
    options = {"max_new_tokens": 3, **how}
    parts = [sx.sample_continuations(model, prompt, 2, **options).to_dataframe() for prompt in prompts]
    parts += [sx.score_continuations(model, prompt, [" so", "e"], **how).to_dataframe() for prompt in prompts]
    return pd.concat(parts)


def reasoned(model, u, prompts, how):
    options = {"n_candidates": 3, "max_steps": 1, "delimiter": "e", "max_step_tokens": 9, "final": (), **how}
    return sx.sample_steps(model, prompts[0], **options).to_dataframe()


ENTRIES = {
    made.__name__: made
    for made in (scored, pathway, group_effect, matched, said, steered, read, odds, answers, sampled, reasoned)
}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"chat_template_options": {"quiet": True}}, marks=pytest.mark.slow)],
    ids=["plain", "options"],
)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_it_is_read_as_the_text_that_its_template_writes(model, u, entry, options):
    written = [as_conversation(model.tokenizer, talk, options.get("chat_template_options")) for talk in (TALK, BEGUN)]
    assert written[0].endswith("Why? ") and written[1].endswith("As")
    texts = entry(model, u, [text.removeprefix("<s>") for text in written], {})
    pd.testing.assert_frame_equal(entry(model, u, [TALK, BEGUN], options), texts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], r"\[1\] must be a text or a conversation, got \[\]"),
        ([{"role": "user"}], "role and content alone"),
        ([{**WHY, "tool_calls": []}], r"role and content alone \(no tools\)"),
        ([WHY, {"role": "tool", "content": "4"}], "must be one of 'system', 'user', 'assistant', got 'tool'"),
        ([SYSTEM], "ends with a system message"),
    ],
)
def test_what_is_no_conversation_is_refused_wherever_prompts_are_taken(model, u, talk, message):
    for name in ("scored", "pathway", "group_effect", "matched", "said", "read", "odds"):
        with pytest.raises(ValueError, match=message):
            ENTRIES[name](model, u, ["a", talk], {})
    with pytest.raises(ValueError, match=message):
        sx.PromptSplit(build=["a", talk], choose=["b"], test=["c"])


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_model_without_a_template_takes_texts_alone(model, u, entry, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template, which messages need; give texts"):
        entry(model, u, [TALK], {})


def test_one_conversation_is_one_prompt(model, u):
    for name in ("matched", "said", "read", "odds", "pathway"):
        entry = ENTRIES[name]
        pd.testing.assert_frame_equal(entry(model, u, TALK, {}), entry(model, u, [TALK], {}))


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_texts_and_conversations_are_read_together_each_with_its_own_start(model, bos, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE.replace("{{ bos_token }}", bos))
    together = sx.read_texts(model, HOOK, ["Why so?", TALK, "And?"], positions="all")
    for number, prompt in enumerate(("Why so?", TALK, "And?")):
        alone, rows = sx.read_texts(model, HOOK, [prompt], positions="all"), together.document_ids == number
        assert together.token_ids[rows].tolist() == alone.token_ids.tolist()
        torch.testing.assert_close(together.activations[HOOK][rows], alone.activations[HOOK], rtol=1e-4, atol=1e-5)
        assert (alone.token_ids == 0).sum() == (1 if bos or isinstance(prompt, str) else 0)


class TestPromptSplit:
    def test_a_text_is_the_conversation_that_asks_it(self):
        with pytest.raises(ValueError, match="build and choose share 1 prompts, for example ' why\\? '"):
            sx.PromptSplit(build=[" why? "], choose=[[WHY]], test=["c"])
        with pytest.raises(ValueError, match="choose and test share 1 prompts, for example 'system: be short"):
            other = [{**SYSTEM, "content": "be short. "}, WHY, SO, WHY]
            sx.PromptSplit(build=["a"], choose=[other], test=[TALK])

    def test_what_is_asked_otherwise_is_another_prompt(self):
        split = sx.PromptSplit(
            build=[[WHY]],
            choose=[[SYSTEM, WHY]],
            test=[TALK],
            contrast=[[WHY, BECAUSE], "system: Be short.\nuser: Why?"],
        )
        assert split.sizes() == {"build": 1, "choose": 1, "test": 1, "contrast": 2} and split.test == (TALK,)

    def test_divided_at_random(self):
        shows = [[SYSTEM, {"role": "user", "content": f"Ask {n}"}] for n in range(10)]
        lacks = [[{"role": "user", "content": f"Ask {n}"}] for n in range(10)]
        split = sx.PromptSplit.divide([*shows, shows[0]], [*lacks, "ask 3"])
        assert list(split.sizes().values()) == [8, 6, 3, 3] and all(one in shows for one in split.test)


@pytest.fixture(scope="module")
def planted():
    """A planted behaviour, and prompts that bring it about as texts and as conversations of the same words."""
    made, _ = organisms.planted_model("SAETransformerBridge")
    made.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    sides = [organisms.prompts(seed, 18, trigger=trigger) for seed, trigger in ((1, True), (2, False))]

    def split(make):
        asked = [[make(text) for text in side] for side in sides]
        mixed = [[one for pair in zip(*(side[a : a + 6] for side in asked)) for one in pair] for a in (0, 6)]
        return sx.PromptSplit(build=mixed[0], choose=mixed[1], test=asked[0][12:], contrast=asked[1][12:])

    def talk(text):
        # The answer that was begun ends in the trigger, so that nothing stands behind it.
        return [{"role": "user", "content": "So."}, {"role": "assistant", "content": f"Well, {text}"}]

    return made, {"texts": split(lambda text: f"So. Well, {text}"), "talks": split(talk)}


@pytest.mark.slow
class TestBehaviours:
    """The planted behaviour asked for in conversations, beside the same words as texts."""

    def ablated(self, model, split, judges=None):
        says = judges or sx.begins_with([organisms.SAYS], within=1)
        options = {"chat_template": False, "max_new_tokens": 1}
        read = sx.read_texts(model, organisms.HOOK, split.build)
        x = read.activations[organisms.HOOK]
        fit = sx.fit_exemplar_partition(x, percentile=30, document_ids=read.document_ids, hook_name=organisms.HOOK)
        found = sx.localise_behaviour(model, fit.dictionary, split, says, min_members=3, **options)
        short = {"n_bootstrap": 20, "n_permutations": 20, "n_random": 3, "layers": "all"}
        return found, sx.ablate_behaviour(model, found, split, says, neutral_texts=[], **short)

    def test_they_are_localised_and_ablated_as_the_same_words(self, planted, tmp_path):
        model, splits = planted
        (_, plain), (found, evidence) = (self.ablated(model, splits[kind]) for kind in ("texts", "talks"))
        pd.testing.assert_frame_equal(evidence.cells, plain.cells, rtol=1e-4, atol=1e-5)
        words = [in_words(one) for one in splits["talks"].choose]
        assert found.prompts["prompt"].tolist() == words and words[0].startswith("user: So.\nassistant: Well, ")
        again = Evidence.load(evidence.save(tmp_path))
        assert again.answers(1).index[0] == in_words(splits["talks"].test[0]) and again.verdict() == evidence.verdict()
        page = sx.write_evidence_report(tmp_path / "page.html", [again.section()]).read_text()
        assert "user: So.\nassistant: Well, " in page

    def test_a_judge_is_given_the_conversation(self, planted):
        model, splits = planted
        seen = []

        def says(prompt, texts):
            seen.append(prompt)
            return [float(text == organisms.SAYS) for text in texts]

        self.ablated(model, splits["talks"], says)
        assert seen[0] in splits["talks"].choose and seen[-1] in splits["talks"].contrast

    def test_a_sweep_takes_them_and_what_they_were_labelled(self, planted, tmp_path, monkeypatch):
        model, splits = planted
        split, says = splits["talks"], sx.begins_with([organisms.SAYS], within=1)
        options = {"chat_template": False, "max_new_tokens": 1, "min_members": 3, "percentiles": (30,), "seeds": (0, 1)}
        options |= {"n_bootstrap": 20, "n_permutations": 20, "matched": False}
        sweep = lambda **more: sx.localisation_sweep(model, organisms.HOOK, split, says, **options, **more)  # noqa: E731
        first = sweep(folder=tmp_path / "a")
        labels = pd.DataFrame({"prompt": list(map(in_words, split.choose)), "shown": [1, 0] * 6})
        asked, ask = [], sx.evals.behaviour.passes.Asking.ask

        def counted(self, prompts, *conditions, progress=False):
            asked.append(prompts)
            return ask(self, prompts, *conditions, progress=progress)

        monkeypatch.setattr("saelens_ext.evals.behaviour.passes.Asking.ask", counted)
        given = sweep(asked=labels, folder=tmp_path / "b")
        assert given.table().equals(first.table()) and split.choose not in asked and split.test in asked
        asked.clear()
        assert sweep(asked=labels, folder=tmp_path / "b").table().equals(first.table()) and not asked
        other = labels.assign(shown=[0, 1] * 6)
        assert not sweep(asked=other).table()["change"].equals(first.table()["change"])
        with pytest.raises(ValueError, match="sweep that differs in asked"):
            sweep(asked=other, folder=tmp_path / "b")
        with pytest.raises(ValueError, match=r"asked has 3 prompts, which are not the 12 of split\.choose"):
            sweep(asked=labels.head(3))
        with pytest.raises(ValueError, match=r"asked has the verdict 2\.0, outside \[0, 1\]"):
            sweep(asked=labels.assign(shown=2))


@pytest.mark.slow
def test_methods_are_compared_behind_conversations(model, tmp_path):
    seen = []

    def rates(concept, prompt, texts):
        seen.append(prompt)
        return [sx.JudgeScore(float(len(text) % 3), 1.0) for text in texts]

    concepts = [sx.Concept(name=f"c{n}", positives=[f"yes {n} e", "e e"], negatives=["a a", f"no {n}"]) for n in (0, 1)]
    partition = sx.fit_exemplar_partition(torch.randn(60, model.cfg.d_model), percentile=20, hook_name=HOOK).dictionary
    options = {"targets": (0.05,), "signs": (1,), "n": 1, "options": SHORT, "baselines": ("random", "prompting")}
    found = sx.compare_steering(
        model, [sx.Method.from_dictionary("regions", partition)], concepts, rates, prompts=[TALK, BEGUN],
        prompting="On {concept}. {prompt}", chat_template_options={"quiet": True}, **options,
    )  # fmt: skip
    assert seen[:2] == [TALK, BEGUN] and set(found.texts["prompt"]) == {in_words(TALK), in_words(BEGUN)}
    told = [SYSTEM, {**WHY, "content": "On c0. Why?"}, BECAUSE]
    ((text,),) = sx.sample_texts(model, told, n=1, options=SHORT, chat_template_options={"quiet": True})
    own = found.texts[(found.texts["method"] == "prompting") & (found.texts["concept"] == "c0")]
    assert own.set_index("prompt").loc[in_words(BEGUN), "text"] == text
    assert Evidence.load(found.save(tmp_path)).texts.equals(found.texts)


def test_names_are_swapped_in_every_message():
    talk = [{"role": "system", "content": "Ann asks."}, {"role": "user", "content": "What does Bob say?"}]
    swap = EntitySwap(talk, "Ann", "Bob")
    swap.check()
    assert [one["content"] for one in swap.swapped] == ["Bob asks.", "What does Ann say?"]
    with pytest.raises(ValueError, match="must hold 'Bob' once and then 'Ann' once"):
        EntitySwap(talk, "Bob", "Ann").check()
