"""The commands: what each does, where its options are declared, and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command."""

    name: str
    summary: str
    """What it does, in a line."""
    example: str
    """A command line, without the program's name."""
    options: tuple[str, ...]
    """``module:class`` of the dataclasses that its options are made from, the first of which is the main one."""
    runs: str
    """``module:function`` of what it does with them."""
    kept: str = "Nothing was changed; the same command starts anew."
    """What Ctrl-C leaves, where the command does not know better."""
    note: str = ""
    """More to know, below the example."""
    takes_config: bool = False
    """Whether options may come from a file."""

    def option_classes(self) -> list[type]:
        """The dataclasses of its options."""
        return [_named(name) for name in self.options]

    def function(self) -> Callable[..., Any]:
        """What runs it."""
        return _named(self.runs)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module if "." in module else f"saelens_ext.cli.{module}"), attribute)


def _evidence(
    kind: str,
    summary: str,
    arguments: str,
    options: tuple[str, ...],
    *,
    more: tuple[str, ...] = (),
    kept: str = "Nothing was written.",
    module: str = "evidence",
) -> Command:
    """An evaluation, whose results all have the same options."""
    return Command(
        name=f"evidence {kind}",
        summary=summary,
        example=f"evidence {kind} {arguments}",
        options=(*(f"evidence_options:{name}" for name in (*options, "ResultOptions")), *more),
        runs=f"{module}:{kind}",
        kept=kept,
    )


_DEMO = (
    "Without a model hub, --model_name=demo is the packaged SmolLM2-135M-Instruct, "
    "--dataset_path=demo Python's own documentation."
)

_ALL = (
    Command(
        name="exemplars",
        summary="build ExemplarPartitions of a model's activations",
        example=(
            "exemplars --model_name=gpt2 --hook_name=blocks.6.hook_out "
            "--dataset_path=NeelNanda/pile-10k --dictionary.percentile=1,2,4"
        ),
        options=("saelens_ext.runner.config:ExemplarRunnerConfig",),
        runs="build:build",
        takes_config=True,
        note=_DEMO,
        kept="Nothing was finished; the same command starts anew.",
    ),
    Command(
        name="snmf",
        summary="build SNMFDictionaries of an MLP's neurons",
        example=(
            "snmf --model_name=gpt2 --hook_name=blocks.6.mlp.out.hook_in "
            "--dataset_path=NeelNanda/pile-10k --dictionary.n_components=100"
        ),
        options=("saelens_ext.runner.config:SNMFRunnerConfig",),
        runs="build:build",
        takes_config=True,
        note=_DEMO,
        kept="Nothing was finished; the same command starts anew.",
    ),
    Command(
        name="audit",
        summary="ask why a model continues a text in different ways, and test the answer by steering",
        example=(
            "audit --model_name=gpt2 --dictionaries=output/blocks.6.hook_out_exemplars_p2 "
            '--prefix="I think that" --output_path=my_audit'
        ),
        options=("audit_options:AuditInputs", "audit_options:AuditSettings"),
        runs="audit:audit",
        takes_config=True,
        note="Under a wandb agent each point of the sweep has a folder of its own below output_path, named by its run.",
    ),
    Command(
        name="profile",
        summary="find what the latents of a saved dictionary respond to, and put it beside the dictionary",
        example="profile output/blocks.6.hook_out_exemplars_p2 --training_tokens=200000",
        options=("options:ReadingOptions", "options:ProfileOptions"),
        runs="inspection:profile",
        kept="The dictionary's folder is as it was.",
    ),
    Command(
        name="report",
        summary="write an HTML report on a saved dictionary",
        example="report output/blocks.6.hook_out_exemplars_p2",
        options=("options:ReportOptions",),
        runs="report:report",
        kept="No report was written.",
    ),
    Command(
        name="serve",
        summary="serve a page on this machine where texts are read live and continued with latents steered",
        example="serve output/blocks.6.hook_out_exemplars_p2 --port=7860",
        options=("serve:ServeOptions",),
        runs="serve:serve",
        kept="The live page is closed; nothing was written.",
        note="It needs the extra serve: pip install 'saelens-ext[serve]'.",
    ),
    Command(
        name="eval",
        summary="evaluate a saved dictionary with SAELens' run_evals",
        example="eval output/blocks.6.hook_out_exemplars_p2 --n_eval_batches=20",
        options=("options:ReadingOptions", "options:EvalOptions"),
        runs="inspection:evaluate",
        kept="The dictionary's folder is as it was.",
    ),
    _evidence(
        "detection",
        "judge what a dictionary detects over many concepts, beside matched controls",
        "output/blocks.6.hook_out_exemplars_p2 --concepts=concepts.jsonl",
        ("EvidenceInputs", "ConceptInputs", "WorkInputs", "DetectionSettings"),
        module="evidence_concepts",
    ),
    _evidence(
        "probes",
        "probe for many concepts through a dictionary's codes, beside matched controls",
        "output/blocks.6.hook_out_exemplars_p2 --concepts=concepts.jsonl",
        ("EvidenceInputs", "ConceptInputs", "WorkInputs", "ProbeSettings"),
        module="evidence_concepts",
    ),
    _evidence(
        "novelty",
        "judge whether a partition finds unfamiliar text, beside as many random activations and other measures",
        "output/blocks.6.hook_out_exemplars_p2 --inside=held_out.txt --outside=code=code.txt",
        ("EvidenceInputs", "DocumentInputs", "NoveltySettings"),
    ),
    _evidence(
        "steering",
        "judge what a dictionary brings about when it steers, at matched divergence and beside controls",
        "output/blocks.6.hook_out_exemplars_p2 --concepts=concepts.jsonl --prompts=prompts.txt",
        ("EvidenceInputs", "ConceptChoice", "WorkInputs", "SteeringInputs", "SteeringSettings"),
        module="evidence_concepts",
    ),
    _evidence(
        "behaviour",
        "find the regions that hold a behaviour, and ablate them beside controls",
        "output/blocks.6.hook_out_exemplars_p2 --shows=harmful.txt --lacks=harmless.txt",
        ("EvidenceInputs", "BehaviourInputs", "BehaviourSettings"),
    ),
    _evidence(
        "clusters",
        "steer along joint clusters of many prefixes' continuations, beside controls that could be mistaken for them",
        "--model_name=gpt2 --dictionaries=output/blocks.6.hook_out_exemplars_p2 --prefixes=prefixes.txt",
        ("ClusterInputs", "ClusterSettings"),
        kept="Prefixes that were finished are in the output folder; the same command goes on from there.",
        more=("audit_options:GivenCells",),
        module="evidence_clusters",
    ),
    _evidence(
        "supernodes",
        "group latents that act together over prompts, and see whether the groups follow a name or its role",
        "--model_name=gpt2 --dictionaries=output/blocks.6.hook_out_exemplars_p2 --swaps=swaps.jsonl",
        ("SupernodeInputs", "SupernodeSettings"),
        kept="Prompts that were finished are in the output folder; the same command goes on from there.",
        more=("audit_options:Attributed",),
        module="evidence_clusters",
    ),
    _evidence(
        "stability",
        "look for the directions of a dictionary in its replicas, beside replicas turned at random",
        "seed0/blocks.6.hook_out_exemplars_p2 --compare=seed1/blocks.6.hook_out_exemplars_p2",
        ("ReplicaInputs", "StabilitySettings"),
    ),
    _evidence(
        "checkpoints",
        "tell what training changed in a dictionary, by replicas of two models' dictionaries",
        "base_seed0 --compare=base_seed1 --second=tuned_seed0 --second=tuned_seed1",
        ("ReplicaInputs", "OtherModelInputs", "CheckpointSettings"),
    ),
    _evidence(
        "overlap",
        "compare dictionaries by the tokens on which their latents are strongest, beside shifted tokens",
        "output/blocks.6.hook_out_exemplars_p2 --compare=my_sae",
        ("EvidenceInputs", "OverlapSettings"),
    ),
    _evidence(
        "decompose",
        "write a dictionary's directions as sums of a few of another's, beside bases turned at random",
        "output/blocks.6.hook_out_exemplars_p10 --basis=output/blocks.6.hook_out_exemplars_p2",
        ("TargetInputs", "DecompositionSettings"),
    ),
    _evidence(
        "nesting",
        "find where the regions of partitions go in coarser ones, beside regions around random activations",
        "output/blocks.6.hook_out_exemplars_p2 --compare=output/blocks.6.hook_out_exemplars_p10",
        ("EvidenceInputs", "NestingSettings"),
    ),
    _evidence(
        "models",
        "compare two models by the regions of their activations on the same texts: which training added or took away",
        "base_model tuned_model --hook_name=blocks.6.hook_out --dataset_path=texts.jsonl",
        ("ModelInputs", "ModelSettings"),
    ),
    _evidence(
        "synthetic",
        "compare dictionaries with the known features of SAELens' synthetic models",
        "--n_seeds=10",
        ("SyntheticSettings",),
    ),
    Command(
        name="match",
        summary="find which directions two dictionaries share, and how many chance would explain",
        example="match output/base_exemplars_p2 output/instruct_exemplars_p2 --csv=matched.csv",
        options=("options:MatchOptions",),
        runs="inspection:match",
        kept="Nothing was written.",
    ),
    Command(
        name="export",
        summary="write a latent's direction as a control vector for llama.cpp or repeng",
        example="export my_partition --latent=3 --output_path=latent_3.gguf",
        options=("options:ReadingOptions", "export:ExportOptions"),
        runs="export:export",
    ),
    Command(
        name="neuronpedia",
        summary="upload a profiled dictionary and its labels to Neuronpedia",
        example="neuronpedia my_partition --model_id=gpt2-small --source=6-res-ep --dry_run=batches",
        options=("options:ReadingOptions", "export:NeuronpediaOptions"),
        runs="export:neuronpedia",
        kept="What arrived is noted in the folder; the same command sends the rest.",
    ),
    Command(
        name="convert",
        summary="convert a published exemplar partition (a pickle, read without running it)",
        example="convert gemma-2-2b_L12_p10 my_partition",
        options=("options:ConvertOptions",),
        runs="share:convert",
        kept="Nothing was written; what was downloaded is in the cache and is not fetched again.",
    ),
    Command(
        name="push",
        summary="put a saved dictionary on the Hugging Face Hub",
        example="push output/blocks.6.hook_out_exemplars_p2 my-name/my-dictionaries blocks.6.hook_out/p2",
        options=("options:PushOptions",),
        runs="share:push",
        kept="Files are published all together or not at all; push again, and what had arrived is not sent twice.",
    ),
    Command(
        name="pull",
        summary="copy a dictionary from the Hugging Face Hub into a folder",
        example="pull my-name/my-dictionaries blocks.6.hook_out/p2 my_partition",
        options=("options:PullOptions",),
        runs="share:pull",
        kept="The folder is as it was; what had arrived is in the cache, and the same command goes on from there.",
    ),
    Command(
        name="list",
        summary="list the dictionaries of a repository on the Hugging Face Hub",
        example="list my-name/my-dictionaries",
        options=("options:ListOptions",),
        runs="share:listed",
    ),
    Command(
        name="demo",
        summary="build, inspect, evaluate and steer with dictionaries of a packaged model, without a hub",
        example="demo --output_path=demo_output",
        options=("options:DemoOptions",),
        runs="share:demo",
        kept="Dictionaries that were finished are in the output folder.",
    ),
)

COMMANDS = {command.name: command for command in _ALL}
