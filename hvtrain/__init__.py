"""Diffusion transformers for video: encode, train, generate."""
