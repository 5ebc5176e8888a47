"""The kernels compile for a GPU, also where there is none: what the interpreter takes, the compiler may refuse."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from decar.kernels import fused

TYPES = {
    **dict.fromkeys(["buffers", "log_normalisers", "entries", "seeds", "positions", "tokens"], "*i64"),
    **dict.fromkeys(["out", "totals", "temperatures", "best"], "*fp32"),
    **dict.fromkeys(["log_weights", "new_log_weights"], "*fp64"),
    **dict.fromkeys(["finished", "best_token"], "*i32"),
    **dict.fromkeys(["V", "stride", "weights_stride"], "i32"),
}

def compiled(kernel, block, **constants):
    constants.update(K=3, LANES=4, CHUNKS=16, ELEMENT=tl.bfloat16, ALIGNED=True)
    constants.update(BLOCK=block, BLOCKS_PER_CHUNK=fused.CHUNK // block)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else TYPES[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for velocity in (True, False):
    assert "atom.global.gpu.acq_rel" in compiled(fused._decide_kernel, fused.DECIDE_BLOCK, VELOCITY=velocity)
    for anchored, normalise in ((True, False), (False, True), (False, False)):
        compiled(
            fused._mix_kernel, fused.MIX_BLOCK, VELOCITY=velocity, ANCHORED=anchored, NORMALISE=normalise
        )
"""


@pytest.mark.timeout(300)
def test_every_variant_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
