"""The training study of the bundled checkpoints: T2L, its rivals, all on the same tasks.  ``python -m bench quality``."""
