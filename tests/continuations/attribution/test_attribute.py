"""Attribution: do the sources make up the target, at the right position, however the work is cut up?"""

from dataclasses import replace

import pytest
import torch

from saelens_ext.continuations.attribution.attribute import attribute_continuations, attribution_completeness
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.source_table import KINDS
from tests.continuations._dictionaries import cases, make
from tests.models_zoo import ARCHITECTURES, GEMMAS, MODEL_CLASSES, make_model

TEXTS = [" is a test of it", " x", " of one", " assertions are the most"]
ALL = {"kinds": KINDS, "special_positions": True, "max_sources": 10**6}
HOSTS = [(architecture, model_class) for architecture in ARCHITECTURES for model_class in MODEL_CLASSES]
HOSTS += [(architecture, "SAETransformerBridge") for architecture in GEMMAS]


@pytest.fixture(scope="module", params=HOSTS, ids=lambda host: f"{host[0]}-{host[1][:6]}")
def host(request):
    architecture, model_class = request.param
    model = make_model(architecture, model_class)
    return architecture, model, score_continuations(model, "The assert statement", TEXTS)


@pytest.fixture(scope="module")
def llama():
    model = make_model("llama", "HookedSAETransformer")
    return model, score_continuations(model, "The assert statement", TEXTS)


def mean_demeaned_logits(model, found, shift=0):
    """The target in two loops, from the model's own logits; ``shift`` moves the column that is read."""
    targets = []
    for row in range(len(found)):
        ids = [*found.prefix_ids, *found.ids_of(row)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].float()
        columns = range(len(found.prefix_ids), len(ids))
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        logits = cap * torch.atanh(logits / cap) if cap > 0 else logits
        targets.append(
            sum(logits[t - 1 + shift, ids[t]] - logits[t - 1 + shift].mean() for t in columns) / len(columns)
        )
    return torch.stack(targets)


@pytest.mark.parametrize("name", sorted(cases("llama")))
def test_all_sources_together_are_the_target(host, name):
    architecture, model, found = host
    dictionaries = cases(architecture)[name]
    target = mean_demeaned_logits(model, found)
    parts = attribution_completeness(model, dictionaries, found, batch_size=3)
    torch.testing.assert_close(parts.prefix + parts.continuation + parts.bias, target, rtol=1e-4, atol=2e-6)
    attributed = attribute_continuations(model, dictionaries, found, **ALL)
    cut = torch.tensor([hook in attributed.metadata["attribution"]["cut"] for hook in attributed.sources.hooks])
    columns = attributed.signatures[:, cut].sum(dim=1)
    torch.testing.assert_close(columns, parts.prefix, rtol=1e-4, atol=3e-6)
    own = mean_demeaned_logits(model, found, shift=1)
    assert ((columns + parts.continuation + parts.bias - own).abs() > 1e-2).all(), (
        "the token's own position must not fit"
    )
    if architecture == "llama":
        assert parts.bias.abs().max() < 1e-6 or name == "skip"
    if architecture == "gpt2":
        assert parts.bias.abs().min() > 1e-3, "biases must be measured"


def test_the_demo_model_is_complete(smol):
    found = score_continuations(smol, "The bank of the", [" river was", " city"])
    d = smol.cfg.d_model
    write = "blocks.{}.mlp.hook_out"
    several = [
        make("transcoder", f"blocks.{i}.ln2.hook_out", d, write=write.format(i), d_sae=64, seed=i) for i in (4, 17)
    ]
    for dictionaries in ([], [make("standard", "blocks.15.hook_out", d, d_sae=64)], several):
        parts = attribution_completeness(smol, dictionaries, found)
        whole = parts.prefix + parts.continuation + parts.bias
        torch.testing.assert_close(whole, mean_demeaned_logits(smol, found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
def test_signatures_do_not_depend_on_batches_padding_or_order(llama, backend):
    model, found = llama
    dictionaries = cases("llama")["several"]

    def signatures(given, batch_size):
        return attribute_continuations(
            model, dictionaries, given, backend=backend, batch_size=batch_size, **ALL
        ).signatures

    whole = signatures(found, 4)
    for row in range(len(found)):
        torch.testing.assert_close(signatures(found.select([row]), 1)[0], whole[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signatures(found, 3), whole, rtol=1e-5, atol=1e-5)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(signatures(found.select(order), 2), whole[order], rtol=1e-5, atol=1e-5)


def test_one_token_of_prefix_and_one_of_continuation(llama):
    model, _ = llama
    found = score_continuations(model, "", [[65], [66]])
    assert len(found.prefix_ids) == 1 and found.lengths.tolist() == [1, 1]
    attributed = attribute_continuations(model, [make("standard", "blocks.1.hook_mlp_out")], found)
    assert set(attributed.sources.positions) == {0}
    # Nothing but the prefix is there to explain a single token, and this model has no bias.
    torch.testing.assert_close(
        attributed.columns["prefix_effect"], mean_demeaned_logits(model, found), rtol=1e-4, atol=1e-6
    )
    assert attributed.columns["continuation_effect"].abs().max() < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
@pytest.mark.parametrize("name", ["middle", "several", "skip"])
def test_both_hosts_agree(architecture, backend, name):
    found = []
    for model_class in MODEL_CLASSES:
        model = make_model(architecture, model_class)
        scored = score_continuations(model, "The assert statement", TEXTS[:2])
        found.append(attribute_continuations(model, cases(architecture)[name], scored, backend=backend, **ALL))
    assert found[0].sources.latents == found[1].sources.latents and found[0].sources.kinds == found[1].sources.kinds
    torch.testing.assert_close(found[0].signatures, found[1].signatures, rtol=1e-3, atol=2e-5)


def test_targets(llama):
    model, found = llama
    by_target = {t: attribute_continuations(model, [], found, target=t, **ALL) for t in ("mean", "sum", "first")}
    torch.testing.assert_close(by_target["sum"].signatures, by_target["mean"].signatures * found.lengths[:, None])
    firsts = score_continuations(model, "The assert statement", [[found.ids_of(row)[0]] for row in range(len(found))])
    torch.testing.assert_close(
        by_target["first"].signatures, attribute_continuations(model, [], firsts, **ALL).signatures
    )


def test_columns_are_the_sources_with_the_largest_effect_over_the_whole_set(llama):
    model, found = llama
    dictionaries = cases("llama")["transcoders"]
    whole = attribute_continuations(model, dictionaries, found, **ALL)
    best = whole.signatures.abs().mean(dim=0).topk(9).indices.sort().values
    few = attribute_continuations(model, dictionaries, found, **{**ALL, "max_sources": 9})
    assert torch.equal(few.signatures, whole.signatures[:, best])
    assert few.sources == whole.sources.select(best.tolist())
    share = float(few.signatures.abs().sum() / whole.signatures.abs().sum())
    assert few.metadata["attribution"]["share_of_effect"] == pytest.approx(share)
    # By kind over all sources, whichever of them are columns.
    by_kind = few.metadata["attribution"]["share_by_kind"]
    assert sum(by_kind.values()) == pytest.approx(1) and {"latent", "error", "embedding"} <= set(by_kind)
    is_latent = torch.tensor([kind == "latent" for kind in whole.sources.kinds])
    latents = float(whole.signatures.abs()[:, is_latent].sum() / whole.signatures.abs().sum())
    assert by_kind["latent"] == pytest.approx(latents) == whole.metadata["attribution"]["share_by_kind"]["latent"]


def test_what_the_columns_are(llama):
    model, found = llama
    (sae,) = cases("llama")["mlp"]
    attributed = attribute_continuations(model, sae, found, kinds=("latent", "embedding"))
    frame = attributed.sources.to_dataframe()
    assert set(frame["kind"]) == {"latent", "embedding"}
    assert 0 not in set(frame["position"]), "BOS is no column unless asked for"
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([found.prefix_ids]))
        codes = sae.encode(cache["blocks.1.hook_mlp_out"])[0]
    latents = frame[frame["kind"] == "latent"]
    assert len(latents) == int((codes[1:] != 0).sum())
    for row in latents.itertuples():
        assert row.activation == pytest.approx(float(codes[row.position, row.latent]), rel=1e-5)
        assert row.hook == "blocks.1.hook_mlp_out" and row.dictionary == 0
    joined = frame.groupby("position")["token"].first()
    assert "".join(joined) == "The assert statement"


def test_memory_is_bounded_and_the_strongest_latents_stay(llama, caplog):
    model, found = llama
    (sae,) = cases("llama")["stream"]
    whole = attribute_continuations(model, sae, found, **{**ALL, "kinds": ("latent",)})
    few = attribute_continuations(model, sae, found, **{**ALL, "kinds": ("latent",)}, max_bytes=4 * (32 + 4) * 10)
    assert len(few.sources) == 10 < len(whole.sources) and "max_bytes" in caplog.text
    norms = sae.W_dec.detach().norm(dim=1).tolist()
    strength = [abs(a) * norms[j] for a, j in zip(whole.sources.activations, whole.sources.latents)]
    best = sorted(sorted(range(len(strength)), key=lambda i: -strength[i])[:10])
    assert few.sources.latents == whole.sources.select(best).latents
    assert few.sources.positions == whole.sources.select(best).positions


@pytest.mark.parametrize("backend", ["linear", "gradient", "relp"])
@pytest.mark.parametrize("name", ["several", "transcoders", "own"])
def test_fixed_sources_of_a_set_reproduce_its_own_signatures(llama, backend, name):
    model, found = llama
    dictionaries = cases("llama")[name]
    own = attribute_continuations(model, dictionaries, found, backend=backend, max_sources=40)
    again = attribute_continuations(model, dictionaries, found, backend=backend, sources=own.sources)
    assert again.sources == own.sources and torch.equal(again.signatures, own.signatures)
    # In the order given, with other draws, and however little memory there is for those that are not asked for.
    order = list(range(0, 40, 3))[::-1]
    other = score_continuations(model, "The assert statement", [" and more", " is a test of it"])
    few = attribute_continuations(
        model, dictionaries, other, backend=backend, sources=own.sources.select(order), max_bytes=1
    )
    assert few.sources == own.sources.select(order)
    torch.testing.assert_close(few.signatures[1], own.signatures[0, order], rtol=1e-4, atol=1e-6)


def test_fixed_sources_that_another_prefix_does_not_have_are_zero(llama):
    model, found = llama
    (sae,) = cases("llama")["mlp"]
    own = attribute_continuations(model, sae, found, kinds=("latent",), special_positions=True)
    swapped = replace(found, prefix_ids=(*found.prefix_ids[:3], 65, *found.prefix_ids[4:]))
    fixed = attribute_continuations(model, sae, swapped, sources=own.sources)
    whole = attribute_continuations(model, sae, swapped, **ALL)
    column = {key: i for i, key in enumerate(whole.sources.keys)}
    active = torch.tensor([key in column for key in own.sources.keys])
    assert 0 < int((~active).sum()) < len(active)
    assert fixed.sources.keys == own.sources.keys and not fixed.signatures[:, ~active].any()
    assert {a for a, on in zip(fixed.sources.activations, active.tolist()) if not on} == {0.0}
    same = [column[key] for key, on in zip(own.sources.keys, active.tolist()) if on]
    torch.testing.assert_close(fixed.signatures[:, active], whole.signatures[:, same])


@pytest.mark.parametrize("name", ["several", "transcoders", "neurons", "own"])
def test_sums_by_kind_are_the_effect_of_the_prefix_on_the_linear_backend(llama, name):
    model, found = llama
    described = attribute_continuations(model, cases("llama")[name], found, **ALL)
    sums = described.metadata["attribution"]["sum_by_kind"]
    assert sum(sums.values()) == pytest.approx(float(described.columns["prefix_effect"].mean()), rel=1e-4, abs=1e-6)
    assert not described.metadata["attribution"]["kinds_overlap"]


@pytest.mark.parametrize("backend", ["gradient", "relp"])
@pytest.mark.parametrize("name", ["neurons", "own", "mlp", "transcoders"])
def test_latents_inside_an_mlp_have_their_fraction_where_the_backend_cuts_at_the_embeddings(llama, backend, name):
    model, found = llama
    whole = attribute_continuations(model, cases("llama")[name], found, backend=backend, **ALL)
    described = whole.metadata["attribution"]
    assert described["cut"] == ["hook_embed"] or len(described["cut"]) == 1
    sizes = whole.signatures.abs().sum(dim=0)
    for kind in ("latent", "error", "embedding"):
        own = float(sizes[torch.tensor([k == kind for k in whole.sources.kinds])].sum() / sizes.sum())
        assert own > 0 and described["share_by_kind"][kind] == pytest.approx(own, rel=1e-4)
    assert described["kinds_overlap"]


def test_an_observable_is_a_direction_over_the_vocabulary(llama):
    model, found = llama
    size, first = model.cfg.d_vocab, found.ids_of(0)[0]
    generator = torch.Generator().manual_seed(0)
    for weights in (torch.eye(size)[first], torch.rand(size, generator=generator)):
        attributed = attribute_continuations(model, [], found, target=weights, **ALL)
        for row in range(len(found)):
            ids = [*found.prefix_ids, *found.ids_of(row)]
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0].float()
            columns = range(len(found.prefix_ids) - 1, len(ids) - 1)
            seen = sum((weights - weights.mean()) @ logits[t] for t in columns) / len(columns)
            assert float(attributed.columns["target"][row]) == pytest.approx(float(seen), rel=1e-4, abs=1e-5)
        parts = attribution_completeness(model, [], found, target=weights)
        torch.testing.assert_close(parts.prefix, attributed.signatures.sum(dim=1), rtol=1e-4, atol=1e-5)
        assert float(parts.relative_gap.max()) < 1e-4
    # One token's own logit is what the first token's target is.
    firsts = score_continuations(model, "The assert statement", [[first]])
    by_token = attribute_continuations(model, [], firsts, target=torch.eye(size)[first], **ALL)
    own = attribute_continuations(model, [], firsts, target="first", **ALL)
    torch.testing.assert_close(by_token.signatures, own.signatures, rtol=1e-4, atol=1e-6)
    assert by_token.metadata["attribution"]["target"] == "observable"
