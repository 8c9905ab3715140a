"""A suite of specifications made by code: families with parameters, described in many wordings, in task splits.

May be imported: ``suite`` (suite, task, digest, leaks), ``fixed`` (the packaged manifest).
"""
