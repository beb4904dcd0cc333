"""Run SAEBench 0.6.0 on dictionaries of this package.

    python -m venv bench
    bench/bin/pip install torch==2.13.0
    bench/bin/pip install torch==2.13.0 'numpy<2' 'datasets>=3,<4' beartype==0.14.1 sae-lens==6.54.12
        transformer-lens==3.9.0 \\ 'pandas<3' 'pyarrow<26' collectibles matplotlib seaborn openai tabulate scikit-learn
        zstandard hf-transfer
    bench/bin/pip install --no-deps xgboost sae-probes==0.4.2 sae-bench==0.6.0 saelens-ext
    python tests/harnesses/prepare_inputs.py FOLDER                      # in the development environment
    bench/bin/python tests/harnesses/run_saebench.py FOLDER [EVALUATION ...]

(--no-deps: SAEBench asks for torchvision, which it does not use here.) Each evaluation writes its JSON under
FOLDER/results, and one line of figures is printed per dictionary.

The data are real texts with labels from the wheel of sae-probes, put into folders of the names that SAEBench asks for,
and cut to a few hundred: figures show that an evaluation runs, and are no benchmark.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.harnesses import faked_hub
from tests.harnesses.openai_stub import openai_stub
from tests.harnesses.prepare_inputs import REPO

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DICTIONARIES = ("exemplar_partition", "snmf", "topk")
ROWS = 400


# --- data ---


def labelled(name: str) -> Any:
    """One of the labelled datasets in the wheel of sae-probes, as a frame with columns prompt and target."""
    import pandas

    folder = Path(find_spec("sae_probes").origin).parent / "data" / "cleaned_data"
    return pandas.read_csv(folder / f"{name}.csv.zst", compression="zstd")


def positives(name: str, n: int = ROWS) -> list[str]:
    """The first ``n`` texts with label 1, cut to what a short context reads."""
    frame = labelled(name)
    return [text[:800] for text in frame[frame.target == 1].prompt[:n]]


def write_split(folder: Path, rows: Sequence[dict]) -> None:
    """Every third row for testing, the others for training."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", [r for i, r in enumerate(rows) if i % 3]), ("test", rows[::3])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)))


def write_data(folder: Path) -> None:
    """News by subject under the name of AG News; people's names by sex and office under that of Bias in Bios."""
    subjects = ["161_agnews_0", "162_agnews_1", "163_agnews_2", "140_news_class_Technology"]
    news = [{"text": text, "label": label} for label, name in enumerate(subjects) for text in positives(name)]
    write_split(folder / "fancyzhx" / "ag_news", news)
    people = labelled("5_hist_fig_ismale").merge(
        labelled("7_hist_fig_ispolitician"), on="prompt", suffixes=("_male", "_office")
    )
    rows = [
        {"hard_text": row.prompt, "profession": 21 if row.target_office else 13, "gender": 1 - int(row.target_male)}
        for row in people.itertuples()
    ]
    # TPP takes five classes balanced over the second attribute, which is void here.
    for profession, name in zip((0, 1, 2, 6, 9), [*subjects[:3], "159_code_Python", "158_code_C"], strict=True):
        rows += [
            {"hard_text": text, "profession": profession, "gender": i // 3 % 2}
            for i, text in enumerate(positives(name))
        ]
    write_split(folder / "LabHC" / "bias_in_bios", rows)


# --- evaluations ---


def selected() -> list[tuple[str, str]]:
    """What SAEBench calls (release, id): a hub repo and a folder in it."""
    return [(REPO, name) for name in DICTIONARIES]


def core(results: Path) -> None:
    from sae_bench.evals.core.main import multiple_evals

    multiple_evals(
        selected(),
        2,
        2,
        4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        context_size=64,
        output_folder=str(results),
        device="cpu",
        force_rerun=True,
    )


def sparse_probing(results: Path) -> None:
    from sae_bench.evals.sparse_probing.main import SparseProbingEvalConfig, run_eval

    config = SparseProbingEvalConfig(
        model_name=MODEL,
        dataset_names=["fancyzhx/ag_news"],
        probe_train_set_size=160,
        probe_test_set_size=80,
        context_length=32,
        llm_batch_size=16,
        llm_dtype="float32",
        k_values=[1, 2],
    )
    run_eval(config, selected(), "cpu", str(results), force_rerun=True, artifacts_path=str(results / "artifacts"))


def scr_or_tpp(results: Path, scr: bool) -> None:
    from sae_bench.evals.scr_and_tpp.main import ScrAndTppEvalConfig, run_eval

    name = "LabHC/bias_in_bios_class_set1"
    config = ScrAndTppEvalConfig(
        model_name=MODEL,
        dataset_names=[name],
        perform_scr=scr,
        train_set_size=200,
        test_set_size=80,
        context_length=32,
        llm_batch_size=16,
        llm_dtype="float32",
        n_values=[2, 10, 50],
        column1_vals_lookup={name: [("professor", "nurse")]},
    )
    run_eval(config, selected(), "cpu", str(results), force_rerun=True, artifacts_path=str(results / "artifacts"))


def scr(results: Path) -> None:
    scr_or_tpp(results, True)


def tpp(results: Path) -> None:
    scr_or_tpp(results, False)


def absorption(results: Path) -> None:
    from sae_bench.evals.absorption import common, feature_absorption
    from sae_bench.evals.absorption.main import AbsorptionEvalConfig, run_eval

    for module in (common, feature_absorption):
        module.get_alpha_tokens = a_few_of_each_letter(module.get_alpha_tokens)
    config = AbsorptionEvalConfig(
        model_name=MODEL,
        max_k_value=2,
        llm_batch_size=16,
        min_GT_probe_f1=0.0,
        min_feats_for_eval=3,
        k_sparse_probe_num_epochs=20,
        precalc_k_sparse_probe_sae_acts=True,
    )
    # It reads blocks.N.hook_resid_post whatever the dictionary's own hook is, so neurons are out.
    chosen = [pair for pair in selected() if pair[1] != "snmf"]
    results.mkdir(parents=True, exist_ok=True)
    run_eval(config, chosen, "cpu", str(results), force_rerun=True)


def a_few_of_each_letter(every: Callable[..., list[str]], n: int = 20) -> Callable[..., list[str]]:
    """The words that absorption asks about, fewer: all of the vocabulary takes hours on two cores, and no letter may
    be missing.
    """

    def few(*args: Any, **options: Any) -> list[str]:
        words = [word for word in every(*args, **options) if len(word) > 3]
        letters = {word.strip()[0].lower() for word in words}
        return [word for letter in sorted(letters) for word in [w for w in words if w.strip()[0].lower() == letter][:n]]

    return few


def autointerp(results: Path) -> None:
    from sae_bench.evals.autointerp.main import AutoInterpEvalConfig, run_eval

    config = AutoInterpEvalConfig(
        model_name=MODEL, n_latents=2, total_tokens=6_000, llm_context_size=64, llm_batch_size=16, llm_dtype="float32"
    )
    with openai_stub() as (url, requests):
        os.environ["OPENAI_BASE_URL"] = url
        run_eval(
            config,
            selected(),
            "cpu",
            "no key",
            str(results),
            force_rerun=True,
            artifacts_path=str(results / "artifacts"),
        )
    print(len(requests), "requests to the judge")


def sae_probes(results: Path) -> None:
    from sae_bench.evals.sparse_probing_sae_probes.main import SparseProbingSaeProbesEvalConfig, run_eval

    config = SparseProbingSaeProbesEvalConfig(
        model_name=MODEL,
        dataset_names=["119_us_state_TX"],
        ks=[1, 4],
        results_path=str(results / "probes"),
        model_cache_path=str(results / "activations"),
    )
    run_eval(config, selected(), "cpu", str(results), force_rerun=True)


def interventions(results: Path) -> None:
    """The parts of RAVEL and unlearning that touch a dictionary; their models and data are for larger machines."""
    import torch
    from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
    from sae_bench.evals.ravel.mdbm import MDBM
    from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    for release, name in selected():
        _, sae, _ = load_and_format_sae(release, name, "cpu")
        x = 30 * torch.randn(4, 6, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
        model = torch.nn.Linear(1, 1)
        model.device = torch.device("cpu")
        mask = MDBM(model, None, RAVELEvalConfig(model_name="gemma-2-2b", llm_batch_size=4), sae)
        hook = mask.create_intervention_hook(x[:, 2].clone(), torch.full((4,), 3), training_mode=True)
        changed, *_ = hook(model, (), (x.clone(),))
        changed.square().sum().backward()
        strongest = sae.encode(x).sum((0, 1)).topk(3).indices.tolist()
        clamped = anthropic_clamp_resid_SAE_features(x.clone(), None, sae, strongest, 20.0)
        print(
            json.dumps(
                {
                    "dictionary": name,
                    "mask gradient": float(mask.binary_mask.grad.norm()),
                    "clamped by": float((clamped - x).norm() / x.norm()),
                }
            )
        )


EVALUATIONS: dict[str, Callable[[Path], None]] = {
    "core": core,
    "sparse_probing": sparse_probing,
    "scr": scr,
    "tpp": tpp,
    "absorption": absorption,
    "autointerp": autointerp,
    "sae_probes": sae_probes,
    "interventions": interventions,
}


def figures(results: Path) -> None:
    """Print the metrics of each result file as one line of JSON."""
    for path in sorted(results.rglob("*_eval_results.json")):
        metrics = json.loads(path.read_text())["eval_result_metrics"]
        flat = {key: value for group in metrics.values() for key, value in group.items() if value not in (None, -1)}
        print(json.dumps({"file": path.name} | flat))


def main(folder: Path, names: Sequence[str]) -> None:
    """Run evaluations, all by default."""
    faked_hub.use_only(folder / "home")
    write_data(folder / "data")
    import saelens_ext  # noqa: F401 (registers the architectures)

    faked_hub.know_to_transformer_lens(MODEL)
    # A dataset name that is a folder here is read from it.
    os.chdir(folder / "data")
    for name in names or EVALUATIONS:
        print("==", name, flush=True)
        EVALUATIONS[name](folder / "results" / name)
        figures(folder / "results" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
