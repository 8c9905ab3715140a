"""Pages, figures and tables from ``bench/results``: ``python -m bench report`` and ``python -m bench table``."""
