"""Exactness laws of the interventions, on both model classes."""

import warnings

import pytest
import torch
from sae_lens import (
    SAE,
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

from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.host.models import resolve_hook
from saelens_ext.steering.interventions import (
    ablate_directions,
    add_direction,
    clamp_latent,
    latent_directions,
    scale_latent,
)
from tests import models_zoo
from tests.steering.steered import along_latent

MODELS = ("tiny_hooked", "tiny_bridge", "tiny_gpt2_hooked", "tiny_gpt2_bridge")
RESIDUAL = "blocks.1.hook_resid_post"
TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request):
    """Every class with every architecture."""
    yield from without_hooks_afterwards(request)


@pytest.fixture(params=("tiny_hooked", "tiny_gpt2_bridge"))
def either(request):
    """Either class."""
    yield from without_hooks_afterwards(request)


def without_hooks_afterwards(request):
    model = request.getfixturevalue(request.param)
    yield model
    assert not any(handle for point in model.hook_dict.values() for handle in getattr(point, "fwd_hooks", ())), (
        "a hook stayed"
    )


@pytest.fixture
def llama(request):
    return request.getfixturevalue("tiny_bridge")


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, tokens=TOKENS, hook=RESIDUAL):
    """Logits, and what flows on from a hook."""
    name, kept = resolve_hook(model, hook), []
    with model.hooks(fwd_hooks=[(name, lambda x, hook: kept.append(x.clone()))]):
        logits = model(tokens)
    return logits, kept[0]


def width(model, hook=RESIDUAL) -> int:
    return run(model, hook=hook)[1].shape[-1]


def saes(d: int) -> dict[str, SAE]:
    def options(**extra):
        return {"d_in": d, "d_sae": 40, "metadata": SAEMetadata(hook_name=RESIDUAL, typical_norm=2.5), **extra}

    torch.manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(80, d), dim=1)
    metadata = {"hook_name": RESIDUAL, "typical_norm": 2.5}
    made = {
        "standard": StandardSAE(StandardSAEConfig(**options())),
        "layer_norm": StandardSAE(StandardSAEConfig(**options(normalize_activations="layer_norm"))),
        "constant_norm": StandardSAE(StandardSAEConfig(**options(normalize_activations="constant_norm_rescale"))),
        "topk": TopKSAE(TopKSAEConfig(**options(k=5, rescale_acts_by_decoder_norm=True))),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**options())),
        "partition": ExemplarPartition.from_regions(units[:40], units[40:], torch.randn(d), 0.8, metadata=metadata),
        "partition_cosine": ExemplarPartition.from_regions(
            units[:40], units[40:], torch.randn(d), 0.8, readout="cosine", basis="mean", metadata=metadata
        ),
    }
    for sae in made.values():
        for parameter in sae.parameters():
            if parameter.ndim == 1 and not isinstance(sae, ExemplarPartition):
                parameter.data.normal_(std=0.1)
    return made


SAES = tuple(saes(4))


def transcoder(d: int) -> Transcoder:
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out", typical_norm=1.0)
    return Transcoder(TranscoderConfig(d_in=d, d_out=d, d_sae=40, apply_b_dec_to_input=False, metadata=metadata))


# --- add_direction ---


def test_adds_exactly(model):
    v = normal(width(model))
    _, x = run(model)
    with add_direction(model, RESIDUAL, 7 * v, -1.5) as inside:
        assert inside is model
        _, moved = run(model)
    assert torch.equal(moved, x + (v * 7 / (v * 7).norm()) * -1.5)
    assert torch.equal(run(model)[0], run(model)[0]) and torch.equal(run(model)[1], x)


@pytest.mark.parametrize("hook", [RESIDUAL, "blocks.0.hook_mlp_out", "hook_embed", "blocks.1.ln2.hook_normalized"])
def test_strength_zero_is_no_hook_at_all(model, hook):
    logits, _ = run(model)
    with add_direction(model, hook, normal(width(model, hook)), 0.0):
        assert torch.equal(run(model)[0], logits)


def test_logits_move_as_predicted_right_before_the_unembedding(model):
    v = normal(model.cfg.d_model)
    if "unembed.hook_in" in model.hook_dict:
        hook, effect = "unembed.hook_in", v @ model.W_U
    else:  # the last hook of this class lies before the weights of the final norm
        hook, effect = "ln_final.hook_normalized", (v * model.ln_final.w) @ model.W_U
    logits, _ = run(model)
    with add_direction(model, hook, v, 4.0):
        assert torch.allclose(run(model)[0] - logits, (4 * effect / v.norm()).detach().expand_as(logits), atol=1e-4)


def test_positions_are_those_of_the_prompt(either):
    v = normal(width(either))
    _, x = run(either)
    before, name = [], resolve_hook(either, RESIDUAL)
    with either.hooks(fwd_hooks=[(name, lambda x, hook: before.append(x))]):
        with add_direction(either, RESIDUAL, v, 2.0, positions=[0, 4, 4]):
            _, moved = run(either)
    assert torch.equal(before[0], x), "an activation that others may hold was changed in place"
    expected = x.clone()
    expected[:, [0, 4]] += 2 * v / v.norm()
    assert torch.equal(moved, expected)
    with add_direction(either, RESIDUAL, v, 2.0, positions=[9]), pytest.raises(ValueError, match="9 tokens"):
        run(either)
    with add_direction(either, RESIDUAL, v, 2.0, positions=[0]):
        assert not torch.equal(run(either, TOKENS[:, :1])[1], x[:, :1]), "a prompt of one token is a prompt"


def test_heads_are_joined(model):
    hook = "blocks.1.attn.hook_z"
    _, x = run(model, hook=hook)
    d = x[0, 0].numel()
    v = normal(d)
    with add_direction(model, hook, v, 2.0):
        _, moved = run(model, hook=hook)
    assert torch.equal(moved.reshape(2, 9, d), x.reshape(2, 9, d) + 2 * v / v.norm())


def test_gradients_reach_the_direction(llama):
    v = normal(32).requires_grad_()
    with add_direction(llama, RESIDUAL, v, 2.0):
        llama(TOKENS)[..., 5].sum().backward()
    assert v.grad is not None and float(v.grad.norm()) > 0


def test_half_precision_rounds_once(llama):
    kept, v = [], normal(32)
    point = llama.hook_dict[resolve_hook(llama, RESIDUAL)]
    with add_direction(llama, RESIDUAL, v, 2.0):
        (handle,) = point.fwd_hooks
        x = normal(2, 3, 32).bfloat16()
        kept = handle.user_hook(x, hook=point)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, (x.float() + 2 * v / v.norm()).bfloat16())


# --- ablate_directions ---


@pytest.mark.parametrize("centred", [False, True])
def test_ablation_projects_about_the_centre(model, centred):
    d = width(model)
    rows, center = normal(3, d), normal(d, seed=2) if centred else None
    _, x = run(model)
    origin = torch.zeros(d) if center is None else center
    with ablate_directions(model, RESIDUAL, rows, center=center):
        _, once = run(model)
        with ablate_directions(model, RESIDUAL, rows, center=center):
            _, twice = run(model)
    assert torch.allclose(once @ rows.T, (origin @ rows.T).expand(2, 9, 3), atol=1e-4)
    assert torch.allclose(twice, once, atol=1e-5)
    complement = torch.linalg.qr(rows.T, mode="complete").Q[:, 3:]
    assert torch.allclose(once @ complement, x @ complement, atol=1e-5)
    assert not torch.allclose(once, x, atol=1e-2)


def test_dependent_directions_count_once(either):
    a, b = normal(2, width(either))
    _, dependent = with_ablation(either, torch.stack([a, -3 * a, b, a + b, a + b, 1e-3 * b]))
    _, independent = with_ablation(either, torch.stack([a, b]))
    assert torch.allclose(dependent, independent, atol=1e-5)
    assert torch.allclose(with_ablation(either, a)[1], with_ablation(either, a[None])[1])


def with_ablation(model, directions):
    with ablate_directions(model, RESIDUAL, directions):
        return run(model)


def test_more_directions_than_dimensions_leave_the_centre(either):
    d = width(either)
    center = normal(d, seed=3)
    with ablate_directions(either, RESIDUAL, normal(d + 5, d), center=center):
        assert torch.allclose(run(either)[1], center.expand(2, 9, d), atol=1e-4)


# --- latents ---


@pytest.mark.parametrize("name", SAES)
def test_factor_one_is_no_change_and_factor_zero_is_clamp_zero(either, name):
    sae = saes(width(either))[name]
    logits, x = run(either)
    active = most_active(sae, x)
    with scale_latent(either, sae, active, 1):
        assert torch.equal(run(either)[0], logits)
    with scale_latent(either, sae, active, 0.0):
        _, removed = run(either)
    with clamp_latent(either, sae, active, 0.0):
        assert torch.equal(run(either)[1], removed)
    assert not torch.equal(removed, x)


@torch.no_grad()
def most_active(sae, x) -> list[int]:
    return (sae.encode(x) != 0).sum(dim=(0, 1)).topk(2).indices.tolist()


@pytest.mark.parametrize("name", SAES)
def test_the_error_is_kept(either, name):
    sae = saes(width(either))[name]
    _, x = run(either)
    latents = most_active(sae, x)
    with torch.no_grad():
        codes = sae.encode(x)
        changed = codes.clone()
        changed[..., latents] = 3.0
        before = sae.decode(codes)
        sae.encode(x)  # a normalising SAE forgets its scale at each decode
        expected = x + sae.decode(changed) - before
    with clamp_latent(either, sae, latents, 3):
        assert torch.allclose(run(either)[1], expected, atol=1e-4)
    with scale_latent(either, sae, latents[0], -2.5):
        _, scaled = run(either)
    untouched = codes[..., latents[0]] == 0
    assert torch.equal(scaled[untouched], x[untouched])


def test_a_token_whose_code_stays_is_left_to_the_last_bit(either, monkeypatch):
    """Even where the dictionary's products round differently from row to row."""
    sae = saes(width(either))["topk"]
    logits, x = run(either)
    with torch.no_grad():
        unused = (sae.encode(x) == 0).all(dim=(0, 1)).nonzero()[:2].flatten().tolist()
    decode = sae.decode
    monkeypatch.setattr(sae, "decode", lambda z: decode(z) + torch.arange(z[..., 0].numel()).reshape(z[..., :1].shape))
    with scale_latent(either, sae, unused, 7.0):
        assert torch.equal(run(either)[0], logits)


@pytest.mark.parametrize("name", SAES)
def test_as_the_host_does_with_an_error_term(either, name):
    sae = saes(width(either))[name]
    sae.cfg.metadata.hook_name = hook = resolve_hook(either, RESIDUAL)
    j = most_active(sae, run(either)[1])[0]

    def set_latent(z, hook):
        z[..., j] = 2.0
        return z

    with torch.no_grad(), either.saes([sae], use_error_term=True):
        expected = either.run_with_hooks(TOKENS, fwd_hooks=[(f"{hook}.hook_sae_acts_post", set_latent)])
    with clamp_latent(either, sae, j, 2.0):
        assert torch.allclose(run(either)[0], expected, atol=1e-4)


def test_a_transcoder_reads_at_its_input_and_acts_at_its_output(model):
    sae = transcoder(model.cfg.d_model)
    if "Hooked" in type(model).__name__ and model.cfg.parallel_attn_mlp:
        pytest.skip("no hook between attention and MLP")
    with torch.no_grad():
        _, source = run(model, hook="blocks.1.hook_resid_mid")
        _, out = run(model, hook="blocks.1.hook_mlp_out")
        codes = sae.encode(source)
        changed = codes.clone()
        changed[..., 3] *= -4
        expected = out + (changed - codes) @ sae.W_dec
    for _ in range(2):
        with scale_latent(model, sae, 3, -4):
            assert torch.allclose(run(model, hook="blocks.1.hook_mlp_out")[1], expected, atol=1e-4)
            assert torch.equal(run(model, hook="blocks.1.hook_resid_mid")[1], source)
    hook, direction, norm = latent_directions(model, sae, 3)
    assert hook == "blocks.1.hook_mlp_out" and norm is None  # what is recorded is of what it reads
    with add_direction(model, hook, direction, 2.0):
        _, steered = run(model, hook="blocks.1.hook_mlp_out")
    assert torch.allclose(steered - out, (2 * sae.W_dec[3] / sae.W_dec[3].norm()).detach().expand_as(out), atol=1e-5)
    sae.cfg.metadata.hook_name_out = None
    with pytest.raises(ValueError, match="hook_name_out"):
        scale_latent(model, sae, 3, -4)


def test_a_hook_z_dictionary(model):
    hook = "blocks.1.attn.hook_z"
    _, x = run(model, hook=hook)
    d = x[0, 0].numel()
    torch.manual_seed(0)
    cfg = StandardSAEConfig(d_in=d, d_sae=40, reshape_activations="hook_z", metadata=SAEMetadata(hook_name=hook))
    sae = StandardSAE(cfg)
    with torch.no_grad():
        flat = x.reshape(2, 9, d)
        codes = torch.relu((flat - sae.b_dec) @ sae.W_enc + sae.b_enc)
        expected = flat - codes[..., 2:3] * sae.W_dec[2]
    with scale_latent(model, sae, 2, 0):
        _, moved = run(model, hook=hook)
    assert torch.allclose(moved.reshape(2, 9, d), expected, atol=1e-5) and moved.shape == x.shape
    assert sae.hook_z_reshaping_mode


def test_a_latent_steers_by_its_direction_in_units_of_the_typical_norm(either):
    for sae in (saes(width(either))[name] for name in ("standard", "partition")):
        _, x = run(either)
        hook, direction, norm = latent_directions(either, sae, 4)
        assert (hook, norm) == (RESIDUAL, 2.5) and torch.equal(direction, sae.W_dec[4].detach())
        with add_direction(either, hook, direction, 2.0 * norm):
            _, moved = run(either)
        assert torch.allclose((moved - x).norm(dim=-1), torch.full((2, 9), 5.0), atol=1e-4)
        with add_direction(either, hook, direction, 2.0 * 0.1, positions=[1]):
            _, moved = run(either)
        assert torch.allclose((moved - x).norm(dim=-1)[:, 1], torch.full((2,), 0.2), atol=1e-4)
        assert torch.equal(moved[:, 2], x[:, 2])
        sae.cfg.metadata.typical_norm = None
        assert latent_directions(either, sae, 4).typical_norm is None


def test_the_directions_of_several_latents(llama):
    sae = saes(32)["standard"]
    assert torch.equal(latent_directions(llama, sae).directions, sae.W_dec.detach())
    for chosen in ([7, 2], torch.tensor([7, 2]), (7, 2)):
        assert torch.equal(latent_directions(llama, sae, chosen).directions, sae.W_dec[[7, 2]].detach())
    assert latent_directions(llama, sae, [3]).directions.shape == (1, 32)
    for one in (3, torch.tensor(3), torch.tensor([3])[0]):
        assert torch.equal(latent_directions(llama, sae, one).directions, sae.W_dec[3].detach())
    assert not latent_directions(llama, sae).directions.requires_grad


def test_steering_by_either_basis(llama):
    sae = saes(32)["partition"]
    _, x = run(llama)
    for basis, rows in ((None, sae.W_dec), ("exemplar", sae.exemplars), ("mean", sae.means)):
        hook, direction, norm = latent_directions(llama, sae, 4, basis=basis)
        with add_direction(llama, hook, direction, norm):
            assert torch.allclose(run(llama)[1] - x, (2.5 * rows[4]).detach().expand_as(x), atol=1e-5)
    with pytest.raises(ValueError, match="basis"):
        latent_directions(llama, sae, 4, basis="other")
    with pytest.raises(ValueError, match="no means"):
        latent_directions(llama, saes(32)["standard"], 4, basis="mean")


# --- contexts ---


def test_contexts_nest_the_outer_one_first(either):
    v = normal(width(either))
    _, x = run(either)
    with add_direction(either, RESIDUAL, v, 1.0), ablate_directions(either, RESIDUAL, v):
        _, ablated = run(either)
    with ablate_directions(either, RESIDUAL, v):
        with add_direction(either, RESIDUAL, v, 1.0):
            _, added = run(either)
        _, only_ablated = run(either)
    assert torch.allclose(ablated, only_ablated, atol=1e-5)
    assert torch.allclose(added, only_ablated + v / v.norm(), atol=1e-5)
    assert torch.equal(run(either)[1], x)


def test_an_exception_inside_leaves_the_model_as_it_was(either):
    logits, x = run(either)
    context_level = either.context_level
    with pytest.raises(RuntimeError, match="inside"), add_direction(either, RESIDUAL, normal(width(either)), 5.0):
        run(either)
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="is of width"), add_direction(either, RESIDUAL, normal(7), 5.0):
        run(either)
    assert torch.equal(run(either)[0], logits) and either.context_level == context_level


def test_the_users_hooks_survive(either):
    name, seen = resolve_hook(either, RESIDUAL), []
    either.hook_dict[name].add_hook(lambda x, hook: seen.append(x.clone()))
    either.hook_dict[name].add_hook(lambda x, hook: x + 1, is_permanent=True)
    try:
        _, x = run(either)
        with either.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x.clone()))]):
            with add_direction(either, RESIDUAL, normal(x.shape[-1]), 3.0):
                run(either)
                either.run_with_cache(TOKENS, names_filter=[name])
                either.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: None)])
                _, moved = run(either)
            seen.clear()
            run(either)
        assert len(seen) == 2 and torch.equal(seen[1], x)
        assert not torch.equal(moved, x)
        seen.clear()
        assert torch.equal(run(either)[1], x) and len(seen) == 1
    finally:
        either.hook_dict[name].remove_hooks("fwd", including_permanent=True)


def test_a_bridge_in_compatibility_mode_is_changed_once():
    model = models_zoo.make_model("llama", "SAETransformerBridge")
    model.enable_compatibility_mode()
    _, x = run(model)
    v = normal(32)
    for hook in (RESIDUAL, "blocks.1.hook_out"):
        with add_direction(model, hook, v, 2.0):
            assert torch.equal(run(model)[1], x + 2 * v / v.norm())


def test_what_is_cached_is_what_flows_on(either):
    name = resolve_hook(either, RESIDUAL)
    _, x = run(either)
    with add_direction(either, RESIDUAL, normal(x.shape[-1]), 3.0):
        _, cache = either.run_with_cache(TOKENS, names_filter=[name])
        _, moved = run(either)
    assert torch.equal(cache[name], moved) and not torch.equal(moved, x)


@pytest.mark.parametrize("kind", ["add", "ablate", "clamp", "transcoder", "positions"])
def test_generation_with_a_cache_is_a_full_recompute(model, kind):
    d = width(model)
    sae = saes(d)["standard"]
    interventions = {
        "add": lambda: add_direction(model, RESIDUAL, normal(d), 12.0),
        "ablate": lambda: ablate_directions(model, RESIDUAL, normal(4, d), center=normal(d, seed=5)),
        "clamp": lambda: clamp_latent(model, sae, [1, 2], 4.0),
        "transcoder": lambda: clamp_latent(model, transcoder(d), [1, 2], 6.0),
        "positions": lambda: add_direction(model, RESIDUAL, normal(d), 9.0, positions=[0, 2, 8]),
    }
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    last, steps = resolve_hook(model, "blocks.2.hook_resid_post"), []
    plain = model.generate(TOKENS, **options)
    with interventions[kind](), model.hooks(fwd_hooks=[(last, lambda x, hook: steps.append(x[:, -1].clone()))]):
        cached = model.generate(TOKENS, use_past_kv_cache=True, **options)
    with interventions[kind]():
        uncached = model.generate(TOKENS, use_past_kv_cache=False, **options)
    tokens = TOKENS
    for step in steps:
        with interventions[kind]():
            logits, x = run(model, tokens, last)
        assert torch.allclose(step, x[:, -1], atol=1e-4)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens) and torch.equal(uncached, tokens) and len(steps) == 4
    assert not torch.equal(plain, cached), "the intervention did nothing"


def test_generation_with_positions_equals_patching_the_prompt(llama):
    """Left alone, generated tokens still see the changed prompt."""
    v = normal(32)
    with add_direction(llama, RESIDUAL, v, 9.0, positions=[8]):
        steps = []
        with llama.hooks(fwd_hooks=[(resolve_hook(llama, RESIDUAL), lambda x, hook: steps.append(x.shape[1]))]):
            llama.generate(TOKENS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert steps == [9, 1, 1], "this host no longer generates one token at a time"


# --- SAEs attached to the model ---


def attached_sae(model) -> SAE:
    sae = saes(width(model))["standard"]
    sae.cfg.metadata.hook_name = resolve_hook(model, RESIDUAL)
    return sae


def test_an_attached_sae_makes_the_name_ambiguous(either):
    sae, v = attached_sae(either), normal(width(either))
    name = sae.cfg.metadata.hook_name
    with either.saes([sae]):
        for attempt in (
            lambda: add_direction(either, RESIDUAL, v, 1.0),
            lambda: ablate_directions(either, RESIDUAL, v),
            lambda: clamp_latent(either, sae, 0, 1.0),
            lambda: along_latent(either, sae, 0, 1.0),
        ):
            with pytest.raises(ValueError, match="attached"):
                attempt()
        plain = run(either, hook=f"{name}.hook_sae_output")
        with add_direction(either, f"{name}.hook_sae_output", v, 2.0):
            moved = run(either, hook=f"{name}.hook_sae_output")
        assert torch.equal(moved[1], plain[1] + 2 * v / v.norm()) and not torch.equal(moved[0], plain[0])


def test_with_its_error_term_an_attached_sae_changes_nothing_for_the_intervention(either):
    sae, v = attached_sae(either), normal(width(either))
    with add_direction(either, RESIDUAL, v, 2.0):
        logits, _ = run(either)
    with either.saes([sae], use_error_term=True):
        with add_direction(either, f"{sae.cfg.metadata.hook_name}.hook_sae_output", v, 2.0), torch.no_grad():
            assert torch.allclose(either(TOKENS), logits, atol=1e-4)


def test_a_sae_attached_inside_the_context_is_a_warning(model):
    sae = attached_sae(model)
    with pytest.warns(UserWarning, match="the intervention was lost"):
        with add_direction(model, RESIDUAL, normal(width(model)), 2.0):
            with model.saes([sae]):
                pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with add_direction(model, "blocks.0.hook_resid_post", normal(width(model)), 2.0), model.saes([sae]):
            run(model, hook="blocks.0.hook_resid_post")


def test_a_hook_that_an_attached_transcoder_reads_is_refused(either):
    sae = transcoder(either.cfg.d_model)
    sae.cfg.metadata.hook_name = resolve_hook(either, "blocks.1.hook_resid_mid")
    sae.cfg.metadata.hook_name_out = resolve_hook(either, "blocks.1.hook_mlp_out")
    with either.saes([sae]), pytest.raises(ValueError, match="reads its input"):
        add_direction(either, "blocks.1.hook_resid_mid", normal(either.cfg.d_model), 1.0)
    either.reset_saes()


# --- bad input ---


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: add_direction(m, "blocks.1.hook_resid_pots", torch.ones(32), 1.0), "hook_resid_post"),
        (lambda m: add_direction(m, RESIDUAL, torch.zeros(32), 1.0), "zero"),
        (lambda m: add_direction(m, RESIDUAL, torch.full((32,), torch.nan), 1.0), "non-finite"),
        (lambda m: add_direction(m, RESIDUAL, torch.ones(2, 32), 1.0), r"shape \(d,\)"),
        (lambda m: add_direction(m, RESIDUAL, torch.ones(32), float("inf")), "coefficient"),
        (lambda m: add_direction(m, RESIDUAL, torch.ones(32), 1.0, positions=[]), "positions"),
        (lambda m: add_direction(m, RESIDUAL, torch.ones(32), 1.0, positions=[-1]), "n - 1"),
        (
            lambda m: ablate_directions(m, RESIDUAL, torch.stack([torch.ones(32), torch.zeros(32)])),
            "Direction 1 is zero",
        ),
        (lambda m: ablate_directions(m, RESIDUAL, torch.ones(0, 32)), "shape"),
        (lambda m: ablate_directions(m, RESIDUAL, torch.ones(32), center=torch.ones(31)), "center"),
        (lambda m: ablate_directions(m, RESIDUAL, torch.ones(32), center=torch.full((32,), torch.inf)), "non-finite"),
        (lambda m: scale_latent(m, saes(32)["standard"], 40, 1.0), "0 to 39"),
        (lambda m: scale_latent(m, saes(32)["standard"], -1, 1.0), "0 to 39"),
        (lambda m: scale_latent(m, saes(32)["standard"], [], 1.0), "0 to 39"),
        (lambda m: scale_latent(m, saes(32)["standard"], 1, float("nan")), "factor"),
        (lambda m: clamp_latent(m, saes(32)["standard"], 1, float("inf")), "value"),
        (lambda m: latent_directions(m, saes(32)["standard"], 41), "0 to 39"),
        (lambda m: clamp_latent(m, StandardSAE(StandardSAEConfig(d_in=32, d_sae=4)), 1, 1.0), "names no hook"),
    ],
)
def test_bad_input(llama, attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt(llama)
    run(llama)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: add_direction(m, RESIDUAL, torch.ones(33), 1.0),
        lambda m: clamp_latent(m, saes(33)["standard"], 1, 1.0),
    ],
)
def test_another_width_is_an_error_of_the_forward_pass(either, attempt):
    with attempt(either), pytest.raises(ValueError, match="33"):
        run(either)


def test_a_sae_over_whole_sequences_is_refused(llama):
    sae = saes(32)["standard"]
    sae.cfg.architecture = lambda: "temporal"
    with pytest.raises(ValueError, match="token by token"):
        clamp_latent(llama, sae, 1, 1.0)
