"""Evaluation of adapters on tasks: answers, scores, comparisons with baselines.

May be imported: ``run`` (Evaluation), ``settings``, ``methods``, ``answers``, ``metrics``, ``library`` (average, arrow),
``sandbox``.  Imports ``tasks``, ``training.runs`` and the rooms of the engine.
"""
