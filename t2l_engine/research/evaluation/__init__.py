"""Judging adapters on tasks; never imported by the core."""
