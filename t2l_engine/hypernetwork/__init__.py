"""From an embedding to adapters: the hypernetwork, its configuration and its checkpoints in both formats.

May be imported: ``network`` (HyperNetwork), ``config``, ``checkpoint``, ``folder`` (CheckpointError, bundled_checkpoints),
``convert``.  Imports ``adapters``, ``text``, ``ops`` and ``files``.
"""
