"""A tiny model with a labelled partition and a dictionary of neurons, read and steered live, and its server."""

import os
import sys
from threading import Thread

import pytest

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.labels import label_latents
from saelens_ext.analysis.logit_lens import logit_lens
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.host.models import retarget
from saelens_ext.serve.live import LiveLimits, LiveModel
from saelens_ext.serve.served import Served
from saelens_ext.serve.server import address_of, listen, make_server
from tests import models_zoo
from tests.continuations._dictionaries import make

HOOK = "blocks.1.hook_resid_post"


def make_live(model, texts, **limits):
    """A partition with all that can lie beside it, and an SAE of an MLP's neurons with nothing."""
    stream = ActivationStream(model, texts * 2, HOOK, context_size=16, max_tokens=300)
    partition = fit_exemplar_partition(stream, percentile=20, calibration_activations=200).dictionary
    profile = profile_dictionary(partition, stream, n_random=3)
    labels = label_latents(profile, model.tokenizer)
    lens = logit_lens(model, partition.W_dec)
    neurons = retarget(make("topk", "blocks.0.mlp.hook_post", models_zoo.D_MLP["llama"], k=3), model)
    served = [
        Served(name="regions", sae=partition, profile=profile, labels=labels, lens=lens),
        Served(name="neurons", sae=neurons),
    ]
    return LiveModel(model, served, LiveLimits(**limits))


@pytest.fixture(scope="package")
def model():
    tokenizer = models_zoo.make_tokenizer()
    tokenizer.chat_template = models_zoo.CHAT_TEMPLATE_WITHOUT_BOS
    return models_zoo.make_model("llama", "SAETransformerBridge", tokenizer)


@pytest.fixture(scope="package")
def live(model, tiny_texts):
    return make_live(model, tiny_texts)


@pytest.fixture(scope="package")
def address(live):
    """Where the page of ``live`` is served."""
    with listen(port=0) as listening:
        server = make_server(live, listening, "A <b>tiny</b> model")
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield address_of(listening)
        server.should_exit = True
        thread.join()


_LISTENERS: list[list[str]] = []


def _note_writing(event, arguments):
    if event == "open" and _LISTENERS and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            _LISTENERS[-1].append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="session")
def _audited():
    sys.addaudithook(_note_writing)  # stays until the process ends


@pytest.fixture
def opened_for_writing(_audited):
    """Paths that this process has opened for writing since the test began."""
    _LISTENERS.append([])
    yield _LISTENERS[-1]
    _LISTENERS.pop()
