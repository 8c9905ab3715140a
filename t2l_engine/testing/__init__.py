"""Op cases, checks, tolerances, oracles and backends that tests, benchmarks and the self-check share.

May be imported: ``cases``, ``checks``, ``numerics``, ``oracle``, ``backends``, ``models``, ``selfcheck``.  Imports ``ops``,
``hypernetwork``, ``text`` and ``research.costs``.
"""
