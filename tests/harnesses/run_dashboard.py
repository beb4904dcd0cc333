"""Make pages with sae-dashboard 0.8.0 for dictionaries of this package.

    python -m venv board
    board/bin/pip install torch==2.13.0
    board/bin/pip install torch==2.13.0 sae-lens==6.54.12 'transformer-lens>=3,<4' 'datasets>=3,<4' 'jaxtyping>=0.3' \\
        'dataclasses-json<0.7' eindex-callum matplotlib hf-transfer scikit-learn pandas jinja2
    board/bin/pip install --no-deps sae-dashboard==0.8.0 saelens-ext
    python tests/harnesses/prepare_inputs.py FOLDER                      # in the development environment
    board/bin/python tests/harnesses/run_dashboard.py FOLDER

(--no-deps: it asks for torchvision through decode-clt, which only its cross-layer transcoders use, and for
TransformerLens 2, which this package does not take.) The pages are FOLDER/results/dashboard/NAME.html.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.harnesses import faked_hub
from tests.harnesses.prepare_inputs import REPO

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LATENTS = 6
REACH = 5  # tokens at either end of a sequence that sae-dashboard does not centre an example on


def main(folder: Path) -> None:
    """Write a page per dictionary, of its most active latents."""
    faked_hub.use_only(folder / "home")
    import torch
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer

    import saelens_ext  # noqa: F401 (registers the architectures)

    faked_hub.know_to_transformer_lens(MODEL)
    model = HookedSAETransformer.from_pretrained_no_processing(MODEL, device="cpu")
    lines = (folder / "data/Skylion007/openwebtext/train.jsonl").read_text().splitlines()[:32]
    tokens = torch.stack([model.to_tokens(json.loads(line)["text"])[0, :48] for line in lines])
    results = folder / "results" / "dashboard"
    results.mkdir(parents=True, exist_ok=True)
    for name in ("exemplar_partition", "snmf", "topk"):
        sae = SAE.from_pretrained(REPO, name)
        hook = sae.cfg.metadata.hook_name
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
        with torch.no_grad():
            codes = sae.encode(cache[hook])[:, REACH:-REACH]
        latents = codes.sum((0, 1)).topk(LATENTS).indices.tolist()
        config = SaeVisConfig(
            hook_point=hook, features=latents, minibatch_size_tokens=16, device="cpu", dtype="float32"
        )
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        page = results / f"{name}.html"
        save_feature_centric_vis(sae_vis_data=data, filename=page)
        print(
            json.dumps(
                {"dictionary": name, "latents": latents, "kilobytes": page.stat().st_size // 1024}
                | agreement(data, codes)
            )
        )


def agreement(data, codes) -> dict[str, float]:
    """How far, as a fraction, the dictionary's own largest activation of a latent is from the nearest that a page
    shows.
    """
    worst = 0.0
    for latent, shown in data.feature_data_dict.items():
        sequences = [s for group in shown.sequence_data.seq_group_data for s in group.seq_data]
        largest = float(codes[..., latent].max())
        worst = max(worst, min(abs(value / largest - 1) for s in sequences for value in s.feat_acts))
    return {"largest activation off by": worst}


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
