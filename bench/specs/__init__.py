"""The training study of smollm2-135m-specs: T2L on thousands of specifications made by code.  ``python -m bench specs``."""
