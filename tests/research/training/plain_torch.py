"""What training computes once more, in plain torch: no op, layer, loss or batching of the package."""

import contextlib
from functools import partial

import torch
from torch import nn

from t2l_engine.research.training.context import TrainingContext
from t2l_engine.testing.numerics import LOSS_ATOL
from t2l_engine.text import base_model
from tests.hypernetwork import plain_network
from tests.research.training import small_runs

#: Names of a hypernetwork's parts in the reference; what is missing here has a place in :func:`named` of its own.
PARTS = {
    "task_encoder.linear": "task_encoder.mlp.0", "task_encoder.norm": "task_encoder.mlp.1",
    "depth_emb": "layer_depth_encoder.0", "depth_emb.norm": "layer_depth_encoder.1",
    "module_emb": "layer_type_encoder.0", "module_emb.norm": "layer_type_encoder.1",
    "mixer.linear1": "mixer.1", "mixer.linear2": "mixer.4",
    "mlp1.norm": "mlp1.mlp.0", "mlp1.linear1": "mlp1.mlp.1", "mlp1.linear2": "mlp1.mlp.4",
    "mlp2.norm": "mlp2.mlp.0", "mlp2.linear1": "mlp2.mlp.1", "mlp2.linear2": "mlp2.mlp.4",
    "mlp3.norm": "mlp3.0", "mlp3.linear1": "mlp3.1", "mlp3.linear2": "mlp3.4",
    "side_emb.norm": "out_emb_norm", "pos_emb": "pos_emb.0", "pos_emb.norm": "pos_emb.1",
}  # fmt: skip


def adapters(net, task_emb):
    """({parameter of ``net``: its float64 leaf}, {module: (A, B)}): the adapters of ``task_emb``, made from the leaves."""
    c, leaves, state = net.config, {}, {}
    for name, parameter in net.named_parameters():
        leaf = leaves[name] = parameter.detach().double().requires_grad_()
        part, _, kind = name.rpartition(".")
        if name == "side_emb.weight":
            state |= {f"out_emb.{m}.{side}": leaf[i, j] for i, m in enumerate(c.modules) for j, side in enumerate("AB")}
        else:
            state[f"{PARTS.get(part, part)}.{kind}"] = leaf  # heads are called alike
    for i, name in enumerate(c.modules):
        for side, shape in (("A", (c.rank, c.in_features[i])), ("B", (c.out_features[i], c.rank))):
            offset = getattr(net.offsets[name], f"add_{side}")
            state[f"AB_offset.{side}.{name}"] = torch.zeros(c.num_layers, *shape) if offset is None else offset
    flags = dict(zip(("shared_AB_head", "autoreg_gen", "learnable_pos_emb"), plain_network.FLAGS[c.variant], strict=True))
    return leaves, plain_network.adapters(state, flags | {"training_task": "sft"}, task_emb)[1]


@contextlib.contextmanager
def applied(model, modules, paths, scaling, ids):
    """Row i of every batch that passes through ``model`` has ``s (x A^T) B^T`` of adapter ``ids[i]`` added.

    ``modules``: name -> (A ``[N, n, r, in]``, B ``[N, n, out, r]``); ``paths``: name -> path with ``{layer}``.
    """

    def hook(A, B):
        def add(linear, args, out):
            delta = args[0] @ A[ids].mT.to(out) @ B[ids].mT.to(out)
            return out + (scaling[ids, None, None] * delta).to(out)

        return add

    handles = []
    try:
        for name, (A, B) in modules.items():
            for layer in range(A.shape[1]):
                linear = model.get_submodule(paths[name].replace("{layer}", str(layer)))
                handles.append(linear.register_forward_hook(hook(A[:, layer], B[:, layer])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def answer_losses(model, sample, smoothing=0.0):
    """Cross-entropy of every answer token of ``sample``, alone and unpadded, from the model's own logits."""
    tokens = torch.tensor(sample.tokens)
    logs = nn.functional.log_softmax(model(tokens[None]).logits[0].double(), dim=-1)[-sample.answer_len - 1 : -1]
    chosen = logs.gather(1, tokens[-sample.answer_len :, None])[:, 0]
    return -(1 - smoothing) * chosen - smoothing * logs.mean(dim=1)


@torch.no_grad()
def validation_loss(model, examples, task, stack_of, description_of=lambda turn: 0):
    """Mean over the used ``examples`` of ``task``; ``stack_of(i)``: the adapter of example i, as a stack of one."""
    losses = []
    for turn, i in enumerate(examples.kept[task]):
        stack = stack_of(i)
        modules = {name: (A, stack.lora_B[name]) for name, A in stack.lora_A.items()}
        with applied(model, modules, stack.paths, stack.scaling, [0]):
            losses.append(answer_losses(model, examples.sample(task, i, description_of(turn))).mean())
    return torch.stack(losses).mean()


def assert_validated(settings, tasks, out, stack_of, description_of=lambda turn: 0):
    """The losses that the last validation logged are of ``stack_of(task, i)``: example i's adapter, as a stack of one."""
    model, _ = base_model.load(settings.base_model, torch.float32)
    fit = TrainingContext(settings, tasks, torch.device("cpu"))
    found = [row["tasks"] for row in small_runs.rows(out) if "tasks" in row][-1]
    assert list(found) == [task.name for task in fit.tasks]
    for number, task in enumerate(fit.tasks):
        expected = validation_loss(model, fit.validation, number, partial(stack_of, task), description_of)
        assert abs(found[task.name] - expected) <= LOSS_ATOL, task.name
