"""The progress bars of libraries."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

_SWITCHES = (
    (datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
    (are_progress_bars_disabled, disable_progress_bars, enable_progress_bars),
    (
        lambda: not transformers_logging.is_progress_bar_enabled(),
        transformers_logging.disable_progress_bar,
        transformers_logging.enable_progress_bar,
    ),
)


@contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Within it, bars for loading and downloading are shown only where they are wanted."""
    undo = []
    if not wanted:
        for is_off, switch_off, switch_on in _SWITCHES:
            if not is_off():
                switch_off()
                undo.append(switch_on)
    try:
        yield
    finally:
        for switch_on in undo:
            switch_on()
