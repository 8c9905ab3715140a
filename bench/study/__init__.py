"""The study: T2L on SmolLM2 beside what a user would do instead, with controls.  ``python -m bench study``."""
