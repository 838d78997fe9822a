"""LORAID: who owns what of a model."""
