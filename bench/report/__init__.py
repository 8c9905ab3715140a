"""Pages, figures and tables from ``bench/results``: ``python -m bench report [--check]``, ``python -m bench table [NAME]``."""
