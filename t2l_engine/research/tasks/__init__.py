"""Task data: folders of examples, imports, splits, manifests, decontamination, synthetic suites.

May be imported: ``folder`` (Task, load_tasks, write_tasks), ``examples``, ``manifest``, ``benchmarks``, ``sni``,
``synthetic``, ``decontaminate``.  Imports ``files`` and ``t2l_specs``.
"""
