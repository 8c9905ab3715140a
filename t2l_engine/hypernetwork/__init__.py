"""From task embeddings or hidden states to adapters; checkpoints in the native, Sakana and Doc-to-LoRA formats.

May be imported: ``network`` (HyperNetwork), ``perceiver`` (PerceiverHyperNetwork), ``pointer`` (PointerHyperNetwork),
``tokens`` (TokenHyperNetwork), ``modules``, ``config``, ``checkpoint``, ``folder`` (CheckpointError, Contents,
bundled_checkpoints), ``convert``, ``export``.  Imports ``adapters``, ``text``, ``ops`` and ``files``.
"""
