"""HyperNetwork: from task embeddings to LoRA adapters for every layer (paper section 3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from t2l_engine import ops
from t2l_engine.adapters.paths import module_names
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.weights import cast_matrices
from t2l_engine.hypernetwork.checkpoint import read, write_native
from t2l_engine.hypernetwork.config import AnyConfig, HyperNetworkConfig, PerceiverConfig
from t2l_engine.hypernetwork.folder import (
    BLOCKS,
    CheckpointError,
    Contents,
    expect_keys,
    expect_shape,
    resolve_checkpoint,
)
from t2l_engine.hypernetwork.modules import MLP, TASK_ENCODERS, Folded, NormedEmbedding, Offsets
from t2l_engine.hypernetwork.output import check_out, meta_stack
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork
from t2l_engine.hypernetwork.pointer import PointerHyperNetwork
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.ops import reference
from t2l_engine.ops.reference import without_autocast
from t2l_engine.ops.segments import is_capturing


class HyperNetwork(nn.Module):
    """Text-to-LoRA's hypernetwork in all variants of the paper's code (``config.VARIANTS``).

    ``generate`` gives adapters for inference; ``forward`` is the same computation with gradients, for training.  Tensors
    that do not depend on the task are folded once, and again after a parameter changes (an optimiser step, ``copy_``,
    ``to``; changes through ``.data`` are not detected).

    Source: paper section 3 and its appendix.

    >>> import torch
    >>> import t2l_engine as t2l
    >>> net = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper").hypernetwork
    >>> stack = net.generate(torch.randn(2, net.config.embed_dim))
    >>> stack.lora_A["q_proj"].shape, stack.lora_B["v_proj"].shape  # [N, layers, r, in], [N, layers, out, r]
    (torch.Size([2, 30, 8, 576]), torch.Size([2, 30, 192, 8]))
    """

    def __init__(self, config: HyperNetworkConfig):
        super().__init__()
        self.config = config
        c, m = config, config.width
        self.task_encoder = TASK_ENCODERS[c.task_encoder](c)
        one_hot = c.task_encoder == "discrete"
        self.depth_emb = None if one_hot else NormedEmbedding(c.num_layers, c.depth_width)
        self.module_emb = None if one_hot else NormedEmbedding(len(c.modules), c.module_width)
        self.mixer = MLP(m, 4 * m, m, norm=False)
        self.mlp1 = MLP(m, 4 * m, m)
        self.mlp2 = MLP(m, 4 * m, m)
        self.mlp3 = MLP(m, 4 * m, c.head_in_size)
        self.side_emb = NormedEmbedding(len(c.modules), 2, m) if c.num_sides == 2 else None
        self.pos_emb = NormedEmbedding(c.rank, m) if c.variant.endswith("learnable") else None
        self.heads = nn.ModuleDict(
            {name: nn.Linear(c.head_in_size, c.head_rows(i), bias=c.head_bias) for i, name in enumerate(c.modules)}
        )
        self.offsets = nn.ModuleDict({name: Offsets() for name in c.modules})
        # Modules of generated adapters are named as in adapters read from files: after the end of the path.
        self._paths = {name: path for path, name in module_names(c.module_paths.values()).items()}
        self._folded: Folded | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        scaling: str | float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        module_order: list[str] | None = None,
    ) -> HyperNetwork:
        """Load a native or Sakana-format folder; no base model is needed, and nothing in the folder is executed.

        Args:
            folder: a bundled checkpoint's name, or a folder: native (``config.json``, ``hypernet.safetensors``) or in Sakana
                format (``hypermod.pt``, ``args.yaml``, ``adapter_config.json``).
            scaling: "rslora" = alpha/sqrt(r), "plain" = alpha/r, or a number; None = as trained.
            dtype: of weights, of the inputs of matrix products and of generated A and B (accumulation and LayerNorm stay
                float32); None = as stored.
            module_order: modules in the order of the rows of the module embedding, for a folder in Sakana format where
                this order is known to differ from that of the tensors; None = that of the tensors.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            CheckpointError: a missing or extra key, a wrong shape, or a contradiction; the message names file and key.
        """
        net = load(read(resolve_checkpoint(folder), module_order), scaling=scaling, dtype=dtype, device=device)
        if not isinstance(net, HyperNetwork):
            raise CheckpointError(f"{folder}: it reads texts token by token; load it with TextToLoRA.from_pretrained")
        return net

    def save_pretrained(self, folder: str | Path, metadata: dict | None = None) -> None:
        """Write the native format: ``config.json`` and ``hypernet.safetensors``.

        ``metadata``: optional JSON blocks of ``config.json`` ("encoder", "base_model", "training").  Raises ValueError for
        other blocks, CheckpointError for what :meth:`from_pretrained` refuses.
        """
        save(self, Path(folder), metadata or {})

    def _apply(self, fn, recurse=True):
        self._folded = None  # .to(), .cuda() and the like replace the storage that folded tensors share
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight matrices and of generated adapters."""
        return cast(nn.Linear, next(iter(self.heads.values()))).weight.dtype

    @property
    def device(self) -> torch.device:
        """That of its parameters."""
        return next(self.parameters()).device

    @property
    def scaling(self) -> float:
        """The LoRA scaling of generated adapters."""
        return self.config.scaling_value

    def _heads_and_offsets(self) -> list[tuple[nn.Linear, Offsets]]:
        """Head and offsets of every module, in order."""
        heads, offsets = cast("dict[str, nn.Linear]", self.heads), cast("dict[str, Offsets]", self.offsets)
        return [(heads[name], offsets[name]) for name in self.config.modules]

    def matrices(self) -> list[Tensor]:
        """The weight matrices."""
        return [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]

    def set_dtype(self, dtype: torch.dtype) -> HyperNetwork:
        """Cast the weight matrices to ``dtype``; norms, biases, embeddings and offsets stay float32 (or float64).

        Raises ValueError if ``dtype`` is not floating point or values exceed its range; nothing changes then.
        """
        cast_matrices(self, dtype, self.matrices())
        self._folded = None
        return self

    def bias_hyperinit(self, generator: torch.Generator | None = None) -> HyperNetwork:
        """Bias-HyperInit (paper section 4): every adapter is initialised like a LoRA, with an update of zero.

        Head weights ``[rows, h]`` and biases ``[rows]`` become zero; A ``[r, in]`` is initialised as in PEFT, uniform in
        ±1/sqrt(in) (one draw per module, the same for all layers), B as zero.  In variant L the draw is the trainable head
        bias, as in SakanaAI's code; with shared heads it is the additive offset of A, since their bias is also B's.
        """
        c = self.config
        for (head, offsets), n_in in zip(self._heads_and_offsets(), c.in_features, strict=True):
            bound = 1.0 / math.sqrt(n_in)
            place = "cpu" if generator is None else generator.device
            draw = (torch.rand(c.rank, n_in, generator=generator, dtype=torch.float32, device=place) * 2 - 1) * bound
            draw = draw.to(head.weight.device, reference.accumulation_dtype(head.weight))
            with torch.no_grad():
                head.weight.zero_()
                if head.bias is not None:
                    head.bias.zero_()
                if c.variant == "L" and head.bias is not None:
                    head.bias[: c.rank * n_in] = draw.flatten()
                else:
                    offsets.add_A = draw.expand(c.num_layers, -1, -1).clone()
        return self

    def forward(self, task_emb: Tensor) -> AdapterStack:
        """Adapters with gradients; arguments and result as in :meth:`generate`."""
        return self._new_stack(task_emb, self.folded() | {"encoder": []})  # gradients of the encoder are autograd's

    @torch.no_grad()
    def generate(self, task_emb: Tensor, out: AdapterStack | None = None) -> AdapterStack:
        """Adapters of ``task_emb [N, embed_dim]``: a stack of N, unscaled A and B in the dtype of this hypernetwork.

        ``out``: preallocated output, a stack of N for the same modules, such as an earlier result, that is overwritten and
        returned; its A and B keep their dtype and strides.  It avoids the page faults of newly allocated memory, which for
        many adapters can take as long as the products.  :meth:`LoRAHandle.borrow_slots` gives one that is slots of a model.

        Raises:
            ValueError: ``task_emb`` is not a floating-point tensor ``[N, embed_dim]`` on this device, ``out`` does not fit,
                or ``to()`` cast the biases too (cast with :meth:`set_dtype`).
        """
        with without_autocast(self.mixer.linear1.weight.device):
            folded = self._folded
            if folded is None or not folded.current():
                folded = Folded(self, self.folded())
                if not is_capturing(self.mixer.linear1.weight):
                    self._folded = folded
            tensors = folded.tensors
            return self._new_stack(task_emb, tensors) if out is None else self._write_stack(task_emb, tensors, out)

    def meta_stack(self, count: int) -> AdapterStack:
        """A stack with the shapes and the dtype of :meth:`generate` for ``count`` descriptions, without memory.

        A, B and scaling are on the meta device, ranks on the CPU; :meth:`LoRAHandle.borrow_slots` takes it.

        Raises ValueError as :meth:`generate` if ``to()`` cast the biases too.
        """
        self._check_biases()
        return meta_stack(self.config, self._paths, [self.config.rank] * count, self.dtype)

    def _check_biases(self) -> None:
        weight, bias = self.mixer.linear1.weight, self.mixer.linear1.bias
        if bias.dtype != (acc := reference.accumulation_dtype(weight)):
            raise ValueError(
                f"HyperNetwork: expected biases in {acc} beside matrices in {weight.dtype}, got {bias.dtype}; cast with "
                "set_dtype(), not with to()"
            )

    def folded(self) -> dict:
        """All tensors that do not depend on the task, as arguments of the trunk and head ops."""
        self._check_biases()
        c, t = self.config, self.config.task_width
        weight1 = self.mixer.linear1.weight
        acc = reference.accumulation_dtype(weight1)
        if self.depth_emb is None or self.module_emb is None:  # one-hot
            depth, module = (torch.eye(size, dtype=acc, device=weight1.device) for size in (c.depth_width, c.module_width))
        else:
            depth, module = self.depth_emb(), self.module_emb()  # [n, d], [K, d]
        rows = depth.expand(len(c.modules), -1, -1), module[:, None].expand(-1, c.num_layers, -1)
        constant = torch.cat(rows, dim=-1)
        table = torch.nn.functional.linear(constant.to(acc), weight1[:, t:].to(acc), self.mixer.linear1.bias)
        weights = [weight1[:, :t].contiguous(), table, self.mixer.linear2.weight, self.mixer.linear2.bias]
        for block in (self.mlp1, self.mlp2, self.mlp3):
            weights += block.weights()
        pos_emb = None
        if self.pos_emb is not None:
            pos_emb = self.pos_emb()
            if c.variant == "S-learnable":  # the residual branch mlp2 of pos_emb does not depend on the task either
                pos_emb = pos_emb + reference.mlp(pos_emb, *self.mlp2.weights())
        scale = c.output_scale
        heads, offsets = zip(*self._heads_and_offsets(), strict=True)
        head_weights = [head.weight if scale == 1.0 else head.weight * scale for head in heads]
        head_biases = [head.bias if scale == 1.0 else head.bias * scale for head in heads] if c.head_bias else []
        side_emb = None if self.side_emb is None else self.side_emb()
        steps = [module.folded() for module in offsets]
        return {
            "encoder": self.task_encoder.folded(),
            "weights": weights,
            "side_emb": side_emb,
            "pos_emb": pos_emb,
            "heads": (head_weights, head_biases),
            "offsets": {step: [tensors[step] for tensors in steps] for step in ("mul_A", "add_A", "mul_B", "add_B")},
        }

    def _new_stack(self, task_emb: Tensor, folded: dict) -> AdapterStack:
        heads = ops.hypernet_heads(*self._head_inputs(task_emb, folded), **folded["offsets"])
        lora_A, lora_B = (dict(zip(self._paths, tensors, strict=True)) for tensors in heads)
        scaling = torch.full((len(task_emb),), self.scaling, dtype=torch.float32, device=task_emb.device)
        return AdapterStack(lora_A, lora_B, scaling, paths=self._paths)

    def _write_stack(self, task_emb: Tensor, folded: dict, out: AdapterStack) -> AdapterStack:
        inputs = self._head_inputs(task_emb, folded)
        check_out(out, self.config, self._paths, [self.config.rank] * len(task_emb), task_emb.device)
        lora_A, lora_B = ([tensors[name] for name in self._paths] for tensors in (out.lora_A, out.lora_B))
        ops.hypernet_heads_out_(lora_A, lora_B, *inputs, **folded["offsets"])
        out.fill_constants(self.scaling, self.config.rank)
        return out

    def _head_inputs(self, task_emb: Tensor, folded: dict) -> tuple[Any, ...]:
        """Latents of the trunk, and the other leading arguments of the head ops."""
        self._check_task_emb(task_emb, folded)
        c, encoder = self.config, folded["encoder"]
        rotary = c.rank if c.rotary else 0
        if c.variant.startswith("autoregressive"):
            latent = reference.autoregressive_trunk(
                self.task_encoder(task_emb), folded["weights"], folded["pos_emb"], rotary
            )
        else:
            z = task_emb.to(encoder[0].dtype) if encoder else self.task_encoder(task_emb)
            rest = folded["weights"], folded["side_emb"], folded["pos_emb"]
            latent = ops.hypernet_trunk(z.contiguous(), *rest, rotary, encoder)
        return latent, *folded["heads"], c.rank, c.in_features, c.out_features

    def _check_task_emb(self, task_emb: Tensor, folded: dict) -> None:
        c = self.config
        if not isinstance(task_emb, Tensor) or task_emb.dim() != 2 or task_emb.shape[1] != c.embed_dim:
            got = f"shape {tuple(task_emb.shape)}" if isinstance(task_emb, Tensor) else type(task_emb).__name__
            raise ValueError(f"task_emb: expected a tensor [N, {c.embed_dim}], got {got}")
        device = folded["weights"][0].device
        if not task_emb.is_floating_point() or task_emb.device != device:
            raise ValueError(f"task_emb: expected floating point on {device}, got {task_emb.dtype} on {task_emb.device}")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def save(net: HyperNetwork | TokenHyperNetwork, folder: Path, metadata: dict[str, Any]) -> None:
    """See :meth:`HyperNetwork.save_pretrained`."""
    unknown = set(metadata) - set(BLOCKS)
    if unknown:
        raise ValueError(f"metadata: expected some of {BLOCKS}, got {sorted(unknown)}")
    write_native(folder, Contents(net.config, _own_tensors(net), {}, metadata, folder, folder))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of ``module``, of layers that it shares once."""
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {key: tensor for key, tensor in module.state_dict().items() if key in names}


def new(config: AnyConfig) -> HyperNetwork | TokenHyperNetwork:
    """A hypernetwork of ``config`` with random parameters."""
    if isinstance(config, HyperNetworkConfig):
        return HyperNetwork(config)
    return PerceiverHyperNetwork(config) if isinstance(config, PerceiverConfig) else PointerHyperNetwork(config)


def build(contents: Contents) -> HyperNetwork | TokenHyperNetwork:
    """A hypernetwork with exactly the tensors ``contents.state``; CheckpointError names missing, extra and misfit keys."""
    config, state, path, key_in_file = contents.config, contents.state, contents.path, contents.key_in_file
    with torch.device("meta"):
        net = new(config)
    if isinstance(net, HyperNetwork):
        _add_offsets(net, contents)
    wanted = _own_tensors(net)
    expect_keys(path, [*map(key_in_file, state)], [*map(key_in_file, wanted)])
    for key, tensor in state.items():
        expect_shape(path, key_in_file(key), tensor, tuple(wanted[key].shape))
    net.load_state_dict(state, assign=True, strict=False)
    return net


def _add_offsets(net: HyperNetwork, contents: Contents) -> None:
    config, path, key_in_file = net.config, contents.path, contents.key_in_file
    for key, tensor in contents.state.items():
        parts = key.split(".")
        if parts[0] == "offsets" and len(parts) == 3 and parts[1] in config.modules and parts[2] in Offsets.NAMES:
            i = config.modules.index(parts[1])
            shape = (config.rank, config.in_features[i]) if key.endswith("A") else (config.out_features[i], config.rank)
            expect_shape(path, key_in_file(key), tensor, (config.num_layers, *shape))
            if parts[2].startswith("std") and bool((tensor < 0).any()):
                raise CheckpointError(f"{path}: {key_in_file(key)}: expected standard deviations of 0 or more")
            setattr(net.offsets[parts[1]], parts[2], tensor)


def load(
    contents: Contents,
    *,
    scaling: str | float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> HyperNetwork | TokenHyperNetwork:
    """See :meth:`HyperNetwork.from_pretrained`; drops the tensors of ``contents``."""
    if scaling is not None:
        contents = dataclasses.replace(contents, config=dataclasses.replace(contents.config, scaling=scaling))
    net = build(contents)
    contents.state.clear()  # so that casting frees each tensor in turn
    contents.unused.clear()
    if dtype is None:
        dtypes = {matrix.dtype for matrix in net.matrices()}
        if len(dtypes) > 1:
            got = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"{contents.path}: expected matrices of one dtype, got {got}; pass dtype to cast them")
        dtype = net.dtype
    try:
        net.set_dtype(dtype)
    except ValueError as error:
        raise CheckpointError(f"{contents.path}: {error}") from None
    return net.to(device).eval()


@functools.cache
def num_parameters(config: AnyConfig) -> int:
    """Number of parameters and of vq's buffers; layers that are shared count once, offsets of the last step do not."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in _own_tensors(new(config)).values())


@functools.cache
def hypernet_flops(config: HyperNetworkConfig) -> dict[str, int]:
    """FLOPs of generating one adapter, by the formulas that are registered for this package's ops, as trunk and heads."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        network, task_emb = HyperNetwork(config), torch.empty(1, config.embed_dim)
        network.generate(task_emb)  # folds what does not depend on the task
        with FlopCounterMode(display=False) as counter:
            network.generate(task_emb)
    heads = counter.get_flop_counts()["Global"][torch.ops.t2l_engine.hypernet_heads]
    return {"trunk": counter.get_total_flops() - heads, "heads": heads}
