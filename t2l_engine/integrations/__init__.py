"""Models and tools outside the core; imported only by name."""
