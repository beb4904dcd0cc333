"""One model of every architecture in every host class, shared by the laws, which leave it as they find it."""

import pytest
import torch

from tests.architectures._hosts import Host, shared_model
from tests.models_zoo import HOSTED, ZOO


@pytest.fixture(scope="session", params=HOSTED, ids=lambda pair: f"{pair[0]}-{pair[1][:6]}")
def host(request) -> Host:
    architecture, model_class = request.param
    return Host(architecture, ZOO[architecture], shared_model(architecture, model_class))


@pytest.fixture(autouse=True)
def _nothing_stays(request):
    """Every law leaves the model without hooks and dictionaries, and as it computed before."""
    yield
    if "host" in request.fixturenames:
        model = request.getfixturevalue("host").model
        assert not model.acts_to_saes
        assert not any(getattr(point, "fwd_hooks", ()) for point in model.hook_dict.values()), "a hook stayed"
        assert torch.is_grad_enabled() and all(parameter.requires_grad for parameter in model.parameters())
