"""What engines import, for a fork server to have imported already: see `fork_server`. Imported by nobody else."""

from __future__ import annotations

import signal

# A whole group may be told to stop, and its engines go on for a while.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import vllm.model_executor.model_loader  # noqa: E402
import vllm.v1.engine.core  # noqa: E402, F401

import decar.server.vllm_adapter.executor  # noqa: E402
import decar.server.vllm_adapter.runner_v1  # noqa: E402
import decar.server.vllm_adapter.scheduler  # noqa: E402
import decar.server.vllm_adapter.worker  # noqa: E402, F401
