"""CUDA graphs, captured once and replayed over other data, and streams.

Every comparison is of bits: a replay, and a call on another stream, run the same kernels in the same order as an eager call.
"""

import pytest
import torch

from t2l_engine import attach, ops
from tests.cuda.operands import ADAPTERS, apply, operands
from tests.networks import SHAPES, HyperShape

#: Cycles that a stream is kept busy for: some 20 ms.
BUSY = 40_000_000
TINY = HyperShape("tiny", 2, 32, 32, 16, embed_dim=24, latent_size=16, head_in_size=24)


def ids(*chosen):
    def change(arguments):
        held = arguments["seg_adapters"]
        held.copy_(torch.tensor(chosen, dtype=torch.int32)[torch.arange(len(held)) % len(chosen)])

    return change


def ranks(*chosen):
    def change(arguments):
        for held in arguments["ranks"]:
            held.copy_(torch.tensor(chosen, dtype=torch.int32))

    return change


def weights(arguments):
    for side in (*arguments["lora_A"], *arguments["lora_B"]):
        side[1].copy_(torch.randn_like(side[1]) * 0.1)


#: What a server does between steps, one after the other: changes in place of the operands that a graph holds.
CHANGES = {
    "capture": lambda arguments: None, "other ids": ids(3, 1, 2, 0), "more adapters in use": ids(*range(ADAPTERS)),
    "rows of the base model": ids(-1, 7, -1, 0), "the base model alone": ids(-1), "one adapter for all": ids(5),
    "other weights in a slot": weights, "other ranks": ranks(8, 3, 0, 1, 8, 5, 2, 7),
    "other scalings": lambda arguments: arguments["scaling"].mul_(-0.5),
    "other inputs": lambda arguments: arguments["x"].copy_(torch.randn_like(arguments["x"])),
}  # fmt: skip


def differing(device, kind, dtype):
    """The changes after which a replay gives other bits than an eager call."""
    arguments = operands(device, kind, [0, 1] * 4, dtype, seed=5)
    start = arguments["y"].clone()
    replay, wrong = device.capture(lambda: apply(arguments)), []
    for name, change in CHANGES.items():
        change(arguments)
        results = []
        for call in (replay, lambda: apply(arguments)):
            arguments["y"].copy_(start)
            call()
            device.synchronize()
            results.append(arguments["y"].clone())
        if not torch.equal(*results):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["group", "single"])
def test_a_replay_reads_what_was_changed(device, kind, dtype):
    assert differing(device, kind, dtype) == []


@pytest.mark.parametrize("first, then", [([3], [1]), ([0, 1], [2, 3]), ([0, 1, 2, 3] * 2, [3, -1] * 4)])
def test_a_graph_of_a_model_reads_the_ids_of_its_handle(device, make_stack, first, then):
    """Also where each id stands for several of the 8 rows, and right after a pass that was not captured."""
    model = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 24)}) for _ in range(2)])
    lora = attach(model.to(device.torch), make_stack({"q_proj": (32, 24)}, num_adapters=4).to(device.torch))
    linear, x = model[1]["q_proj"], torch.randn(8, 32, device=device.torch)
    y = torch.empty(8, 24, device=device.torch)
    lora.set(first)
    linear(x)
    replay = device.capture(lambda: y.copy_(linear(x)))
    for ids in (first, then):
        lora.set(ids)
        replay()
        device.synchronize()
        assert torch.equal(y, linear(x)), ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_replayed(device, dtype):
    held = operands(device, "single", [0, 1] * 4, dtype, seed=6)
    A, B, ranks_of = (held[name][0] for name in ("lora_A", "lora_B", "ranks"))
    grad, results = torch.randn_like(held["y"]), [torch.empty_like(t) for t in (held["x"], A, B)]

    def call():
        segments = held["scaling"], held["seg_indptr"], held["seg_adapters"], 1, ranks_of
        made = torch.ops.t2l_engine.lora_backward_(results[0].zero_(), grad, held["x"], A, B, *segments)
        for kept, new in zip(results[1:], made, strict=True):
            kept.copy_(new)

    replay = device.capture(call)
    for name in ("capture", "other ids", "rows of the base model", "other ranks", "other scalings", "other inputs"):
        CHANGES[name](held)
        found = []
        for run in (replay, call):
            run()
            device.synchronize()
            found.append([t.clone() for t in results])
        assert all(map(torch.equal, *found)), name


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def net(device):
    """A hypernetwork in bfloat16 with embeddings of eight descriptions by seed."""
    shape = SHAPES["smollm2-135m"] if device.on_gpu else TINY
    return shape.make(torch.bfloat16, seed=1).to(device.torch), lambda seed: shape.task_embeddings(8, seed).to(device.torch)


def test_adapters_are_applied_as_generated_in_the_same_graph(device, net):
    net, embeddings = net
    task_emb = embeddings(1).clone()
    out = net.generate(task_emb)
    name = next(iter(out.lora_A))
    A, B = (side[name][:, 0] for side in (out.lora_A, out.lora_B))
    x = torch.randn(8, A.shape[2], device=device.torch).bfloat16()
    y = torch.zeros(8, B.shape[1], device=device.torch, dtype=x.dtype)
    bounds, rows = (torch.arange(n, dtype=torch.int32, device=device.torch) for n in (9, 8))

    def both():
        net.generate(task_emb, out=out)
        ops.lora_add_(y, x, A, B, out.scaling, bounds, rows, 1)

    replay = device.capture(both)
    for seed in (4, 5):
        task_emb.copy_(embeddings(seed))
        y.zero_()
        replay()
        device.synchronize()
        fresh = net.generate(embeddings(seed))
        for held, right in ((out.lora_A, fresh.lora_A), (out.lora_B, fresh.lora_B)):
            assert all(torch.equal(held[name], right[name]) for name in right)
        sides = (side[name][:, 0] for side in (fresh.lora_A, fresh.lora_B))
        assert torch.equal(y, ops.lora_add_(torch.zeros_like(y), x, *sides, fresh.scaling, bounds, rows, 1))


# --- streams ---------------------------------------------------------------------------------------------------------


def pair(device, seed):
    """Operands, and what an eager call on the current stream makes of a copy of them."""
    ours, other = (operands(device, "group", [0, 1, -1, 2, 3, 3, 1, 0], seed=seed) for _ in range(2))
    apply(other)
    device.synchronize()
    return ours, other["y"]


def test_an_input_that_the_same_stream_writes_late(device):
    """A kernel launched on any other stream would read what was there before."""
    ours, right = pair(device, seed=7)
    x = ours["x"].clone()
    ours["x"].fill_(float("nan"))
    with device.streams(1)[0]:
        if device.on_gpu:
            torch.cuda._sleep(BUSY)
        ours["x"].copy_(x)
        apply(ours)
    device.synchronize()
    assert torch.equal(ours["y"], right)


def test_two_streams_at_once(device):
    pairs = [pair(device, seed) for seed in (8, 9)]
    starts = [ours["y"].clone() for ours, _ in pairs]
    streams = device.streams(2)
    for _ in range(50 if device.on_gpu else 2):
        for (ours, _), start, stream in zip(pairs, starts, streams, strict=True):
            with stream:
                ours["y"].copy_(start)
                apply(ours)
    device.synchronize()
    assert [i for i, (ours, right) in enumerate(pairs) if not torch.equal(ours["y"], right)] == []
