"""Diffusion transformers for video: encode, train, generate."""

from pkgutil import extend_path

__version__ = "0.1.0"
# A folder `hvtrain/models/NAME` below any directory on Python's path is an architecture too:
# one's own need not lie in here.
__path__ = extend_path(__path__, __name__)
