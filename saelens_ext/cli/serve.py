"""``serve``: the live page."""
# ruff: noqa: RUF009  `place` and `field` make fields.

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field

from saelens_ext.cli import opening
from saelens_ext.cli.options import ReadingOptions
from saelens_ext.cli.output import Context, Result
from saelens_ext.cli.report import labels_of, lens_of
from saelens_ext.host.models import tokenizer_of
from saelens_ext.hub.contents import Contents
from saelens_ext.serve.live import LiveLimits, LiveModel
from saelens_ext.serve.served import Served
from saelens_ext.serve.server import LOOPBACK, PORT, address_of, check_installed, listen, make_server

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ServeOptions:
    """What to serve, and where."""

    dictionaries: Any = field(positional=True, nargs="+", type=str, metavar="FOLDER", default_factory=list)
    """Folders of saved dictionaries of one model, with their profiles and labels where they have some; or
    repo_id:sae_id on the Hub, or release:sae_id of SAELens.
    """
    model_name: str | None = None
    """Hugging Face name of the model, the folder of a saved one, or demo; by default the one the first was built on."""
    model_class_name: str | None = None
    """SAETransformerBridge or HookedTransformer."""
    device: str = "auto"
    """Where to compute: auto (CUDA where there is one, else MPS, else the CPU) or a device of torch."""
    port: int = PORT
    """Of the page; 0 takes any that is free."""
    host: str = LOOPBACK
    """Address to serve at. With any other than this one, whoever reaches it can read with the model."""
    max_tokens: int = 512
    """Tokens in a text, at most."""
    max_new_tokens: int = 200
    """Tokens in a continuation, at most."""
    labels: bool = True
    """Label latents by their contexts where no labels are saved beside a profile."""
    lens: bool = True
    """Show the tokens that directions promote."""


def serve(options: ServeOptions, context: Context) -> Result:
    """Serve the live page until it is interrupted."""
    check_installed()
    limits = LiveLimits(tokens=options.max_tokens, new_tokens=options.max_new_tokens)
    listening = listen(options.host, options.port)  # a port in use shows before a model is loaded
    with listening:
        live = open_live(options, limits)
        server = make_server(live, listening)
        address = address_of(listening)
        logger.info("The live page: %s (Ctrl-C ends it)", address)
        server.run(sockets=[listening])
    return Result(data={"address": address}, text=f"The live page at {address} was closed.")


def open_live(options: ServeOptions, limits: LiveLimits) -> LiveModel:
    """The model with the dictionaries."""
    opened = {name: opening.open_contents(name, options.device) for name in dict.fromkeys(options.dictionaries)}
    first_name, first = next(iter(opened.items()))
    sae = opening.only_dictionary(first, first_name)
    names = ("model_name", "model_class_name", "device")
    reading = ReadingOptions(dictionary=first_name, **{name: getattr(options, name) for name in names})
    model = opening.open_model(opening.reading_config(first, sae, reading))
    shown = _short_names(list(opened))
    return LiveModel(model, [_served(shown[name], name, one, model, options) for name, one in opened.items()], limits)


def _served(shown: str, name: str, contents: Contents, model: Any, options: ServeOptions) -> Served:
    sae = opening.attach(opening.only_dictionary(contents, name), model)
    profile = contents.profile
    if profile is None:
        logger.warning("%s has no profile, so no examples and no labels: saelens-ext profile %s", name, name)
        return Served(name=shown, sae=sae)
    labels = labels_of(Path(name), profile, tokenizer_of(model), contents, make=options.labels)
    lens = lens_of(model, sae) if options.lens else None
    return Served(name=shown, sae=sae, profile=profile, labels=labels, lens=lens)


def _short_names(names: list[str]) -> dict[str, str]:
    """The last parts of folders where these differ, else the whole."""
    last = [Path(name).name if Path(name).is_dir() else name for name in names]
    return {name: name if last.count(short) > 1 else short for name, short in zip(names, last)}
