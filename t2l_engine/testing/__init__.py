"""Op cases, tolerances, oracles and backends that tests, benchmarks and the self-check share.

May be imported: ``cases``, ``numerics``, ``oracle``, ``backends``, ``models``, ``counter``, ``selfcheck``.  Imports ``ops``,
``hypernetwork``, ``text`` and ``research.costs``.
"""
