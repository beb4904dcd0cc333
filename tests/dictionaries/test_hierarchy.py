"""Hierarchies: constraints kept by the refinement, which is used, and the trees."""

import json

import pytest
import torch

from saelens_ext import ActivationStream, HierarchicalSNMF, fit_hierarchical_snmf, fit_snmf
from saelens_ext.dictionaries.hierarchy import ConceptNode
from saelens_ext.ops.semi_nmf.deep import DeepFactors, nonnegative_quadratic, objective, refine
from saelens_ext.ops.semi_nmf.updates import CodeStatistics
from tests.dictionaries.planted_trees import SHAPES, agreement, ancestors
from tests.ops.planted_groups import recovered

RANKS = (12, 6, 3)


def planted(seed: int = 0) -> torch.Tensor:
    """Three groups of four features on neurons of their own, and a neuron in common for each group."""
    g = torch.Generator().manual_seed(seed)
    features = torch.zeros(12, 39)
    for i in range(12):
        features[i, 3 * i : 3 * i + 3] = torch.randn(3, generator=g)
        features[i, 36 + i // 4] = 2.0
    groups = (torch.rand(600, 3, generator=g) < 0.4).repeat_interleave(4, dim=1)
    codes = torch.rand(600, 12, generator=g) * groups
    return codes @ features + 0.02 * torch.randn(600, 39, generator=g)


@pytest.fixture(scope="module")
def hierarchy() -> HierarchicalSNMF:
    return fit_hierarchical_snmf(planted(), RANKS, sparsity=4 / 39, hook_name="blocks.0.mlp.hook_post", max_iter=40)


def test_constraints_hold_at_every_level(hierarchy):
    assert hierarchy.ranks == RANKS and [tuple(links.shape) for links in hierarchy.links] == [(12, 6), (6, 3)]
    for dictionary in hierarchy.dictionaries:
        assert int(dictionary.support.sum(dim=1).max()) <= 4
        torch.testing.assert_close(dictionary.features.norm(dim=1), torch.ones(dictionary.cfg.d_sae))
    assert all(bool((links >= 0).all()) for links in hierarchy.links)


def test_the_refinement_lowers_the_objective_and_is_what_is_returned(hierarchy):
    assert all(after <= before for before, after in zip(hierarchy.history, hierarchy.history[1:], strict=False))
    assert len(hierarchy.history) > 2 and sum(hierarchy.losses) < sum(hierarchy.losses_before)
    unrefined = fit_hierarchical_snmf(planted(), RANKS, sparsity=4 / 39, refine_iter=0, max_iter=40)
    assert unrefined.losses == unrefined.losses_before == pytest.approx(hierarchy.losses_before, rel=1e-3)
    assert not torch.equal(unrefined.links[0], hierarchy.links[0])
    assert unrefined.history == []


@pytest.mark.slow
@pytest.mark.parametrize("l1", [0, 0.1])
def test_losses_are_those_of_the_dictionaries(hierarchy, l1):
    x = planted().double()
    if not l1:
        hierarchy = fit_hierarchical_snmf(planted(), RANKS, sparsity=4 / 39, max_iter=40, l1=0)
    for dictionary, loss, through_links in zip(
        hierarchy.dictionaries, hierarchy.encode_losses, hierarchy.losses, strict=True
    ):
        left = x - dictionary(x.float()).detach().double()
        assert loss == pytest.approx(float(left.square().sum() / x.square().sum()), abs=1e-5)
        assert l1 or loss <= through_links + 1e-6
        assert torch.equal(dictionary.b_dec, hierarchy.dictionaries[0].b_dec) and dictionary.cfg.l1 == l1


def test_trees(hierarchy):
    roots = hierarchy.trees()
    assert len(roots) == 3 and all(root.level == 2 and root.weight == 1 for root in roots)
    for root in roots:
        for child in root.children:
            links = hierarchy.links[1][:, root.feature]
            assert child.level == 1 and child.weight == pytest.approx(float(links[child.feature] / links.max()))
            assert child.weight >= 0.15
        assert len(root.children) <= 4 and [c.weight for c in root.children] == sorted(
            (c.weight for c in root.children), reverse=True
        )
    assert len(hierarchy.trees(0)) == 12 and hierarchy.trees(0)[0] == ConceptNode(0, 0, 1.0, ())
    assert all(len(root.children) <= 1 for root in hierarchy.trees(max_children=1))
    strict = hierarchy.trees(min_weight=1)
    assert all(child.weight == 1 for root in strict for child in root.children)
    assert "level 2 feature 0" in str(roots[0]) and "\n  level 1" in str(roots[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_trees_gather_the_planted_groups(seed):
    """Without the penalty and the centre: these activations lie about zero, a fifth of them with nothing but noise."""
    hierarchy = fit_hierarchical_snmf(planted(seed), RANKS, sparsity=4 / 39, max_iter=40, l1=0)

    def leaves(node):
        return {node.feature} if node.level == 0 else set().union(*(leaves(child) for child in node.children))

    # The common neuron of its group says which group a fine feature is of.
    group = hierarchy.dictionaries[0].features[:, 36:].abs().argmax(dim=1)
    roots = hierarchy.trees(min_weight=0.3, max_children=12)
    pure = [len({int(group[i]) for i in leaves(root)}) == 1 for root in roots if leaves(root)]
    assert sum(pure) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_planted_trees_are_found_better_than_by_the_published_rule(name):
    """From the same start."""
    shape = SHAPES[name]
    x, planted_leaves = shape.make(0)
    found = []
    for options in ({}, {"method": "paper"}):
        tree = fit_hierarchical_snmf(x, (shape.leaves, shape.parents), sparsity=shape.sparsity, **options)
        leaves = recovered(planted_leaves, tree.dictionaries[0].features.detach())
        found.append((leaves, agreement(shape, planted_leaves, tree)))
    assert found[0][0] > found[1][0] and found[0][1] > found[1][1]


def test_a_planted_tree_is_found_far_from_zero():
    shape = SHAPES["6 parents of 3, far from zero"]
    x, planted_leaves = shape.make(0)
    tree = fit_hierarchical_snmf(x, (shape.leaves, shape.parents), sparsity=shape.sparsity)
    assert recovered(planted_leaves, tree.dictionaries[0].features.detach()) == 1.0
    assert agreement(shape, planted_leaves, tree) == 1.0
    # The oracle says which leaves are grouped, not how parents are numbered, and takes nothing for a group.
    tree.links[0] = tree.links[0].roll(1, dims=1)
    assert agreement(shape, planted_leaves, tree) == 1.0
    tree.links[0] = tree.links[0].roll(1, dims=0)
    assert agreement(shape, planted_leaves, tree) < 0.6
    tree.links[0][:] = 0
    assert len(set(ancestors(tree))) == shape.leaves


def test_save_and_load(hierarchy, tmp_path):
    path = hierarchy.save(tmp_path / "tree")
    again = HierarchicalSNMF.load(path)
    assert again.ranks == RANKS and again.losses == hierarchy.losses and again.trees() == hierarchy.trees()
    for mine, other in zip(hierarchy.dictionaries, again.dictionaries, strict=True):
        assert torch.equal(mine.features, other.features)
    content = json.loads((path / "hierarchy.json").read_text())
    (path / "hierarchy.json").write_text(json.dumps(content | {"ranks": [12, 5, 3]}))
    with pytest.raises(ValueError, match="do not belong together"):
        HierarchicalSNMF.load(path)


def test_on_a_stream(tiny_bridge, tiny_texts):
    stream = ActivationStream(tiny_bridge, tiny_texts, "blocks.1.mlp.hook_post", context_size=16, max_tokens=400)
    hierarchy = fit_hierarchical_snmf(stream, (8, 4), sparsity=0.2, max_iter=10)
    assert hierarchy.n_seen == 400
    assert all(d.cfg.metadata.hook_name == "blocks.1.mlp.out.hook_in" for d in hierarchy.dictionaries)
    assert hierarchy.dictionaries[1].cfg.metadata.level == 1
    with pytest.raises(ValueError, match="a hierarchy needs them in memory"):
        fit_hierarchical_snmf(stream, (8, 4), memory_limit=1000)


@pytest.mark.slow
def test_from_features_that_are_there():
    x = planted()
    fit = fit_snmf(x, 12, sparsity=4 / 39, max_iter=40)
    begun = fit_hierarchical_snmf(x, RANKS, start=fit.dictionary, sparsity=4 / 39, max_iter=40, refine_iter=0)
    torch.testing.assert_close(begun.dictionaries[0].features, fit.dictionary.features)
    refined = fit_hierarchical_snmf(x, RANKS, start=fit.dictionary, sparsity=4 / 39, max_iter=40)
    assert refined.history[-1] < refined.history[0] and refined.losses_before == begun.losses
    with pytest.raises(ValueError, match="start has 12 features over 39 neurons; the finest level needs 6 over 39"):
        fit_hierarchical_snmf(x, (6, 3), start=fit.dictionary)
    with pytest.raises(ValueError, match=r"start was fitted with l1=0\.1, not 0\.2"):
        fit_hierarchical_snmf(x, RANKS, start=fit.dictionary, l1=0.2)


def test_the_published_rule_at_every_level(tmp_path):
    options = {"sparsity": 4 / 39, "max_iter": 40, "refine_iter": 0}
    tree = fit_hierarchical_snmf(planted(), (12, 6), method="paper", **options)
    first = fit_snmf(planted(), 12, method="paper", sparsity=4 / 39, max_iter=40).dictionary
    cosines = tree.dictionaries[0].features @ first.features.T
    torch.testing.assert_close(cosines.amax(dim=1), torch.ones(12))
    tree.save(tmp_path)
    for dictionary in HierarchicalSNMF.load(tmp_path).dictionaries:
        assert dictionary.cfg.l1 == 0 and dictionary.cfg.metadata.method == "paper"
    assert fit_hierarchical_snmf(planted(), (6, 3), **options).dictionaries[0].cfg.metadata.method == "coordinate"


def test_bad_input():
    x = planted()
    for ranks in ((12,), (6, 6), (6, 12), ()):
        with pytest.raises(ValueError, match="ranks must be at least two numbers"):
            fit_hierarchical_snmf(x, ranks)
    with pytest.raises(ValueError, match="keeps no documents out"):
        fit_hierarchical_snmf(x, RANKS, held_out=0.1)
    with pytest.raises(ValueError, match=r"makes no passes, got max_passes=5\. Leave it out"):
        fit_hierarchical_snmf(x, RANKS, max_passes=5)
    with pytest.raises(ValueError, match=r"no L1 penalty, got l1=0\.1 with method='paper'"):
        fit_hierarchical_snmf(x, RANKS, method="paper", l1=0.1)
    with pytest.raises(ValueError, match="level must be one of"):
        fit_hierarchical_snmf(x, (4, 2), max_iter=2, refine_iter=0).trees(2)


# --- the mathematics ---


def test_links_step_reaches_the_optimum():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 5, generator=g).double(), torch.randn(4, 30, generator=g).double()
    p, s, c = a.T @ a, b @ b.T, torch.randn(5, 4, generator=g).double() * 20
    w = nonnegative_quadratic(torch.zeros(5, 4).double(), p, c, s, 3000)
    gradient = p @ w @ s - c
    assert float(gradient[w > 0].abs().max()) < 1e-6 and float(gradient[w == 0].min()) > -1e-6
    assert bool((w == 0).any()) and bool((w > 0).any())


def test_objective_by_hand():
    g = torch.Generator().manual_seed(0)
    x, codes = torch.randn(20, 7, generator=g), torch.rand(20, 4, generator=g)
    factors = DeepFactors(
        codes, [torch.randn(4, 7, generator=g), torch.randn(2, 7, generator=g)], [torch.rand(4, 2, generator=g)]
    )
    statistics = CodeStatistics.of(x, codes.T, l1=0.3)
    expected = 0.0
    for reached, features in ((codes, factors.features[0]), (codes @ factors.links[0], factors.features[1])):
        expected += float((x - reached @ features).square().sum())
        expected += 0.6 * float((x.norm(dim=1)[:, None] * reached * features.norm(dim=1)).sum())
    assert objective(factors, statistics) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("l1", [0.0, 0.1])
def test_no_step_raises_the_objective(l1):
    g = torch.Generator().manual_seed(1)
    x = planted(1)
    features = [torch.nn.functional.normalize(torch.randn(r, 39, generator=g), dim=1) for r in (8, 5, 2)]
    factors = DeepFactors(
        torch.rand(600, 8, generator=g), features, [torch.rand(8, 5, generator=g), torch.rand(5, 2, generator=g)]
    )
    refined, history = refine(x, factors, 39, l1, 25, 1e-9)
    assert len(history) > 10 and all(after <= before for before, after in zip(history, history[1:], strict=False))
    assert torch.equal(factors.features[0], features[0]), "what was given stays as it is"
    assert bool((refined.codes >= 0).all())
