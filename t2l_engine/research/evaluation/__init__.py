"""Evaluation of adapters on tasks: answers, scores, comparisons with controls.

May be imported: ``run`` (Evaluation), ``methods`` (the compared methods), ``answers``, ``metrics``, ``library`` (average,
Arrow), ``bootstrap``, ``sandbox``, ``plots``.  Imports ``tasks``, ``training.runs`` and the rooms of the engine.
"""
