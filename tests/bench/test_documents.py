"""The suite ``documents``: what is counted, what is verified before it is timed, what memory a way takes."""

import dataclasses

import pytest
import torch

from bench.harness import OURS, Context, VerificationError
from bench.suites import documents
from bench.suites.documents import TOKENS
from t2l_engine.hypernetwork import perceiver
from tests import networks
from tests.networks import PERCEIVER, TINY_PERCEIVER

CONTEXT = dataclasses.replace(Context.of("tiny", 1), rounds=(2, 2), seconds=0.0)


def test_flops_are_those_of_every_product_once():
    f, d, rows, queries = (
        PERCEIVER.feature_size,
        PERCEIVER.latent_size,
        PERCEIVER.num_layers * TOKENS,
        PERCEIVER.num_layers * 8,
    )
    attended, latents = 2 * 512, 2 * d * 2048 + 12 * d * d  # columns of keys and values; weights that latents pass
    cross = 9 * (2 * rows * d * attended + 2 * queries * latents + 4 * rows * 8 * 2048)
    decoder = 2 * queries * (d * attended + latents) + 4 * queries * 8 * 2048
    mlp, head = 16 * queries * d * d, 2 * queries * d * (9216 + 2304)
    assert documents.flops(PERCEIVER) == 2 * rows * (8 * f * f + 4 * f * d) + cross + decoder + mlp + head


@pytest.mark.parametrize("count", [1, 8])
def test_generation_is_beside_eager_torch(monkeypatch, count):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(networks, "PERCEIVER", TINY_PERCEIVER)  # at size tiny nothing is compiled
    (row,) = documents.generation(dataclasses.replace(CONTEXT, size="full"), count)
    assert row["times"].keys() == {OURS, "eager", documents.COMPILED} and not row["skipped"]
    assert row["error"]["value"] <= row["error"]["bound"] and row["roofline"]["flops"] == count * documents.flops(
        TINY_PERCEIVER
    )


def test_a_wrong_adapter_is_not_timed(monkeypatch):
    monkeypatch.setattr(perceiver, "RMS_EPS", 1.0)
    with pytest.raises(VerificationError, match="tiny bfloat16, 1 context of 256 tokens: error"):
        list(documents.generation(CONTEXT, 1))


@pytest.mark.slow
def test_rows_are_beside_repeated_and_batched_products():
    row, memory = documents.applying(CONTEXT)
    assert row["times"].keys() == {OURS, "reference", "mm loop", "gather bmm", "batched"} == memory["mib"].keys()
    assert row["shape"]["tokens"] == 512 and row["shape"]["rank"] == 24
