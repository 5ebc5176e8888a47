"""The pooler that leaves rows in the plane, with vLLM's own metadata and a head of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn
from vllm.pooling_params import PoolingParams
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from decar.server.protocol.flow import FLOW_KEY, FLOW_TASK, ROWS_BYTES, Denoising, entries_of
from decar.server.protocol.plane import Plane
from decar.server.vllm_adapter import flow_worker
from decar.server.vllm_adapter.flow_worker import RowsPooler

V, PADDED, H, MASK = 7, 9, 4, 5


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane.create(2, 4, V, 16)
    made.fields["rows"][:] = np.nan
    yield made
    made.unlink()


def asked(lengths: Sequence[int], *parts: Denoising | None) -> PoolingMetadata:
    """What vLLM says of a batch of sequences."""
    extra = [None if part is None else {FLOW_KEY: part.to_wire()} for part in parts]
    metadata = PoolingMetadata(
        prompt_lens=torch.tensor(lengths),
        prompt_token_ids=None,
        prompt_token_ids_cpu=None,
        pooling_params=[PoolingParams(task=FLOW_TASK, extra_kwargs=each) for each in extra],
        pooling_states=[PoolingStates() for _ in parts],
    )
    metadata.build_pooling_cursor(np.array(lengths), torch.tensor(lengths), torch.device("cpu"))
    return metadata


@pytest.mark.parametrize("at_once", [1 << 23, 3 * V])
def test_rows_go_to_their_entries_and_scores_back(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Also where the head computes few at a time; the padding of a vocabulary, and the mask, have no part."""
    monkeypatch.setattr(flow_worker, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, PADDED), torch.randn(9, H)
    logits = head(hidden).detach()[:, :V]
    logits[:, MASK] = -torch.inf
    rows, log_normalisers = plane.fields["rows"][1], plane.fields["log_normaliser"][1]
    pooler = RowsPooler(head, torch.from_numpy(rows), torch.from_numpy(log_normalisers), plane.blocks[1])
    with torch.inference_mode():
        said = pooler(
            hidden,
            asked(
                (4, 5),
                Denoising(MASK, np.array([3, 1]), entries=np.array([6, 2])),
                Denoising(MASK, np.array([0, 2, 4]), tokens=np.array([1, 6, MASK])),
            ),
        )
    assert rows[[6, 2]] == pytest.approx(logits[[3, 1]].numpy())
    assert log_normalisers[[6, 2]] == pytest.approx(logits[[3, 1]].logsumexp(dim=1).numpy())
    assert np.isnan(rows[[0, 1, 3, 4, 5, 7]]).all()
    assert np.isnan(plane.fields["rows"][0]).all()
    scores = logits[[4, 6, 8]].log_softmax(dim=1)[[0, 1, 2], [1, 6, MASK]]
    assert [len(part) for part in said] == [0, 3]
    assert said[1].numpy() == pytest.approx(scores.numpy())
    assert plane.blocks[1].counted()["scored_tokens"] == 3


def test_vllm_may_try_out_how_much_memory_it_needs(plane: Plane) -> None:
    fields = (torch.from_numpy(plane.fields[name][0]) for name in ("rows", "log_normaliser"))
    pooler = RowsPooler(nn.Linear(H, PADDED), *fields, plane.blocks[0])
    assert [len(part) for part in pooler(torch.zeros(4, H), asked((2, 2), None, None))] == [0, 0]
    assert pooler.get_supported_tasks() == {FLOW_TASK}


@pytest.mark.parametrize(
    ("slots", "positions", "vocab_size", "entries"),
    [
        (2, 15, 100, 30),  # all that can be masked at once
        (256, 512, 32_768, 512),  # as many as fit: exactly one text's
        (256, 513, 32_768, 514),  # one text, in any case
        (256, 512, 1024, ROWS_BYTES // 4096),
    ],
)
def test_there_is_room_for_what_fits_and_for_one_text(
    slots: int, positions: int, vocab_size: int, entries: int
) -> None:
    assert entries_of(slots, positions, vocab_size) == entries
