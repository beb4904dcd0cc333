"""Train a SAELens SAE, with SAELens' own trainer, on the activations that another dictionary was fitted to.

A comparison of dictionaries says something only at one site and on one set of activations.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.ops.modes import standard_modes

_DEFAULT_K = 32


class SAETrainingOptions(TypedDict, total=False):
    """Fields of SAELens' training configs; which of them there are depends on the architecture."""

    dtype: str
    apply_b_dec_to_input: bool
    normalize_activations: str
    decoder_init_norm: float | None
    l1_coefficient: float
    l1_warm_up_steps: int
    lp_norm: float
    k: int
    aux_loss_coefficient: float
    rescale_acts_by_decoder_norm: bool
    use_sparse_activations: bool
    topk_threshold_lr: float
    matryoshka_widths: list[int]
    use_matryoshka_aux_loss: bool
    l0_coefficient: float
    l0_warm_up_steps: int
    pre_act_loss_coefficient: float | None
    target_l0: float | None
    jumprelu_init_threshold: float
    jumprelu_bandwidth: float
    jumprelu_sparsity_loss_mode: str
    jumprelu_tanh_scale: float
    jumprelu_ste_to_input: bool
    residual_threshold: float
    max_iterations: int | None
    stop_on_duplicate_support: bool


@_checks.names_options()
@standard_modes()
def fit_sae(
    source: ActivationStream | Tensor,
    d_sae: int,
    *,
    architecture: str = "topk",
    hook_name: str | None = None,
    document_ids: Tensor | None = None,
    training_samples: int = 200_000,
    batch_size: int = 1024,
    lr: float | int = 1e-3,
    held_out: float | int = 0.0,
    memory_limit: int = 4 * 2**30,
    seed: int = 0,
    **sae_options: Unpack[SAETrainingOptions],
) -> SAE[Any]:
    """Train a SAE on activations held in memory, which are gone through in random order as often as needed.

    Activations are scaled to SAELens' expected norm while training, and the scale is folded into the weights at the
    end. SAELens' trainer shows its progress bar.

    Args:
        source: a stream over one hook, or activations ``(n, d)``; as for
            :func:`~saelens_ext.dictionaries.fit_snmf.fit_snmf`.
        d_sae: number of latents.
        architecture: any that SAELens trains, such as "standard", "topk", "batchtopk" or "jumprelu". Some need options
            of their own ("matryoshka_batchtopk" its widths).
        hook_name: where a matrix was read; kept in the metadata.
        document_ids: the document of each row of a matrix, integers ``(n,)``, which ``held_out`` needs.
        training_samples: activations to train on, repeats included.
        batch_size: activations per step.
        lr: Adam's learning rate.
        held_out: share of the documents kept out, in [0, 0.5]; the same documents as a fit with the same share keeps
            out.
        memory_limit: bytes of activations (as float32) that may be held.
        seed: of the initial weights and the order.
        **sae_options: fields of SAELens' training config of that architecture, by default as there; ``k`` is 32.

    Returns:
        The SAE for inference, in evaluation mode, with its metadata.

    Raises:
        ValueError: an unknown architecture or option, activations that exceed ``memory_limit``, fewer than one batch of
            ``training_samples``.
    """
    _checks.choice(architecture, tuple(SAE_TRAINING_CLASS_REGISTRY), "architecture")
    _checks.positive(d_sae, "d_sae")
    if _checks.positive(training_samples, "training_samples") < _checks.positive(batch_size, "batch_size"):
        raise ValueError(f"training_samples must be at least one batch of {batch_size}, got {training_samples}.")
    given = ActivationSource.of(source, hook_name, held_out, document_ids=document_ids)
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    known = [
        name
        for name in config_class.__dataclass_fields__
        if name not in ("d_in", "d_sae", "metadata", "device", "reshape_activations")
    ]
    _checks.known_keys(sae_options, known, f"SAELens' config of {architecture!r}")
    options: dict[str, Any] = {"normalize_activations": "expected_average_only_in", "dtype": "float32", **sae_options}
    if "k" in known and not 1 <= options.setdefault("k", min(_DEFAULT_K, d_sae)) <= d_sae:
        raise ValueError(f"k must lie between 1 and d_sae={d_sae}, got {options['k']!r}.")
    x = given.in_memory(memory_limit)
    if x is None:
        raise ValueError(
            f"The activations take more than memory_limit={memory_limit} bytes. Lower the stream's max_tokens, raise "
            "memory_limit, or train with SAELens' own runner, which streams."
        )
    config = config_class(
        d_in=x.shape[1],
        d_sae=d_sae,
        device=str(x.device),
        metadata=SAEMetadata(**given.metadata(), n_seen=len(x)),
        **options,
    )
    # SAELens draws the initial weights from the global generator, which is the user's.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        torch.manual_seed(seed)
        training_sae = sae_class(config)
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=training_samples,
                train_batch_size_samples=batch_size,
                lr=float(lr),
                lr_end=float(lr) / 10,
                device=str(x.device),
                logger=LoggingConfig(log_to_wandb=False),
                n_batches_for_norm_estimate=max(1, min(100, len(x) // batch_size)),
            ),
            sae=training_sae,
            data_provider=_shuffled(x.float(), batch_size, torch.Generator().manual_seed(seed)),
        )
        trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        training_sae.save_inference_model(folder)
        sae = SAE.load_from_disk(folder, device=str(x.device)).eval()
    if given.reshaping == "hook_z":
        # It was trained on joined heads; on the model it will be given them apart.
        sae.cfg.reshape_activations = "hook_z"
        sae.turn_on_forward_pass_hook_z_reshaping()
    return sae


def _shuffled(x: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches in random order, each activation once a round (some twice if it ends within a batch)."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat((left, torch.randperm(len(x), generator=generator)))
        chosen, left = left[:batch_size], left[batch_size:]
        yield x[chosen.to(x.device)]
