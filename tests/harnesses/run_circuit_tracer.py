"""Put SAELens transcoders into circuit-tracer 0.5.0, and read signatures out of the graph it makes.

    python -m venv tracer
    tracer/bin/pip install torch==2.13.0
    tracer/bin/pip install torch==2.13.0 'saelens-ext[test]'
    tracer/bin/pip install --no-deps circuit-tracer==0.5.0
    tracer/bin/python tests/harnesses/run_circuit_tracer.py FOLDER

(--no-deps: it asks for transformers 4 and nnsight; the TransformerLens backend runs without either.) A tiny random
model is enough: what is checked is that both forms of the graph's file are read, and give the graph's own effects.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def transcoder_of(sae, layer: int):
    """A SAELens transcoder (ReLU) as circuit-tracer's own: the same weights, its encoder turned on its side."""
    import torch
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    made = SingleLayerTranscoder(sae.cfg.d_in, sae.cfg.d_sae, torch.nn.functional.relu, layer, dtype=torch.float32)
    weights = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    made.load_state_dict({name: tensor.detach().contiguous() for name, tensor in weights.items()})
    return made


def main(folder: Path) -> None:
    """Attribute a short prompt; write, read and compare its graph."""
    import huggingface_hub.constants
    import torch

    # A switch that huggingface_hub 1 dropped; the package asks for an older one.
    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import TranscoderSet
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    from saelens_ext.continuations.attribution.circuit_tracer import read_circuit_graph, with_graph_signatures
    from saelens_ext.continuations.sample import score_continuations
    from tests import models_zoo

    torch.manual_seed(0)
    hosted = models_zoo.make_model("gpt2", "HookedSAETransformer")
    saes = []
    for _ in range(models_zoo.N_LAYERS):
        sae = Transcoder(
            TranscoderConfig(d_in=models_zoo.D_MODEL, d_out=models_zoo.D_MODEL, d_sae=48, apply_b_dec_to_input=False)
        )
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
            torch.nn.init.normal_(parameter, std=0.2)
        saes.append(sae)
    transcoders = TranscoderSet(
        {layer: transcoder_of(sae, layer) for layer, sae in enumerate(saes)},
        "ln2.hook_normalized",
        "hook_mlp_out",
        scan="ours",
    )
    model = TransformerLensReplacementModel(hosted.cfg, tokenizer=hosted.tokenizer)
    model.load_state_dict(hosted.state_dict())
    model._configure_replacement_model(transcoders)  # what its from_config does, which leaves no place to load weights
    prompt = hosted.to_tokens("if the condition")[0]
    graph = attribute(prompt, model, max_n_logits=4, batch_size=16, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    graph.to_pt(str(folder / "graph.pt"))
    read = read_circuit_graph(folder / "graph.pt")
    n_logits = len(graph.logit_targets)
    effects = graph.adjacency_matrix[-n_logits:, :-n_logits].cpu()
    found = score_continuations(hosted, "if the condition", [[token] for token in read.logit_tokens])
    signed = with_graph_signatures(found, read, tokenizer=hosted.tokenizer)
    print(
        json.dumps(
            {
                "sources": len(read.keys),
                "latents": sum(kind == "latent" for kind, *_ in read.keys),
                "tokens agree": read.token_ids == tuple(prompt.tolist()),
                "effects differ by": float((read.effects - effects).abs().max()),
                "signatures": list(signed.signatures.shape),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
