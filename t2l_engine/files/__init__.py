"""Reads and writes files, bounded and atomic; nothing in a file is ever executed.

May be imported: ``errors`` (ConfigError, expect, short_repr), ``text`` (JSON, JSON Lines), ``yaml``, ``weights``
(safetensors, ``replacing``), ``torch_file``, ``patterns``.  Imports no other room.
"""
