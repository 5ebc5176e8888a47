"""Mixing K experts' next-token distributions. Knows torch and Triton, and nothing about engines or requests."""

from decar.kernels.flow import Revealed, reveal, velocity
from decar.kernels.mix import decide, mix, mix_rows
from decar.kernels.rows import MAX_EXPERTS, Rows, Rule

__all__ = ["MAX_EXPERTS", "Revealed", "Rows", "Rule", "decide", "mix", "mix_rows", "reveal", "velocity"]
