"""Task data: import, splits, manifests, decontamination, a synthetic suite; without torch, never imported by the core."""
