"""Steps of the GPU suite for tests."""

import pytest
import torch
from card import Card

from bench.gpu.context import Context, Part
from bench.gpu.timing import Dry


@pytest.fixture
def context(tmp_path):
    """A dry step; small products on one thread, which does not wait for others."""
    with_one = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Context(Dry(), Part(tmp_path / "part.json"), 3600.0)
    torch.set_num_threads(with_one)


@pytest.fixture
def on_card(tmp_path):
    """A step that believes to be on a card."""
    return Context(Card(), Part(tmp_path / "card.json"), 3600.0)
