"""Ensembles on disk and the arithmetic of expert weights. Knows nothing about HTTP or vLLM."""

from decar.router.errors import DecarError, EnsembleError
from decar.router.manifest import Ensemble, ExpertEntry, Manifest, Mixing, RouterEntry, write_manifest
from decar.router.posterior import log_normalise, log_prior, log_weights_after

__all__ = [
    "DecarError",
    "Ensemble",
    "EnsembleError",
    "ExpertEntry",
    "Manifest",
    "Mixing",
    "RouterEntry",
    "log_normalise",
    "log_prior",
    "log_weights_after",
    "write_manifest",
]
