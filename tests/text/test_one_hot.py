"""Task names to unit vectors, for hypernetworks trained without text."""

import pytest
import torch

from t2l_engine.text.config import OneHotConfig
from t2l_engine.text.encoder import OneHotEncoder


def test_one_hot():
    enc = OneHotEncoder(OneHotConfig(("a", "b", "c")))
    got = enc.encode(["c", "a", "c"])
    assert enc.embed_dim == 3 and got.dtype == torch.float32
    assert got.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts: expected at least one"),
        ("a", "texts: expected a list of strings, got str"),
        (["a", "Name a capital"], r"texts\[1\]: .* only the names of its 9 training tasks, such as .*'t0'.*; got 'Name a"),
        (["a", ["a"]], r"texts\[1\]"),
        ([0], r"texts\[0\]"),
    ],
)
def test_one_hot_knows_training_tasks_only(texts, message):
    enc = OneHotEncoder(OneHotConfig((*(f"t{i}" for i in range(8)), "a")))
    with pytest.raises(ValueError, match=message) as caught:
        enc.encode(texts)
    assert len(str(caught.value)) < 400
