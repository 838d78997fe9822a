"""Diffusion transformers for video: encode, train, generate."""

__version__ = "0.1.0"
