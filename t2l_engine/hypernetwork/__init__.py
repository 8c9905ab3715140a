"""The hypernetwork, from task embeddings to adapters; its configuration and checkpoints in native and Sakana format.

May be imported: ``network`` (HyperNetwork), ``modules``, ``config``, ``checkpoint``, ``contents``, ``folder``
(CheckpointError, bundled_checkpoints), ``sakana_encoder``, ``convert``, ``export``.  Imports ``adapters``, ``text``, ``ops``
and ``files``.
"""
