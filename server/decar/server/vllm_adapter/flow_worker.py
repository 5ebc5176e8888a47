"""The worker of a flow ensemble's engine: rows of masked positions go to the plane, and nothing of them to the gateway.

vLLM serves `BertForMaskedLM` as a pooling model whose head computes [T, V] numbers that travel to the API server. Here
the head runs at the positions that a request names, and the pooler leaves its rows where the gateway mixes them.

Shapes: T tokens of a batch, n positions, E entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.pooler.abstract import Pooler

from decar.server.protocol.flow import FLOW_TASK, Denoising
from decar.server.protocol.plane import Block, Plane
from decar.server.vllm_adapter.expert_worker import ExpertWorker
from decar.server.vllm_adapter.failures import ReportingConfig
from decar.server.vllm_adapter.ranks import Ranks

if TYPE_CHECKING:
    from vllm.tasks import PoolingTask
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.pool.metadata import PoolingMetadata

_LOGITS_AT_ONCE = 1 << 23
"""32 MiB of float32."""


class FlowWorker(ExpertWorker):
    """A vLLM worker of a masked-language model."""

    def init_device(self) -> None:
        super().init_device()
        config: ReportingConfig = self.vllm_config.additional_config
        plane = Plane.attach(config.plane) if Ranks().first else Plane.of_nobody(config.plane)
        self._block = plane.blocks[config.expert]
        fields = plane.fields
        self._rows = fields["rows"][config.expert], fields["log_normaliser"][config.expert]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        rows, log_normalisers = map(torch.from_numpy, self._rows)
        model.pooler = RowsPooler(model.mlm_head, rows, log_normalisers, self._block)
        model.mlm_head = nn.Identity()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._block.beat()
        self._block.count("steps")
        with self._block.timed("forward_ns"):
            return super().execute_model(scheduler_output)


class RowsPooler(Pooler):
    """Writes what each sequence of a batch is asked for.

    Args:
        head: makes logits [n, V'] of hidden states [n, H]; V' may be larger than V.
        rows, log_normalisers: [E, V] and [E] float32, in shared memory.
        block: counts.
    """

    def __init__(self, head: nn.Module, rows: torch.Tensor, log_normalisers: torch.Tensor, block: Block):
        super().__init__()
        self.head = head
        self._entries, self._log_normalisers, self._block = rows, log_normalisers, block
        self._at_once = max(_LOGITS_AT_ONCE // rows.shape[1], 1)

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {FLOW_TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor]:
        """Gives of each sequence the log-probabilities [n] that it is asked for, in float32; else nothing, [0]."""
        cursor = pooling_metadata.get_pooling_cursor()
        assert not cursor.is_partial_prefill(), "what looks both ways is computed as a whole"
        begins = np.cumsum([0, *cursor.num_scheduled_tokens_cpu.tolist()])
        wanted = [Denoising.of(params.extra_kwargs) for params in pooling_metadata.pooling_params]
        parts = [
            _Part.of(part, begin) for part, begin in zip(wanted, begins, strict=False) if part is not None
        ]
        nothing = torch.zeros(0)
        if len(parts) < len(wanted):  # vLLM tries out how much memory it needs
            return [nothing] * len(wanted)
        columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        batches = zip(*(column.split(self._at_once) for column in columns), strict=True)
        said = torch.cat([self._write(hidden_states, *batch) for batch in batches])
        answers = zip(parts, said.split([len(part.positions) for part in parts]), strict=True)
        return [answer if (part.tokens >= 0).any() else nothing for part, answer in answers]

    def _write(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        entries: torch.Tensor,
        tokens: torch.Tensor,
        mask_token_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Rows of ``positions`` [n] of the batch to ``entries`` [n], if not -1; log p [n] of ``tokens`` [n]."""
        logits = self.head(hidden_states[positions.to(hidden_states.device)]).float().cpu()
        logits = logits[:, : self._entries.shape[1]]
        logits.scatter_(1, mask_token_ids[:, None], -torch.inf)
        log_normalisers = logits.logsumexp(dim=1)
        self._block.count("scored_tokens", int((tokens >= 0).sum()))
        kept = entries >= 0
        self._entries[entries[kept]] = logits[kept]
        self._log_normalisers[entries[kept]] = log_normalisers[kept]
        return logits.gather(1, tokens.clamp(min=0)[:, None])[:, 0] - log_normalisers


class _Part(NamedTuple):
    """What one sequence is asked for, [n] each: where in the batch, and -1 where nothing is wanted."""

    positions: np.ndarray
    entries: np.ndarray
    tokens: np.ndarray
    mask_token_ids: np.ndarray

    @classmethod
    def of(cls, wanted: Denoising, begin: int) -> _Part:
        nothing = np.full(len(wanted.positions), -1, np.int64)
        return cls(
            begin + wanted.positions,
            nothing if wanted.entries is None else wanted.entries,
            nothing if wanted.tokens is None else wanted.tokens,
            np.full(len(wanted.positions), wanted.mask_token_id, np.int64),
        )
