"""Tables, pages and figures from ``bench/results``: ``python -m bench report [--check]``, ``python -m bench table NAME``."""
