"""Ensembles on disk and the arithmetic of expert weights. Knows nothing about HTTP or vLLM."""

from decar.router.active import active_experts, drawn, prune, restricted, top_k
from decar.router.changes import Changes, Reading, changes
from decar.router.errors import DecarError, EnsembleError
from decar.router.manifest import Ensemble, ExpertEntry, Manifest, Mixing, RouterEntry, write_manifest
from decar.router.posterior import log_normalise, log_prior, log_weights_after, moved_on
from decar.router.routers import (
    ImageRouter,
    Router,
    available_routers,
    load_router,
    load_trained,
    load_trained_images,
)

__all__ = [
    "Changes",
    "DecarError",
    "Ensemble",
    "EnsembleError",
    "ExpertEntry",
    "ImageRouter",
    "Manifest",
    "Mixing",
    "Reading",
    "Router",
    "RouterEntry",
    "active_experts",
    "available_routers",
    "changes",
    "drawn",
    "load_router",
    "load_trained",
    "load_trained_images",
    "log_normalise",
    "log_prior",
    "log_weights_after",
    "moved_on",
    "prune",
    "restricted",
    "top_k",
    "write_manifest",
]
