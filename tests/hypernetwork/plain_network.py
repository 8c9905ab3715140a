"""Text-to-LoRA's hypernetwork in float64, from the formulae and under SakanaAI's key names, and random checkpoints.

Nothing here uses the package: no renaming, folding or batching that it could get wrong in the same way.
"""

import json
import re

import torch
import yaml

#: shared_AB_head, autoreg_gen, learnable_pos_emb.
FLAGS = {
    "L": (False, False, False),
    "M": (True, False, False),
    "S-learnable": (True, True, True),
    "S-rotary": (True, True, False),
    "autoregressive-learnable": (False, True, True),
    "autoregressive-rotary": (False, True, False),
}
ENCODERS = ("linear", "vq", "softmax", "discrete")
#: What args.yaml says of each kind of training, and whether the heads have a bias then.
TRAININGS = {
    "sft": ({"training_task": "sft", "mt_lora_path": None}, True),
    "sft-offset": ({"training_task": "sft", "mt_lora_path": "some/lora"}, False),
    "recon-z": ({"training_task": "recon", "factorized": True, "pred_z_score": True}, False),
    "recon-raw": ({"training_task": "recon", "factorized": True, "pred_z_score": False}, True),
    "recon-delta": (
        {"training_task": "recon", "factorized": False, "pred_z_score": False, "delta_w_scaling": 400},
        True,
    ),
}
#: Module -> (in, out): more outputs than inputs, more inputs than outputs, and neither; no sizes of vectors.
MODULES = {"up_proj": (24, 41), "q_proj": (24, 24), "down_proj": (41, 19)}
MATRIX = re.compile(r"(task_encoder\.mlp\.[03]|mixer\.[14]|mlp[12]\.mlp\.[14]|mlp3\.[14]|heads\.\w+)\.weight")


def checkpoint(
    variant, encoder="linear", training="sft", modules=None, layers=3, rank=3, embed=14, latent=20, head_in=18, seed=0
):
    """(state_dict, args, adapter_config) of a random checkpoint in Sakana format, keys in SakanaAI's order.

    All dictionaries of the last step are non-zero, those that ``training`` does not apply included.
    """
    modules = modules or MODULES
    shared, autoregressive, learnable = FLAGS[variant]
    training_args, head_bias = TRAININGS[training]
    latent = 128 if encoder == "discrete" else latent
    t, d = latent // 2, latent // 4
    m = t + layers + len(modules) if encoder == "discrete" else t + 2 * d
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def randn(key, *shape, scale=1.0, shift=0.0):
        state[key] = torch.randn(shape, generator=generator) * scale + shift

    def linear(key, n_in, n_out, bias=True):
        randn(f"{key}.weight", n_out, n_in, scale=n_in**-0.5)
        if bias:
            randn(f"{key}.bias", n_out, scale=0.2)

    def norm(key, width):
        randn(f"{key}.weight", width, scale=0.2, shift=1.0)
        randn(f"{key}.bias", width, scale=0.2)

    for dictionary in ("AB_offset", "mean_recon_target", "std_recon_target"):
        for side in "AB":
            for name in sorted(modules):
                n_in, n_out = modules[name]
                key = f"{dictionary}.{side}.{name}"
                randn(key, layers, *((rank, n_in) if side == "A" else (n_out, rank)), scale=0.5)
                if dictionary.startswith("std"):
                    state[key].abs_()
    if encoder == "linear":
        linear("task_encoder.mlp.0", embed, t)
        norm("task_encoder.mlp.1", t)
    elif encoder == "discrete":
        linear("task_encoder.mlp.0", embed, 256)
        linear("task_encoder.mlp.3", 256, 64)
    else:
        randn("task_encoder.embed", *((t, 32) if encoder == "vq" else (32, t)))
        if encoder == "vq":
            randn("task_encoder.cluster_size", 32)
            randn("task_encoder.embed_avg", t, 32)
        linear("task_encoder.mlp.0", embed, 4 * t)
        linear("task_encoder.mlp.3", 4 * t, t if encoder == "vq" else 32)
        norm("task_encoder.ln", t)
    if encoder != "discrete":
        for key, count in (("layer_depth_encoder", layers), ("layer_type_encoder", len(modules))):
            randn(f"{key}.0.weight", count, d)
            norm(f"{key}.1", d)
    linear("mixer.1", m, 4 * m)
    linear("mixer.4", 4 * m, m)
    for block, out in (("mlp1.mlp", m), ("mlp2.mlp", m), ("mlp3", head_in)):
        norm(f"{block}.0", m)
        linear(f"{block}.1", m, 4 * m)
        linear(f"{block}.4", 4 * m, out)
    if learnable:
        randn("pos_emb.0.weight", rank, m)
        norm("pos_emb.1", m)
    if shared:
        for name in modules:
            for side in "AB":
                randn(f"out_emb.{name}.{side}", m)
        norm("out_emb_norm", m)
    for name, (n_in, n_out) in modules.items():
        width = max(n_in, n_out) if shared else n_in + n_out
        linear(f"heads.{name}", head_in, width if autoregressive else rank * width, bias=head_bias)
    flags = dict(zip(("shared_AB_head", "autoreg_gen", "learnable_pos_emb"), FLAGS[variant], strict=True))
    args = {**flags, **training_args, "hypernet_latent_size": latent, "head_in_size": head_in, "emb_model": "gte-tiny"}
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "use_rslora": True, "target_modules": list(modules)}
    return state, args, peft


def write(folder, state, args, peft):
    """A checkpoint folder in Sakana format."""
    folder.mkdir()
    torch.save(state, folder / "hypermod.pt")
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return folder


def cast(state, dtype):
    """``state`` with the matrices of its linear layers rounded to ``dtype``, all float64."""
    return {key: (value.to(dtype) if MATRIX.fullmatch(key) else value).double() for key, value in state.items()}


def silu(x):
    return x * torch.sigmoid(x)


def rope(x, position):
    m = x.shape[-1]
    frequencies = position * 10000.0 ** (-2 * torch.arange(m // 2, dtype=torch.float64) / m)
    angles = torch.cat((frequencies, frequencies))
    return x * angles.cos() + torch.cat((-x[..., m // 2 :], x[..., : m // 2]), dim=-1) * angles.sin()


def adapters(state, args, task_emb, inputs=torch.float64):
    """(encoded task ``[N, t]``, {module: (A ``[N, n, r, in]``, B ``[N, n, out, r]``)}), float64.

    ``inputs``: what the inputs of the products behind the task encoder are rounded to.
    """
    p = {key: value.double() for key, value in state.items()}

    def norm(key, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * p[f"{key}.weight"] + p[f"{key}.bias"]

    def linear(key, x, dtype=inputs):
        return x.to(dtype).double() @ p[f"{key}.weight"].mT + p.get(f"{key}.bias", 0)

    def block(key, x):
        return silu(linear(f"{key}.4", silu(linear(f"{key}.1", norm(f"{key}.0", x)))))

    def residual(key, x):
        return x + block(f"{key}.mlp", x)

    def encode(e):
        exact = torch.float64
        x = linear("task_encoder.mlp.0", e, exact)
        if "task_encoder.mlp.3.weight" not in p:
            return norm("task_encoder.mlp.1", x)
        x = linear("task_encoder.mlp.3", silu(x), exact)
        if "task_encoder.embed" not in p:
            return torch.stack([torch.eye(64, dtype=exact)[row.argmax()] for row in x])
        codes = p["task_encoder.embed"]
        if "task_encoder.cluster_size" in p:
            nearest = [min(codes.mT, key=lambda code, row=row: float((row - code).norm())) for row in x]
            return norm("task_encoder.ln", torch.stack(nearest))
        return norm("task_encoder.ln", x.exp() / x.exp().sum(dim=-1, keepdim=True) @ codes)

    def embedding(key, row, count):
        if f"{key}.0.weight" in p:
            return norm(f"{key}.1", p[f"{key}.0.weight"][row])
        return torch.eye(count, dtype=torch.float64)[row]

    def position(k):
        return norm("pos_emb.1", p["pos_emb.0.weight"][k])

    def head(name, u):
        return linear(f"heads.{name}", block("mlp3", u))

    def shared(name, x, side, rank):
        """Rows ``[N, r, max(in, out)]`` of one side."""
        u = residual("mlp2", x + norm("out_emb_norm", p[f"out_emb.{name}.{side}"]))
        if not args["autoreg_gen"]:
            return head(name, u).unflatten(-1, (rank, -1))
        if args["learnable_pos_emb"]:
            at = [u + residual("mlp2", position(k)) for k in range(rank)]
        else:
            at = [residual("mlp2", rope(u, k)) for k in range(rank)]
        return torch.stack([head(name, u) for u in at], dim=1)

    def unshared(name, x, rank, n_in, n_out):
        """Rows ``[N, r, in]`` and ``[N, r, out]``."""
        if not args["autoreg_gen"]:
            y = head(name, residual("mlp2", x))
            return y[:, : rank * n_in].unflatten(-1, (rank, n_in)), y[:, rank * n_in :].unflatten(-1, (rank, n_out))
        at = [x + position(k) if args["learnable_pos_emb"] else rope(x, k) for k in range(rank)]
        y = torch.stack([head(name, residual("mlp2", u)) for u in at], dim=1)
        return y[..., :n_in], y[..., n_in:]

    def last_step(v, side, name, layer):
        where = f"{side}.{name}"
        if args["training_task"] == "recon" and not args["factorized"]:
            return v / args["delta_w_scaling"] ** 0.5
        if args["training_task"] == "recon" and args["pred_z_score"]:
            v = v * (p[f"std_recon_target.{where}"][layer] + 1e-10) + p[f"mean_recon_target.{where}"][layer]
        return v + p[f"AB_offset.{where}"][layer]

    z = encode(task_emb.double())
    modules = [key.split(".")[1] for key in state if key.startswith("heads.") and key.endswith(".weight")]
    found = {}
    for i, name in enumerate(modules):
        layers, rank, n_in = state[f"AB_offset.A.{name}"].shape
        n_out = state[f"AB_offset.B.{name}"].shape[1]
        lora_A, lora_B = [], []
        for layer in range(layers):
            depth = embedding("layer_depth_encoder", layer, layers)
            kind = embedding("layer_type_encoder", i, len(modules))
            x = torch.cat((z, depth.expand(len(z), -1), kind.expand(len(z), -1)), dim=-1)
            x = residual("mlp1", silu(linear("mixer.4", silu(linear("mixer.1", x)))))
            if args["shared_AB_head"]:
                a, b = shared(name, x, "A", rank)[..., :n_in], shared(name, x, "B", rank)[..., :n_out]
            else:
                a, b = unshared(name, x, rank, n_in, n_out)
            lora_A.append(last_step(a, "A", name, layer))
            lora_B.append(last_step(b.mT, "B", name, layer))
        found[name] = torch.stack(lora_A, dim=1), torch.stack(lora_B, dim=1)
    return z, found
