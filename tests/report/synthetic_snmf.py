"""SNMF hierarchies, profiles, lenses and continuations made up for the report's tests."""

from types import SimpleNamespace

import torch
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.steering.divergence_search import MatchedStrength
from saelens_ext.steering.steer_features import SteeredFeatures, SteeredText
from tests.report import synthetic

RANKS = (60, 12, 5)
WIDTH = 90
HOOK = "blocks.2.mlp.hook_post"
UNREACHED = 3
HOSTILE_TEXT = ' </p><script>window.pwned=1</script> & "friends" \u202eabc ' + "long" * 150


def make_dictionary(k: int, seed: int, **metadata: object) -> SNMFDictionary:
    """Random unit features of nine neurons each, of which a few are shared by all."""
    random = torch.Generator().manual_seed(seed)
    features = torch.zeros(k, WIDTH)
    for row in features:
        chosen = torch.cat([torch.tensor([0, 1]), 2 + torch.randperm(WIDTH - 2, generator=random)[:7]])
        row[chosen] = torch.randn(9, generator=random)
    described = {
        "model_name": "tiny-llama",
        "hook_name": "blocks.2.mlp.out.hook_in",
        "context_size": 96,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "typical_norm": 3.0,
    } | metadata
    return SNMFDictionary.from_features(
        torch.nn.functional.normalize(features, dim=1), sparsity=0.1, l1=0.1, metadata=described
    )


def make_fit(dictionary: SNMFDictionary) -> SNMFFitResult:
    """The fit of a dictionary."""
    k = dictionary.cfg.d_sae
    return SNMFFitResult(
        dictionary=dictionary,
        hook_name=HOOK,
        stopped_because="converged",
        n_seen=4321,
        n_held_out=400,
        loss=0.4567,
        held_out_loss=0.5678,
        history=[0.9, 0.6, 0.5, 0.48],
        n_dead=1,
        n_duplicate=2,
        n_revived=7,
        typical_norm=3.0,
        shares=torch.linspace(0.2, 0.01, k),
    )


def make_level(dictionary: SNMFDictionary, tokenizer: PreTrainedTokenizerBase, seed: int) -> SNMFLevel:
    """A profiled level whose last feature is active nowhere."""
    random = torch.Generator().manual_seed(seed)
    k = dictionary.cfg.d_sae
    host = SimpleNamespace(provenance=SimpleNamespace(windows=synthetic.make_windows(tokenizer, k)), n_regions=k)
    top = synthetic.make_examples(host, 6, descending=True, full=True, seed=seed)
    counts = torch.randint(1, 1000, (k,), generator=random)
    counts[-1] = 0
    for name, empty in {
        "values": torch.nan,
        "positions": -1,
        "contexts": -1,
        "document_ids": -1,
        "token_ids": -1,
    }.items():
        getattr(top, name)[-1] = empty
    largest = 5 * torch.rand(k, generator=random)
    profile = DictionaryProfile(
        hook_name=HOOK,
        hook_aliases=(HOOK,),
        n_activations=1000,
        n_unassigned=0,
        context=synthetic.CONTEXT,
        latent_names=tuple(f"latent {i}" for i in range(k)),
        counts=counts,
        mean_activation=largest / 3,
        max_activation=largest,
        top=top,
    )
    return SNMFLevel(
        dictionary=dictionary,
        profile=profile,
        lens=synthetic.make_lens(host, tokenizer),
        held_out_loss=0.6 + 0.01 * seed,
    )


def make_steered(k: int) -> SteeredFeatures:
    """One continuation per feature, hostile in every third; the target cannot be reached with one."""
    texts = []
    for feature in range(k):
        lost = feature == UNREACHED
        strength = MatchedStrength(
            sign=1,
            target=0.25,
            coefficient=12.5 + feature,
            kl=0.125 if lost else 0.251,
            status="saturated" if lost else "reached",
            monotone=True,
            n_evaluations=8,
        )
        text = None if lost else HOSTILE_TEXT if feature % 3 == 0 else f" feature {feature} speaks"
        texts.append(SteeredText(feature=feature, strength=strength, text=text))
    return SteeredFeatures(
        hook_name=HOOK, prompt="I think that", target=0.25, unsteered=" nobody steers", texts=tuple(texts)
    )


def make_section(tokenizer: PreTrainedTokenizerBase, ranks: tuple[int, ...] = RANKS) -> SNMFSection:
    """A section on a hierarchy, with the fit of another dictionary to compare with."""
    random = torch.Generator().manual_seed(9)
    dictionaries = [make_dictionary(k, seed) for seed, k in enumerate(ranks)]
    hierarchy = HierarchicalSNMF(
        dictionaries=dictionaries,
        links=[torch.rand(a, b, generator=random) for a, b in zip(ranks, ranks[1:], strict=False)],
        hook_name=HOOK,
        losses=[0.51, 0.61, 0.71],
        losses_before=[0.5, 0.8, 1.3],
        encode_losses=[0.49, 0.59, 0.69],
        history=[3.0, 2.0, 1.9],
        n_seen=4321,
    )
    levels = [make_level(dictionary, tokenizer, seed) for seed, dictionary in enumerate(dictionaries)]
    return SNMFSection(
        levels=levels, fit=make_fit(make_dictionary(ranks[0], 7)), hierarchy=hierarchy, steered=make_steered(ranks[0])
    )


def make_flat_section(tokenizer: PreTrainedTokenizerBase, k: int = 12) -> SNMFSection:
    """A section on one dictionary: no tree, no lens, nothing steered."""
    fit = make_fit(make_dictionary(k, 0))
    level = make_level(fit.dictionary, tokenizer, 0)
    return SNMFSection(levels=[SNMFLevel(dictionary=fit.dictionary, profile=level.profile)], fit=fit)
