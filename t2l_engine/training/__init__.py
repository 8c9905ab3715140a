"""Training of hypernetworks; never imported by the core."""
