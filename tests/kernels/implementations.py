"""The implementations of the mixing operations that can run here: compiled on a GPU, interpreted elsewhere."""

from types import ModuleType

import torch

from decar.kernels import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = [reference, fused]


def name_of(implementation: ModuleType) -> str:
    return implementation.__name__.rpartition(".")[2]
