"""Bytes from disk, bounded and atomic; nothing in a file is ever executed.

May be imported: ``errors`` (ConfigError), ``text`` (JSON, YAML's sibling readers), ``yaml``, ``weights`` (safetensors),
``torch_file``, ``patterns``.  Imports no other room.
"""
