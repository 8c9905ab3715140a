"""Task data: folders of examples, imports, splits, manifests, decontamination, a synthetic suite.

May be imported: ``folder`` (Task, load_tasks, write_tasks), ``examples``, ``manifest``, ``benchmarks``, ``sni``,
``synthetic``, ``decontaminate``.  Imports ``files``.
"""
