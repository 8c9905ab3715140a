"""Settings of the plugin, from environment variables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from t2l_engine.hypernetwork.folder import bundled_checkpoints, format_of, resolve_checkpoint
from t2l_engine.text.packaged import cache_dir

PREFIX = "T2L_VLLM_"
#: Names of the environment variables without PREFIX.
VARIABLES = ("CHECKPOINT", "KERNELS", "MODE", "STORE", "STORE_BYTES", "MAX_NAMES", "THREADS", "WARMUP")
DISK, MEMORY = "disk", "memory"

_SHARED_MEMORY = Path("/dev/shm")
_MIN_FREE = 1 << 30  # bytes that must be free in shared memory for the store to be there by default
_STORE_BYTES, _MAX_NAMES = 4 << 30, 100_000


@dataclass(frozen=True)
class Settings:
    """Values of ``T2L_VLLM_*``.

    ``checkpoints``: short name -> argument of ``TextToLoRA.from_pretrained``, the default first; empty: the resolver is off.
    ``kernels``: replace vLLM's LoRA operators.  ``mode``: "disk", PEFT folders, or "memory", folders without weights, which
    each worker generates.  ``store``: folder of the adapters; ``store_bytes``: most bytes in it.  ``max_names``: most
    adapters a server may name.  ``threads``: torch's, for generation.  ``warmup``: load the default checkpoint at the start.
    """

    checkpoints: dict[str, str]
    kernels: bool
    mode: str
    store: Path
    store_bytes: int
    max_names: int
    threads: int
    warmup: bool

    def checkpoint_name(self, given: str | None) -> str:
        """``given``, or the default's name for None; ValueError lists the known ones if there is no such checkpoint."""
        name = next(iter(self.checkpoints), None) if given is None else given
        if name not in self.checkpoints:
            raise ValueError(f"checkpoint: expected one of {list(self.checkpoints)}, got {name!r}")
        return name

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; an empty one counts as unset.

        Raises ValueError, naming the variable, for an unknown variable, an invalid value or a missing checkpoint.
        """
        unknown = sorted(name for name in environ if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in VARIABLES)
        if unknown:
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(PREFIX + name for name in VARIABLES)}")
        values = {name: environ.get(PREFIX + name, "").strip() for name in VARIABLES}
        checkpoints = _checkpoints(values["CHECKPOINT"])
        store, room = (Path(values["STORE"]), _STORE_BYTES) if values["STORE"] else _default_store()
        return cls(
            checkpoints=checkpoints,
            kernels=_choice("KERNELS", values, ("0", "1"), "1" if checkpoints else "0") == "1",
            mode=_choice("MODE", values, (DISK, MEMORY), MEMORY if checkpoints else DISK),
            store=store,
            store_bytes=_count("STORE_BYTES", values, room),
            max_names=_count("MAX_NAMES", values, _MAX_NAMES),
            threads=_count("THREADS", values, 1),
            warmup=_choice("WARMUP", values, ("0", "1"), "0") == "1",
        )


def _checkpoints(text: str) -> dict[str, str]:
    """Short name -> checkpoint, of a comma-separated list of bundled names and folders."""
    found: dict[str, str] = {}
    for source in filter(None, (part.strip() for part in text.split(","))):
        try:
            folder = resolve_checkpoint(source)
            format_of(folder)
        except OSError as error:
            raise ValueError(f"{PREFIX}CHECKPOINT: {error}") from None
        name = source if source in bundled_checkpoints() else folder.resolve().name
        if not name or ":" in name or "/" in name:
            raise ValueError(f"{PREFIX}CHECKPOINT: expected folders whose names are without ':', got {source!r}")
        if name in found:
            raise ValueError(f"{PREFIX}CHECKPOINT: expected folders of different names, got {found[name]!r} and {source!r}")
        found[name] = source
    if text and not found:
        raise ValueError(f"{PREFIX}CHECKPOINT: expected bundled names or folders, got {text!r}")
    return found


def _choice(name: str, values: Mapping[str, str], allowed: tuple[str, ...], default: str) -> str:
    text = values[name] or default
    if text not in allowed:
        raise ValueError(f"{PREFIX}{name}: expected one of {', '.join(allowed)}, got {text!r}")
    return text


def _count(name: str, values: Mapping[str, str], default: int) -> int:
    text = values[name]
    if text and not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text)):
        raise ValueError(f"{PREFIX}{name}: expected a positive whole number, got {text!r}")
    return int(text) if text else default


def _default_store() -> tuple[Path, int]:
    """(folder of the store, most bytes in it).

    In shared memory if that has room or a store already, and then at most half of it: other programs need it too (vLLM's
    processes, NCCL).  Else in the user's cache folder.
    """
    if _SHARED_MEMORY.is_dir():
        own, usage = _SHARED_MEMORY / f"t2l-{os.getuid()}", shutil.disk_usage(_SHARED_MEMORY)
        if usage.free > _MIN_FREE or own.is_dir():
            return own, min(_STORE_BYTES, usage.total // 2)
    return cache_dir() / "adapters", _STORE_BYTES
