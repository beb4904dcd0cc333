"""A model where a dictionary belongs, the other way round, and other types than asked for, are errors that say so.

In a process of its own, since the tests' own type checks would come first: run as a script, this makes all calls.
"""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saelens_ext as sx
from saelens_ext.continuations.attribution.attribute import attribution_completeness
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.evals.novelty.novelty import named_partitions
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model

HOOK = "blocks.1.hook_resid_post"
CONCEPT = sx.Concept(name="one", positives=[*"abcdef"], negatives=[*"uvwxyz"])

# What is called with a model and a dictionary, in this order, and a set of continuations.
SWAPPED = {
    "attribute_continuations": lambda m, d, found: sx.attribute_continuations(m, d, found),
    "attribute_continuations, a list": lambda m, d, found: sx.attribute_continuations(m, [d], found),
    "attribution_completeness": lambda m, d, found: attribution_completeness(m, d, found),
    "clamp_latent": lambda m, d, found: sx.clamp_latent(m, d, 1, 1.0),
    "evaluate_probes": lambda m, d, found: sx.evaluate_probes(m, {"one": d}, [CONCEPT]),
    "latent_directions": lambda m, d, found: sx.latent_directions(m, d, 1),
    "localise_behaviour": lambda m, d, found: sx.localise_behaviour(m, d, None, None),
    "residual_directions": lambda m, d, found: sx.residual_directions(m, d),
    "retarget": lambda m, d, found: sx.retarget(d, m),
    "scale_latent": lambda m, d, found: sx.scale_latent(m, d, 1, 1.0),
    "steer_continuations": lambda m, d, found: sx.steer_continuations(m, d, found, "positive"),
    "validate_clusters": lambda m, d, found: validate_clusters(m, d, found, [0, 1]),
}
BY_NAME = r"at least one dictionary by its name, \{'name': sae\}, got "
SPAN = "span must be a pair of whole numbers or None, as .*got "
# Other wrong types, and what is said of them.
OTHERS = {
    "one dictionary": (lambda m, d, found: sx.evaluate_probes(m, d, [CONCEPT]), BY_NAME + "a TopKSAE"),
    "a list": (lambda m, d, found: sx.evaluate_probes(m, [d], [CONCEPT]), BY_NAME + "a list"),
    "no dictionary": (lambda m, d, found: sx.evaluate_probes(m, {}, [CONCEPT]), BY_NAME + "none"),
    "one to overlap": (lambda m, d, found: sx.overlap_by_tokens(d, None), BY_NAME + "a TopKSAE"),
    "novelty of a model": (
        lambda m, d, found: named_partitions(m),
        "partitions must be a SAE or transcoder .*a SAETransformerBridge",
    ),
    "no tensor": (
        lambda m, d, found: sx.steer_features(m, HOOK, d, prompt="The"),
        r"directions must be a tensor of shape \(m, d\), got a TopKSAE",
    ),
    "nested lists": (
        lambda m, d, found: sx.residual_directions(m, [[1.0]], layer=1),
        "features must be a SAE or transcoder of SAELens.*got a list",
    ),
    "after": (lambda m, d, found: sx.mark_answers(m, found, after=3), "after must be a text, got 3"),
    **{
        f"span {span}": (lambda m, d, found, span=span: sx.mark_answers(m, found, span=span), SPAN)
        for span in (3, (1,), (0, 1, 2), "ab", (0.5, 2), ("a", "b"), slice(0, 2))
    },
}


def said() -> dict[str, str]:
    """What each call raises, as ``type: message``; with a model and a dictionary swapped, and with a folder's name."""
    model, sae = make_model("llama", "SAETransformerBridge"), make("topk", HOOK, k=3)
    found = sx.score_continuations(model, "The assert statement", [[70, 9, 44], [8, 5, 6]])
    calls = {f"{name}, swapped": (call, sae, model) for name, call in SWAPPED.items()}
    calls |= {f"{name}, a folder": (call, model, "a folder") for name, call in SWAPPED.items()}
    calls |= {name: (call, model, sae) for name, (call, _) in OTHERS.items()}
    raised = {}
    for name, (call, *given) in calls.items():
        try:
            call(*given, found)
            raised[name] = "nothing"
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
    return raised


@pytest.fixture(scope="module")
def raised():
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_swapped_arguments"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SWAPPED)
def test_a_model_and_a_dictionary_that_are_swapped(name, raised):
    says = "ValueError: .*(model must be a Hooked.* got a TopKSAE|got a SAETransformerBridge; are the model and the)"
    assert re.match(says, raised[f"{name}, swapped"])
    folder = r"ValueError: .* must be a SAE or transcoder of SAELens, .*'a folder'.* SAE.load_from_disk\(folder\)"
    assert re.match(folder, raised[f"{name}, a folder"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_wrong_types(name, raised):
    assert re.match("ValueError: .*" + OTHERS[name][1], raised[name])


def test_every_public_function_of_a_model_and_a_dictionary_is_tried():
    """But those whose dictionaries are loaded with the model, which are checked as they are."""
    taking = set()
    for name in sx.__all__:
        if inspect.isfunction(found := getattr(sx, name)):
            given = set(inspect.signature(found).parameters)
            taking |= (
                {name} if "model" in given and given & {"sae", "dictionary", "dictionaries", "features"} else set()
            )
    loading = {name for name in taking if name.startswith(("audit_", "evaluate_"))} - {"evaluate_probes"}
    assert taking - loading - {name.split(",")[0] for name in SWAPPED} == {"steer_features"}


if __name__ == "__main__":
    print(json.dumps(said()))
