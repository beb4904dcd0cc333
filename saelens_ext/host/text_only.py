"""Models of images and text, loaded for their text, without torchvision.

TransformerLens wants torchvision for the processor of images. Some bridges (Qwen's and GLM's) refuse to be made without
it. Elsewhere, where a processor does not load and torchvision cannot be imported, ``pip install torchvision`` is run
without a word, and pip may put another torch in the place of the one that is installed, while it runs.
"""

import logging
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

_IMAGES = "torchvision"

logger = logging.getLogger(__name__)


@contextmanager
def text_only() -> Iterator[None]:
    """Within it torchvision is neither wanted nor installed; the bridge may then have no processor of images."""
    check_call: Any = subprocess.check_call
    check_libraries: Any = ArchitectureAdapter._check_required_libraries

    def refuse(command: str | Sequence[str], *rest: Any, **options: Any) -> int:
        if "install" in command and _IMAGES in command:
            logger.info("No processor of images was loaded. It may need %s, which is not installed.", _IMAGES)
            raise subprocess.CalledProcessError(1, command)  # as the host is prepared for
        return check_call(command, *rest, **options)

    def check_others(self: ArchitectureAdapter) -> None:
        self.required_libraries = [name for name in self.required_libraries if name != _IMAGES]
        check_libraries(self)

    subprocess.check_call, ArchitectureAdapter._check_required_libraries = refuse, check_others
    try:
        yield
    finally:
        subprocess.check_call, ArchitectureAdapter._check_required_libraries = check_call, check_libraries
