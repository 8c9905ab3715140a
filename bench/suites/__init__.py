"""The suites of ``python -m bench``: each has a ``plan`` that gives its tasks."""
