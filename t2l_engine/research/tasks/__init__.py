"""Task data: folders of examples, imports, splits, manifests, decontamination.

May be imported: ``folder`` (Task, load_tasks, write_tasks), ``examples``, ``manifest``, ``benchmarks``, ``sni``,
``decontaminate``.  Imports ``files``; ``manifest`` reads the packaged manifest of ``t2l_specs`` by that package.
"""
