"""The hypernetwork, from task embeddings to adapters; its configuration and checkpoints in native and Sakana format.

May be imported: ``network`` (HyperNetwork), ``perceiver`` (PerceiverHyperNetwork), ``modules``, ``config``,
``checkpoint``, ``folder`` (CheckpointError, Contents, bundled_checkpoints), ``convert``, ``export``.  Imports
``adapters``, ``text``, ``ops`` and ``files``.
"""
