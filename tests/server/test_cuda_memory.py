"""GPU memory that another process maps and mixes in place."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from decar.kernels import Rows, mix, mix_rows
from decar.server.vllm_adapter.cuda_memory import CudaMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ENTRIES, VOCABULARY = 4, 1000
SIZE_BYTES = ENTRIES * VOCABULARY * 4


def _rows(expert: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(ENTRIES, VOCABULARY, generator=generator)


def _serve_rows(pipe: Connection) -> None:
    memory = CudaMemory(torch.device("cuda:0"))
    buffer, handle = memory.allocate(SIZE_BYTES)
    buffer.view(torch.float32).view(ENTRIES, VOCABULARY).copy_(_rows(1))
    memory.settle()
    pipe.send_bytes(handle)
    pipe.recv_bytes()  # lives until the other has read


def test_a_peers_rows_are_mixed_where_they_lie() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_serve_rows, args=(theirs,))
    peer.start()
    try:
        memory = CudaMemory(torch.device("cuda:0"))
        mapped = memory.open(ours.recv_bytes(), SIZE_BYTES).view(torch.float32).view(ENTRIES, VOCABULARY)
        logits = [_rows(0).cuda(), mapped]
        rows = Rows(logits, [expert.logsumexp(-1) for expert in logits])
        log_weights = torch.tensor([[0.3, 0.7]], device="cuda").log().expand(ENTRIES, -1)
        mixed = mix_rows(rows, torch.arange(ENTRIES, device="cuda"), log_weights, "velocity").log_softmax(-1)
        expected = mix(torch.stack([_rows(0), _rows(1)]), log_weights.cpu())
        torch.testing.assert_close(mixed.cpu(), expected, atol=2e-5, rtol=0)
    finally:
        ours.send_bytes(b"done")
        peer.join(60)
