"""Op cases, checks, tolerances and oracles that tests, benchmarks and the self-check share.

May be imported: ``cases``, ``checks``, ``numerics``, ``oracle``, ``selfcheck``.  Imports ``ops``, ``hypernetwork`` and
``text``.
"""
