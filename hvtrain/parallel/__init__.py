"""Parallelism as functions over a single-device model: process groups, exact
attention over ranks, recompute."""
