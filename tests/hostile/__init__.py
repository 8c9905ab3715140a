"""Broken and hostile files, and how every loader must refuse them."""
