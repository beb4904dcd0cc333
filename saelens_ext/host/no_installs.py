"""TransformerLens kept from installing packages.

Where a multimodal model's processor does not load and torchvision cannot be imported, it runs ``pip install
torchvision`` without a word. Pip may then put another torch in the place of the one that is installed, while it runs.
"""

import logging
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Within it, that command fails, as the host is prepared for: the bridge then has no processor of images."""
    check_call: Any = subprocess.check_call

    def refuse(command: str | Sequence[str], *rest: Any, **options: Any) -> int:
        if "install" in command and "torchvision" in command:
            logger.info("No processor of images was loaded. It may need torchvision, which is not installed.")
            raise subprocess.CalledProcessError(1, command)
        return check_call(command, *rest, **options)

    subprocess.check_call = refuse
    try:
        yield
    finally:
        subprocess.check_call = check_call
