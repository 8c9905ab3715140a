"""Text to adapters: the facade over encoder and hypernetwork."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from t2l_engine.adapters import AdapterStack
from t2l_engine.encoder import MINILM, TextEncoder
from t2l_engine.hypernetwork import HyperNetwork

BUNDLED = Path(__file__).resolve().parent / "checkpoints"


def bundled_checkpoints() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def resolve_checkpoint(name_or_folder: str | Path) -> Path:
    """The folder of a bundled checkpoint or of one on disk; FileNotFoundError lists the bundled names."""
    if str(name_or_folder) in bundled_checkpoints():
        return BUNDLED / str(name_or_folder)
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint {str(name_or_folder)!r}: no such folder; bundled checkpoints: {bundled_checkpoints()}"
        )
    return folder


class TextToLoRA:
    """One call from sentences to LoRA adapters.  ``encoder`` and ``hypernetwork`` may be used alone."""

    def __init__(self, encoder: TextEncoder, hypernetwork: HyperNetwork):
        if encoder.embed_dim != hypernetwork.config.embed_dim:
            raise ValueError(
                f"encoder: expected embeddings of width {hypernetwork.config.embed_dim} as the hypernetwork was trained "
                f"with, got {encoder.embed_dim} from {encoder.config.name!r}"
            )
        self.encoder, self.hypernetwork = encoder, hypernetwork

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        encoder: TextEncoder | None = None,
        scaling: str | float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> TextToLoRA:
        """Load a bundled checkpoint by name ("smollm2-135m"), or a native or reference folder.

        ``encoder``: the text encoder, None = the one a native checkpoint names (else MiniLM).  Other arguments as in
        :meth:`HyperNetwork.from_pretrained`.
        """
        from t2l_engine.checkpoint import encoder_config

        folder = resolve_checkpoint(checkpoint)
        hypernetwork = HyperNetwork.from_pretrained(folder, scaling=scaling, dtype=dtype, device=device)
        if encoder is None:
            encoder = TextEncoder.from_pretrained(encoder_config(folder) or MINILM, device=device)
        return cls(encoder, hypernetwork)

    def generate(self, texts: Sequence[str]) -> AdapterStack:
        """One adapter a description, all in one pass.

        Raises ValueError for an empty list, an empty text or anything but strings; a description beyond the encoder's
        length is truncated with a warning.
        """
        return self.hypernetwork.generate(self.encoder.encode(texts))
