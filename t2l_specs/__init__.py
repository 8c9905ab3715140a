"""Tasks made by code: a suite of specifications (families with parameters, in many wordings), and twelve small tasks.

May be imported: ``suite`` (suite, task, digest, leaks), ``fixed`` (the packaged manifest), ``synthetic`` (the twelve).
"""
