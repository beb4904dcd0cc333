"""The config of a run: strict, whole through JSON, and readable on a command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import simple_parsing
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from saelens_ext.runner import (
    DictionaryRunnerConfig,
    ExemplarBuildConfig,
    ExemplarRunnerConfig,
    SNMFBuildConfig,
    SNMFRunnerConfig,
)

SAELENS_NAMES = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "dataset_path",
    "streaming",
    "context_size",
    "prepend_bos",
    "training_tokens",
    "store_batch_size_prompts",
    "seqpos_slice",
    "exclude_special_tokens",
    "n_checkpoints",
    "checkpoint_path",
    "resume_from_checkpoint",
    "output_path",
    "seed",
    "device",
    "dtype",
    "logger",
    "n_eval_batches",
    "eval_batch_size_prompts",
)


def parse(kind, *arguments):
    parser = simple_parsing.ArgumentParser(
        nested_mode=simple_parsing.NestedMode.WITHOUT_ROOT,
        argument_generation_mode=simple_parsing.ArgumentGenerationMode.NESTED,
        add_config_path_arg=False,
    )
    parser.add_arguments(kind, dest="config")
    return parser.parse_args(list(arguments)).config


def test_the_names_are_those_of_saelens():
    theirs, ours = LanguageModelSAERunnerConfig.__dataclass_fields__, DictionaryRunnerConfig.__dataclass_fields__
    for name in SAELENS_NAMES:
        assert name in theirs and name in ours, name


@pytest.mark.parametrize(
    "dictionary",
    [
        ExemplarBuildConfig(percentile=(1, 2.5), readout="one_hot"),
        SNMFBuildConfig(n_components=[5, 6], sparsity=[0.1, 1]),
        [ExemplarBuildConfig(threshold=0.4), SNMFBuildConfig(hook_name="b")],
    ],
)
def test_a_config_survives_json(dictionary, tmp_path):
    config = DictionaryRunnerConfig(
        hook_name=("a", "b"),
        dictionary=dictionary,
        seqpos_slice=(2, -1),
        exclude_special_tokens=[0, 1],
        model_from_pretrained_kwargs={"dtype": torch.bfloat16},
        logger=LoggingConfig(log_to_wandb=False, run_name="x"),
    )
    again = DictionaryRunnerConfig.from_json(config.to_json(tmp_path / "config.json"))
    assert again.to_dict() == config.to_dict() == json.loads(json.dumps(config.to_dict()))
    assert again.seqpos_slice == (2, -1) and again.model_from_pretrained_kwargs == {"dtype": "bfloat16"}
    assert [type(one) for one in again.dictionaries] == [type(one) for one in config.dictionaries]
    assert again.dictionary_names() == [
        (mine, hook, names)
        for mine, (_, hook, names) in zip([entry[0] for entry in again.dictionary_names()], config.dictionary_names())
    ]


def test_dictionaries_are_named_by_hook_and_setting():
    config = DictionaryRunnerConfig(
        hook_name=["a", "b"],
        dictionary=[
            ExemplarBuildConfig(percentile=[2, 0.5]),
            ExemplarBuildConfig(percentile=2, readout="one_hot", hook_name="a"),
            ExemplarBuildConfig(threshold=0.25, hook_name="b"),
            SNMFBuildConfig(n_components=7, sparsity=[0.1, 0.2], hook_name=["b"]),
        ],
    )
    assert [names for _, _, names in config.dictionary_names()] == [
        ["a_exemplars_p2", "a_exemplars_p0.5"],
        ["b_exemplars_p2", "b_exemplars_p0.5"],
        ["a_exemplars_p2_2"],
        ["b_exemplars_t0.25"],
        ["b_snmf_k7_s0.1", "b_snmf_k7_s0.2"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_name": ""}, "hook_name must name at least one hook"),
        ({"hook_name": ["a", "a"]}, "lists a hook twice"),
        ({"model_class_name": "HookedMamba"}, "model_class_name must be one of"),
        ({"dtype": "float23"}, "dtype must be one of .* Did you mean"),
        ({"training_tokens": 0}, "training_tokens must be a whole number of at least 1"),
        ({"n_checkpoints": -1}, "n_checkpoints must be at least 0"),
        ({"n_checkpoints": 2, "checkpoint_path": None}, "needs a checkpoint_path"),
        ({"dictionary": []}, "dictionary is an empty list"),
        (
            {"logger": LoggingConfig(log_optimizer_state_to_wandb=True)},
            "logger.log_optimizer_state_to_wandb must stay at False: there is no optimizer",
        ),
        ({"logger": LoggingConfig(eval_every_n_wandb_logs=7)}, "logger.eval_every_n_wandb_logs must stay at 100"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DictionaryRunnerConfig(**{"hook_name": "a"} | options)


def test_a_hook_of_a_dictionary_is_one_of_the_run():
    with pytest.raises(ValueError, match="dictionary.hook_name 'c' is not among the run's hooks, a, b"):
        DictionaryRunnerConfig(hook_name=["a", "b"], dictionary=ExemplarBuildConfig(hook_name="c"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ExemplarBuildConfig, {"percentile": 100}, r"percentile must lie in \(0, 100\), got 100"),
        (ExemplarBuildConfig, {"percentile": [2, 2.0]}, "all different"),
        (ExemplarBuildConfig, {"neighbour_factor": [1, -1]}, r"neighbour_factor must lie in \(0, inf\), got -1"),
        (
            ExemplarBuildConfig,
            {"threshold_rule": "nearest_neighbour", "calibration": "within_batch"},
            "got calibration='within_batch'",
        ),
        (ExemplarBuildConfig, {"threshold": 3}, "threshold must lie in"),
        (ExemplarBuildConfig, {"readout": "softmax"}, "readout must be one of"),
        (SNMFBuildConfig, {"sparsity": [0.1, 0]}, "sparsity must lie in"),
        (SNMFBuildConfig, {"n_components": [3, 0]}, "n_components must be a whole number"),
        (SNMFBuildConfig, {"held_out": 0.7}, "held_out, a fraction of the documents, must lie in"),
    ],
)
def test_options_of_dictionaries_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_unknown_keys_are_named():
    good = DictionaryRunnerConfig(hook_name="a").to_dict()
    with pytest.raises(ValueError, match="'context_sise'. Did you mean 'context_size'"):
        DictionaryRunnerConfig.from_dict(good | {"context_sise": 3})
    with pytest.raises(ValueError, match="'percentil'. Did you mean 'percentile'"):
        DictionaryRunnerConfig.from_dict(good | {"dictionary": {"architecture": "exemplar_partition", "percentil": 3}})
    with pytest.raises(ValueError, match="architecture must be one of 'exemplar_partition', 'snmf', got 'gated'"):
        DictionaryRunnerConfig.from_dict(good | {"dictionary": {"architecture": "gated"}})
    with pytest.raises(ValueError, match="logger does not know 'wandb_projct'"):
        DictionaryRunnerConfig.from_dict(good | {"logger": {"wandb_projct": "x"}})


def test_the_command_line():
    config = parse(
        ExemplarRunnerConfig,
        "--hook_name=x,y",
        "--dictionary.percentile=[1, 2.5]",
        "--dictionary.k=2",
        "--logger.log_to_wandb=True",
        "--seqpos_slice=5,-5",
        "--exclude_special_tokens=false",
        "--prepend_bos=true",
        '--model_from_pretrained_kwargs={"dtype": "bfloat16"}',
        "--checkpoint_path=none",
        "--streaming=false",
        "--dictionary.hook_name=y",
    )
    assert config.hook_names == ("x", "y") and config.dictionary.resolutions == (1.0, 2.5) and config.dictionary.k == 2
    assert config.logger.log_to_wandb and config.seqpos_slice == (5, -5) and config.exclude_special_tokens is False
    assert config.prepend_bos is True and config.model_from_pretrained_kwargs == {"dtype": "bfloat16"}
    assert config.checkpoint_path is None and config.streaming is False and config.dictionary.hook_name == "y"
    snmf = parse(
        SNMFRunnerConfig,
        "--hook_name=x",
        "--dictionary.n_components=5,10",
        "--dictionary.sparsity=0.1",
        "--exclude_special_tokens=0,2",
    )
    assert snmf.dictionary.setting_names == ["snmf_k5_s0.1", "snmf_k10_s0.1"] and snmf.exclude_special_tokens == [0, 2]
    rule = parse(SNMFRunnerConfig, "--hook_name=x", "--dictionary.method=paper", "--dictionary.max_iter=7").dictionary
    assert rule.setting_names == ["snmf_k100_s0.01_paper"] and rule.penalty == 0
    assert [(fit.method, fit.penalty, fit.max_iter) for _, fit in rule.settings(seed=1)] == [("paper", 0, 7)]
    assert parse(SNMFRunnerConfig, "--hook_name=x").dictionary.penalty == 0.1
    for wrong, message in (("l1=0.1", "no L1 penalty, got l1=0.1"), ("max_passes=5", "no passes over a stream")):
        with pytest.raises(ValueError, match=message):
            parse(SNMFRunnerConfig, "--hook_name=x", "--dictionary.method=paper", f"--dictionary.{wrong}")


@pytest.mark.parametrize("kind", [ExemplarRunnerConfig, SNMFRunnerConfig])
def test_help_explains_every_option(kind, capsys):
    with pytest.raises(SystemExit):
        parse(kind, "--help")
    shown = capsys.readouterr().out
    for name in kind.__dataclass_fields__:
        assert name in ("dictionary", "logger") or f"--{name} " in shown
    assert "Percentile or percentiles" in shown or "Number or numbers of features" in shown


def test_seeds_of_the_run_reach_the_fits():
    assert ExemplarBuildConfig().fit_config(7).seed == 7 and ExemplarBuildConfig(seed=3).fit_config(7).seed == 3
    assert [config.seed for _, config in SNMFBuildConfig(n_components=[2, 3]).settings(7)] == [7, 7]
    assert SNMFBuildConfig(seed=3).settings(7)[0][1].seed == 3


def test_a_config_takes_what_sweeps_and_notebooks_hold(tmp_path):
    given = DictionaryRunnerConfig(
        hook_name=np.array(["a", "b"]),
        dictionary=[
            ExemplarBuildConfig(percentile=np.array([5.0, 20.0]), threshold="null", seed="None", k=np.int64(2)),
            SNMFBuildConfig(n_components=torch.tensor([3, 4]), sparsity=np.float64(0.25), seed=7.0, hook_name="none"),
        ],
        model_name=tmp_path / "model",
        model_from_pretrained_kwargs={
            "dtype": torch.float16,
            "cache_dir": Path("q"),
            "max": [np.float32(0.5)],
            "m": {0: "1GB"},
        },
        training_tokens=np.int64(5000),
        eval_batch_size_prompts="None",
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        output_path=tmp_path,
        resume_from_checkpoint="null",
        exclude_special_tokens=torch.tensor([1, 2]),
        seqpos_slice=[None, np.int32(8)],
        logger=LoggingConfig(log_to_wandb=False, run_name="None", wandb_entity=Path("me")),
    )
    assert given.hook_names == ("a", "b") and given.model_name == str(tmp_path / "model")
    assert (given.device, given.dtype, given.torch_dtype) == ("cpu", "bfloat16", torch.bfloat16)
    assert given.eval_batch_size_prompts is None and given.resume_from_checkpoint is None
    assert given.exclude_special_tokens == [1, 2] and given.seqpos_slice == (None, 8)
    assert given.model_from_pretrained_kwargs == {"dtype": "float16", "cache_dir": "q", "max": [0.5], "m": {"0": "1GB"}}
    assert given.logger.run_name is None and given.logger.wandb_entity == "me"
    partitions, factors = given.dictionaries
    assert partitions.resolutions == (5.0, 20.0) and partitions.seed is None and type(partitions.k) is int
    assert factors.setting_names == ["snmf_k3_s0.25", "snmf_k4_s0.25"] and factors.hook_name is None
    assert json.loads(given.to_json(tmp_path / "config.json").read_text()) == given.to_dict()
    assert DictionaryRunnerConfig.from_json(tmp_path / "config.json").to_dict() == given.to_dict()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DictionaryRunnerConfig, {"training_tokens": None}, "training_tokens must be a whole number, got None"),
        (DictionaryRunnerConfig, {"training_tokens": "many"}, "training_tokens must be a whole number, got 'many'"),
        (DictionaryRunnerConfig, {"context_size": True}, "context_size must be a whole number, got True"),
        (DictionaryRunnerConfig, {"profile": "yes"}, "profile must be true or false, got 'yes'"),
        (DictionaryRunnerConfig, {"logger": {}}, "logger must be LoggingConfig"),
        (DictionaryRunnerConfig, {"logger": LoggingConfig(run_name=3)}, "logger.run_name must be a text or None"),
        (DictionaryRunnerConfig, {"dictionary": {"k": 3}}, "dictionary must be ExemplarBuildConfig or"),
        (
            DictionaryRunnerConfig,
            {"model_from_pretrained_kwargs": {"quantization_config": {"x": object()}}},
            r"model_from_pretrained_kwargs\['quantization_config'\]\['x'\] is <object .* cannot be written into a JSON",
        ),
        (
            DictionaryRunnerConfig,
            {"model_from_pretrained_kwargs": {"max_memory": {(0,): "1GB"}}},
            r"has the key \(0,\); keys",
        ),
        (ExemplarBuildConfig, {"percentile": [2, "x"]}, r"percentile\[1\] must be a finite number or a whole number"),
        (ExemplarBuildConfig, {"k": None}, "k must be a whole number, got None"),
        (SNMFBuildConfig, {"tol": float("nan")}, "tol must be a finite number or None, got nan"),
        (SNMFBuildConfig, {"n_components": 2.5}, "n_components must be a whole number or a list, got 2.5"),
    ],
)
def test_a_config_refuses_what_it_cannot_hold_and_names_the_field(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"hook_name": "a"} if kind is DictionaryRunnerConfig else {}) | options)


def test_the_logger_that_was_given_stays_as_it_is():
    logger = LoggingConfig(log_to_wandb=False, run_name="None")
    assert DictionaryRunnerConfig(hook_name="a", logger=logger).logger.run_name is None and logger.run_name == "None"
