"""Independently trained language models, served as one: the parts are `decar.server`, `decar.router` and so on.

Knows the version, and that each top-level folder of a checkout holds one part: in a wheel they lie together.
"""

import importlib.metadata
import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
try:
    __version__ = importlib.metadata.version("decar")
except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "not installed"
