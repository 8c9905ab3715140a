"""The tiny Llama that most of these tests put adapters on."""

import pytest
import torch

from t2l_engine import attach
from tests.lora.tiny_llama import NAMES


@pytest.fixture
def model(tiny_model, request):
    """Of two layers, or of as many as a test asks for."""
    return tiny_model("Llama", head_dim=32, num_hidden_layers=getattr(request, "param", 2))


@pytest.fixture
def stack(model, stack_for):
    """Three adapters."""
    return stack_for(model, NAMES)


@pytest.fixture
def handle(model, stack_for):
    """Four adapters on ``model``."""
    return attach(model, stack_for(model, NAMES, num_adapters=4))


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    """Inputs of models of one's own."""
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
