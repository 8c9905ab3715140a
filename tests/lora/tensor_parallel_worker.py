"""Models divided between two processes: ``tensor_parallel_worker.py FOLDER RANK WORLD`` writes what this one computes."""

import datetime
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from t2l_engine import AdapterStack, HyperNetwork, HyperNetworkConfig, attach

HIDDEN, INNER, LAYERS = 32, 48, 2
#: Module -> (in, out) features; heads of 8 features, half as many keys and values.
LLAMA = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN // 2), "v_proj": (HIDDEN, HIDDEN // 2),
    "o_proj": (HIDDEN, HIDDEN), "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN),
}  # fmt: skip
PLAIN = {"up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
KINDS = ("transformers", "torch", "torch-bfloat16")


class Plain(nn.Module):
    """Linears with biases, as torch's own tensor parallelism divides them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in PLAIN.items()}) for _ in range(LAYERS)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down_proj"](torch.tanh(layer["up_proj"](x)))
        return x


def model(kind, folder, mesh=None):
    """The model of ``kind``, divided among the processes of ``mesh``."""
    if kind == "transformers":
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        plan = {} if mesh is None else {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}
        return AutoModelForCausalLM.from_pretrained(folder / "model", **plan)
    made = Plain().to(torch.bfloat16 if kind.endswith("bfloat16") else torch.float32)
    if mesh is None:
        return made
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plans = {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    return parallelize_module(
        made, mesh, {f"layers.{i}.{name}": plan for i in range(LAYERS) for name, plan in plans.items()}
    )


def stack(kind):
    """Three adapters, of which the second lacks a module and the last has a smaller rank."""
    generator, shapes = torch.Generator().manual_seed(1), LLAMA if kind == "transformers" else PLAIN
    dtype = torch.bfloat16 if kind.endswith("bfloat16") else torch.float32
    randn = lambda *shape: torch.randn(3, LAYERS, *shape, generator=generator).div(shape[-1] ** 0.5).to(dtype)  # noqa: E731
    A, B = ({name: randn(4, sizes[i]) for name, sizes in shapes.items()} for i in (0, 1))
    ranks = {name: torch.tensor([[4] * LAYERS, [4] * LAYERS, [2] * LAYERS]).int() for name in shapes}
    ranks["down_proj"][1] = 0
    return AdapterStack(A, {name: b.mT for name, b in B.items()}, torch.tensor([0.5, 1.0, 2.0]), ranks)


def hypernetwork(kind):
    shapes = LLAMA if kind == "transformers" else PLAIN
    n_in, n_out = zip(*shapes.values(), strict=True)
    torch.manual_seed(2)
    config = HyperNetworkConfig(
        variant="L", modules=tuple(shapes), in_features=n_in, out_features=n_out, num_layers=LAYERS, rank=4, embed_dim=24,
        latent_size=32, head_in_size=24, lora_alpha=8,
    )  # fmt: skip
    return HyperNetwork(config).set_dtype(stack(kind).dtype).eval()


def inputs(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "transformers":
        return torch.randint(64, (4, 6), generator=generator)
    return torch.randn(4, 6, HIDDEN, generator=generator).to(stack(kind).dtype)


@torch.no_grad()
def results(kind, made, dtype=None):
    """What ``made``, divided or not, computes: name -> tensor.  ``dtype``: that of ``made``, None: of ``kind``."""
    x, adapters, net, found = inputs(kind), stack(kind), hypernetwork(kind), {}
    if dtype is not None:
        x, adapters, net = x.to(dtype), adapters.to(dtype=dtype), net.set_dtype(dtype)
    run = lambda: getattr(made(x), "logits", None) if kind == "transformers" else made(x)  # noqa: E731
    found["base"] = run()
    lora = attach(made, adapters, slots=4)
    found["attached"] = run()
    for name, ids in (("mixed", [0, -1, 2, 1]), ("one", 2), ("mixed again", [1, 1, 0, -1])):
        with lora.use(ids):
            found[name] = run()
    lora.put(0, adapters[2])
    with lora.use([0, 0, 2, -1]):
        found["put"] = run()
    emb = torch.randn(2, 24, generator=torch.Generator().manual_seed(4))
    for i, adapter in enumerate(net.generate(emb)):
        lora.put(1 + i, adapter)
    with lora.use([1, 2, 1, -1]):
        found["generated"] = run()
        if kind == "transformers":
            found["tokens"] = made.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, do_sample=False)
    lora.merge(2)
    found["merged"] = run()
    lora.unmerge()
    found["unmerged"] = run()
    lora.detach()
    found["detached"] = run()
    return found


def refuses_whole_adapters(made):
    """Slots of a part are not lent for whole adapters."""
    net, lora = hypernetwork("torch"), attach(made, stack("torch"))
    features = rf"\({HIDDEN}, {INNER // 2}\)"
    with pytest.raises(ValueError, match=f"like: up_proj: expected the in/out features {features} of this process"):
        lora.borrow_slots(0, net.meta_stack(1)).__enter__()


def main(folder, rank, world):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=2)
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (world,))
        found = {kind: results(kind, model(kind, folder, mesh)) for kind in KINDS}
        refuses_whole_adapters(model("torch", folder, mesh))
        torch.save(found, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
