"""Mixing K experts' next-token distributions. Knows torch, and nothing about engines or requests."""

from decar.kernels.mix import mix

__all__ = ["mix"]
