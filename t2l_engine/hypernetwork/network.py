"""The hypernetwork: task embeddings in, LoRA adapters for every layer out (paper section 3)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine import ops
from t2l_engine.adapters.paths import module_names
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import from_json, to_json
from t2l_engine.files.weights import check_dtype, max_abs
from t2l_engine.hypernetwork.checkpoint import read, write_native
from t2l_engine.hypernetwork.config import HyperNetworkConfig, resolve_scaling
from t2l_engine.hypernetwork.contents import Contents, expect_shape
from t2l_engine.hypernetwork.folder import BLOCKS, CheckpointError
from t2l_engine.hypernetwork.task_encoders import TASK_ENCODERS
from t2l_engine.ops import reference

STD_EPS = 1e-10  # the reference's un-normalisation adds it to the standard deviation
MAX_PARAMETERS = 1 << 40  # beyond what any file here can hold, and within what torch can describe


class NormedEmbedding(nn.Module):
    """A table of embeddings followed by LayerNorm: ``[*shape, width]``."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.norm = nn.LayerNorm(shape[-1], eps=reference.LAYER_NORM_EPS)

    def forward(self) -> Tensor:
        return reference.layer_norm(self.weight, self.norm.weight, self.norm.bias)


class MLP(nn.Module):
    """Parameters of ``silu(W2 silu(W1 [LN] x + b1) + b2)``; the trunk op does the arithmetic."""

    def __init__(self, width: int, hidden: int, out: int, norm: bool = True):
        super().__init__()
        if norm:
            self.norm = nn.LayerNorm(width, eps=reference.LAYER_NORM_EPS)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def weights(self) -> list[Tensor]:
        """In the order of ``reference.TRUNK_WEIGHTS``."""
        first, second = self.linear1, self.linear2
        return [self.norm.weight, self.norm.bias, first.weight, first.bias, second.weight, second.bias]


class Offsets(nn.Module):
    """What the last step applies to A and B of one module: ``A * (std_A + 1e-10) + mean_A + add_A`` (B alike).

    ``std`` and ``mean`` undo the z-scores that a reconstruction run was trained on; ``add`` is a multi-task LoRA, or the
    start of a LoRA.  Buffers ``[n, r, in]`` for A and ``[n, out, r]`` for B, present if needed.
    """

    NAMES = ("std_A", "mean_A", "add_A", "std_B", "mean_B", "add_B")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_buffer(name, None)

    def folded(self) -> dict[str, Tensor | None]:
        """``mul_A``, ``add_A``, ``mul_B``, ``add_B`` as :func:`t2l_engine.ops.hypernet_heads` takes them."""
        out = {}
        for side in "AB":
            std, mean, add = (getattr(self, f"{name}_{side}") for name in ("std", "mean", "add"))
            out[f"mul_{side}"] = None if std is None else std + STD_EPS
            out[f"add_{side}"] = mean if add is None else add if mean is None else mean + add
        # Stored as the heads write B, [n, r, out]: the epilogue reads what it needs next to what it writes.
        return {key: t.mT.contiguous().mT if t is not None and key.endswith("B") else t for key, t in out.items()}


class HyperNetwork(nn.Module):
    """Text-to-LoRA's hypernetwork in all variants of the paper's code (``config.VARIANTS``).

    ``generate`` gives adapters for inference; ``forward`` is the same computation with gradients, for training.
    Parameters are ordinary; what does not depend on the task is folded once, and again after a parameter changes (an
    optimiser step, ``copy_``, ``to``; a change through ``.data`` cannot be seen).

    Source: paper section 3 and its appendix.  The constructor raises ConfigError for module names that torch cannot hold.

    >>> import torch
    >>> import t2l_engine as t2l
    >>> net = t2l.TextToLoRA.from_pretrained("smollm2-135m").hypernetwork
    >>> stack = net.generate(torch.randn(2, net.config.embed_dim))
    >>> stack.lora_A["q_proj"].shape, stack.lora_B["v_proj"].shape  # [N, layers, r, in], [N, layers, out, r]
    (torch.Size([2, 30, 8, 576]), torch.Size([2, 30, 192, 8]))
    """

    def __init__(self, config: HyperNetworkConfig):
        super().__init__()
        self.config = config
        c, m = config, config.width
        taken = [name for name in c.modules if hasattr(nn.ModuleDict(), name)]
        if taken:
            raise ConfigError(f"modules: expected names of linears, got {taken}, which torch's ModuleDict does not allow")
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
        # Generated adapters are named as those read from files are: after the end of the path.
        self._paths = {name: path for path, name in module_names(c.module_paths.values()).items()}
        self._packed: tuple[list[Tensor], list[int], dict] | None = None

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
        """Load a native or a reference checkpoint folder; no base model is needed and nothing in it is executed.

        Args:
            folder: native (``config.json``, ``hypernet.safetensors``) or reference (``hypermod.pt``, ``args.yaml``,
                ``adapter_config.json``) form.
            scaling: "rslora" = alpha/sqrt(r), "plain" = alpha/r, or a number; None = what the checkpoint was trained with.
            dtype: of weights, of the inputs of matrix products and of generated A and B (accumulation and LayerNorm stay
                float32); None = as stored.
            module_order: modules in the order of the rows of the module embedding, for a reference folder whose order is
                known to be another than that of its tensors; None = what the tensors say.

        Raises:
            FileNotFoundError: the folder or one of its files is absent.
            CheckpointError: a missing, extra or mis-shaped key, or a contradiction; it names the file and the key.
        """
        return load(Path(folder), scaling=scaling, dtype=dtype, device=device, module_order=module_order)

    def save_pretrained(self, folder: str | Path, metadata: dict | None = None) -> None:
        """Write the native form: ``config.json`` and ``hypernet.safetensors``.

        ``metadata``: extra JSON blocks of ``config.json`` ("encoder", "base_model", "training").  Raises ValueError for
        other blocks, CheckpointError where they are larger than readers accept.
        """
        save(self, Path(folder), metadata)

    def _apply(self, fn, recurse=True):
        self._packed = None  # .to(), .cuda() and the like replace the storage behind the folded tensors
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight matrices, and so of generated adapters."""
        return next(iter(self.heads.values())).weight.dtype

    @property
    def scaling(self) -> float:
        """The LoRA scaling that adapters of this hypernetwork are trained for."""
        return resolve_scaling(self.config.scaling, self.config.lora_alpha, self.config.rank)

    def set_dtype(self, dtype: torch.dtype) -> HyperNetwork:
        """Cast the weight matrices to ``dtype``; norms, biases, embeddings and offsets stay float32 (or float64).

        Raises ValueError for a dtype that is not floating point and for values beyond its range; nothing changes then.
        """
        check_dtype(dtype)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        matrices = {id(layer.weight) for layer in self.modules() if isinstance(layer, nn.Linear)}
        casts = [
            (name, tensor, dtype if id(tensor) in matrices else vector_dtype)
            for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers())
        ]
        for name, tensor, kind in casts:
            narrower = torch.finfo(kind).max < torch.finfo(tensor.dtype).max and not tensor.is_meta
            if narrower and tensor.numel() and max_abs(tensor) > torch.finfo(kind).max:
                raise ValueError(f"dtype: {name} holds values beyond the range of {kind}")
        for _, tensor, kind in casts:
            tensor.data = tensor.data.to(kind)
        self._packed = None
        return self

    def bias_hyperinit(self, generator: torch.Generator | None = None) -> HyperNetwork:
        """Bias-HyperInit (paper section 4): every adapter starts as a LoRA initialisation, so the first delta is zero.

        Head weights ``[rows, h]`` and biases ``[rows]`` become zero; A ``[r, in]`` starts as PEFT's Kaiming-uniform
        ±1/sqrt(in) (one draw a module, shared by layers) through the additive offset, B as zero.  With one side (variant L)
        A's draw is the trainable head bias, as in the reference; shared heads keep it in the offset, since their bias serves
        B too.
        """
        c = self.config
        for i, name in enumerate(c.modules):
            head, n_in = self.heads[name], c.in_features[i]
            bound = 1.0 / math.sqrt(n_in)
            draw = (torch.rand(c.rank, n_in, generator=generator) * 2 - 1) * bound
            with torch.no_grad():
                head.weight.zero_()
                if head.bias is not None:
                    head.bias.zero_()
                if c.variant == "L" and head.bias is not None:
                    head.bias[: c.rank * n_in] = draw.flatten()
                else:
                    self.offsets[name].add_A = draw.expand(c.num_layers, -1, -1).clone()
        return self

    def forward(self, task_emb: Tensor) -> AdapterStack:
        """Adapters with gradients; arguments and result as in :meth:`generate`."""
        return self._run(task_emb, self.folded())

    @torch.no_grad()
    def generate(self, task_emb: Tensor, out: AdapterStack | None = None) -> AdapterStack:
        """Adapters of ``task_emb [N, embed_dim]``: a stack of N, unscaled A and B in the dtype of this hypernetwork.

        ``out``: a stack of N for the same modules, such as an earlier result, to be written over and returned; its A and B
        keep their dtype and strides.  Memory that is used again saves the page faults of fresh memory, which for many
        adapters can take as long as the products.

        Raises:
            ValueError: ``task_emb`` is no ``[N, embed_dim]`` floating-point tensor or lies on another device, ``out`` does
                not fit, or ``to()`` cast the biases too (cast with :meth:`set_dtype`).
        """
        tensors = list(itertools.chain(self.parameters(), self.buffers()))
        versions = [0 if t.is_inference() else t._version for t in tensors]
        # The tensors themselves, not their ids, which a later parameter may get once these are gone.
        if (
            self._packed is None
            or self._packed[1] != versions
            or any(new is not old for new, old in zip(tensors, self._packed[0], strict=True))
        ):
            self._packed = (tensors, versions, self.folded())
        return self._run(task_emb, self._packed[2], out)

    def folded(self) -> dict:
        """Everything that does not depend on the task, as the trunk op takes it."""
        c, t = self.config, self.config.task_width
        weight1 = self.mixer.linear1.weight
        acc = reference.accumulation_dtype(weight1)
        if self.mixer.linear1.bias.dtype != acc:
            raise ValueError(
                f"HyperNetwork: expected biases in {acc} beside matrices in {weight1.dtype}, got "
                f"{self.mixer.linear1.bias.dtype}; cast with set_dtype(), not with to()"
            )
        if self.depth_emb is None:
            depth, module = (torch.eye(size, dtype=acc, device=weight1.device) for size in (c.depth_width, c.module_width))
        else:
            depth, module = self.depth_emb(), self.module_emb()  # [n, d], [K, d]
        constant = torch.cat(
            (
                depth.expand(len(c.modules), -1, -1),
                module[:, None].expand(-1, c.num_layers, -1),
            ),
            dim=-1,
        )
        table = torch.nn.functional.linear(constant.to(acc), weight1[:, t:].to(acc), self.mixer.linear1.bias)
        weights = [weight1[:, :t].contiguous(), table, self.mixer.linear2.weight, self.mixer.linear2.bias]
        for block in (self.mlp1, self.mlp2, self.mlp3):
            weights += block.weights()
        pos_emb = None
        if self.pos_emb is not None:
            pos_emb = self.pos_emb()
            if c.variant == "S-learnable":  # its branch through mlp2 does not depend on the task
                pos_emb = pos_emb + reference.mlp(pos_emb, *self.mlp2.weights())
        scale, heads = c.output_scale, [self.heads[name] for name in c.modules]
        head_weights = [head.weight if scale == 1.0 else head.weight * scale for head in heads]
        head_biases = [head.bias if scale == 1.0 else head.bias * scale for head in heads] if c.head_bias else []
        side_emb = None if self.side_emb is None else self.side_emb()
        offsets = [self.offsets[name].folded() for name in c.modules]
        return {
            "weights": weights,
            "side_emb": side_emb,
            "pos_emb": pos_emb,
            "heads": (head_weights, head_biases),
            "offsets": {step: [tensors[step] for tensors in offsets] for step in ("mul_A", "add_A", "mul_B", "add_B")},
        }

    def _run(self, task_emb: Tensor, folded: dict, out: AdapterStack | None = None) -> AdapterStack:
        c = self.config
        if not isinstance(task_emb, Tensor) or task_emb.dim() != 2 or task_emb.shape[1] != c.embed_dim:
            got = f"shape {tuple(task_emb.shape)}" if isinstance(task_emb, Tensor) else type(task_emb).__name__
            raise ValueError(f"task_emb: expected a tensor [N, {c.embed_dim}], got {got}")
        device = folded["weights"][0].device
        if not task_emb.is_floating_point() or task_emb.device != device:
            raise ValueError(f"task_emb: expected floating point on {device}, got {task_emb.dtype} on {task_emb.device}")
        if out is not None:
            self._check_out(out, len(task_emb), device)
        z = self.task_encoder(task_emb)
        rotary = c.rank if c.rotary else 0
        if c.variant.startswith("autoregressive"):
            latent = reference.autoregressive_trunk(z, folded["weights"], folded["pos_emb"], rotary)
        else:
            latent = ops.hypernet_trunk(z, folded["weights"], folded["side_emb"], folded["pos_emb"], rotary)
        heads = (latent, *folded["heads"], c.rank, c.in_features, c.out_features)
        if out is None:
            lists = ops.hypernet_heads(*heads, **folded["offsets"])
            lora_A, lora_B = (dict(zip(self._paths, tensors, strict=True)) for tensors in lists)
        else:
            stored = ([tensors[name] for name in self._paths] for tensors in (out.lora_A, out.lora_B))
            ops.hypernet_heads_out_(*stored, *heads, **folded["offsets"])
        if out is not None:
            out.scaling.fill_(self.scaling)
            for ranks in out.ranks.values():
                ranks.fill_(c.rank)
            return out
        scaling = torch.full((len(task_emb),), self.scaling, dtype=torch.float32, device=device)
        return AdapterStack(lora_A, lora_B, scaling, paths=self._paths)

    def _check_out(self, out: AdapterStack, count: int, device: torch.device) -> None:
        c = self.config
        if not isinstance(out, AdapterStack) or out.paths != self._paths:
            got = out.paths if isinstance(out, AdapterStack) else type(out).__name__
            raise ValueError(f"out: expected a stack for the modules {self._paths}, got {got}")
        for name, n_in, n_out in zip(self._paths, c.in_features, c.out_features, strict=True):
            wanted = (count, c.num_layers, c.rank, n_in), (count, c.num_layers, n_out, c.rank)
            a, b = out.lora_A[name], out.lora_B[name]
            if (tuple(a.shape), tuple(b.shape)) != wanted or a.device != device:
                raise ValueError(
                    f"out: {name}: expected lora_A {wanted[0]} and lora_B {wanted[1]} on {device}, "
                    f"got {tuple(a.shape)} and {tuple(b.shape)} on {a.device}"
                )


# --- checkpoints ---------------------------------------------------------------------------------------------------


def build(contents: Contents) -> HyperNetwork:
    """The hypernetwork that holds exactly ``contents.state``; every difference is an error that names its keys."""
    config, state, path, name_of = contents.config, contents.state, contents.path, contents.name_of
    if config.num_parameters > MAX_PARAMETERS:
        raise CheckpointError(f"{path}: the configuration asks for {config.num_parameters} parameters")
    try:
        with torch.device("meta"):
            net = HyperNetwork(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "offsets" and len(parts) == 3 and parts[1] in config.modules and parts[2] in Offsets.NAMES:
            i = config.modules.index(parts[1])
            shape = (config.rank, config.in_features[i]) if key.endswith("A") else (config.out_features[i], config.rank)
            expect_shape(path, name_of(key), tensor, (config.num_layers, *shape))
            if parts[2].startswith("std") and bool((tensor < 0).any()):
                raise CheckpointError(f"{path}: {name_of(key)}: expected standard deviations of 0 or more")
            setattr(net.offsets[parts[1]], parts[2], tensor)
    wanted = net.state_dict()
    missing, extra = (sorted(map(name_of, keys)) for keys in (wanted.keys() - state.keys(), state.keys() - wanted.keys()))
    if missing or extra:
        raise CheckpointError(f"{path}: missing keys {short_repr(missing)}, unexpected keys {short_repr(extra)}")
    for key, tensor in state.items():
        expect_shape(path, name_of(key), tensor, tuple(wanted[key].shape))
    net.load_state_dict(state, assign=True)
    return net


def load(
    folder: Path,
    *,
    scaling: str | float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    module_order: list[str] | None = None,
) -> HyperNetwork:
    """See :meth:`HyperNetwork.from_pretrained`."""
    contents = read(folder, module_order)
    net = build(contents)
    contents.state.clear()  # so that casting frees each tensor as it goes
    if scaling is not None:
        values = to_json(net.config) | {"scaling": scaling}
        net.config = from_json(HyperNetworkConfig, values, "from_pretrained")
    if dtype is None:
        dtypes = {layer.weight.dtype for layer in net.modules() if isinstance(layer, torch.nn.Linear)}
        if len(dtypes) > 1:
            got = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(f"{contents.path}: expected matrices of one dtype, got {got}; pass dtype to cast them")
        dtype = net.dtype
    check_dtype(dtype)
    try:
        net.set_dtype(dtype)
    except ValueError as error:
        raise CheckpointError(f"{contents.path}: {error}") from None
    return net.to(device).eval()


def save(net: HyperNetwork, folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """See :meth:`HyperNetwork.save_pretrained`."""
    unknown = set(metadata or {}) - set(BLOCKS)
    if unknown:
        raise ValueError(f"metadata: expected some of {BLOCKS}, got {sorted(unknown)}")
    write_native(folder, Contents(net.config, net.state_dict(), {}, metadata or {}, folder))
