"""Slices as jobs: their record, and the backends that run them."""
