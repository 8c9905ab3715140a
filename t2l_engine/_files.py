"""Reading and writing folders of files: shared by checkpoints and adapters."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor


def write_folder(
    directory: Path, weights_name: str, state: dict[str, Tensor], config_name: str, config: dict[str, Any]
) -> None:
    """Write a safetensors and a JSON file into ``directory``; files already there are replaced only by complete ones."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        save_file(state, Path(temporary) / weights_name, metadata={"format": "pt"})
        (Path(temporary) / config_name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (weights_name, config_name):
            os.replace(Path(temporary) / name, directory / name)


def read_safetensors(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """The tensors of ``path``; ``error`` names a file that is no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as reason:
        raise error(f"{path}: not a readable safetensors file: {reason}") from None
