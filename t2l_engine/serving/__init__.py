"""Engines of others that serve the adapters of this package: a package for each.

No other room imports this one: a serving engine finds it by an entry point, ``t2l_vllm.register``.  Imports the engine and
the rooms below it, never ``research``.
"""
