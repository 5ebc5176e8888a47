"""vLLM's own Prometheus metrics and statistics, for K engines in one process. Knows vLLM's stat loggers."""

from __future__ import annotations

import threading
from typing import Any

from vllm.v1.metrics.loggers import LoggingStatLogger, PerEngineStatLoggerAdapter, PrometheusStatLogger


class SharedMetrics:
    """One set of `vllm:*` metrics, labelled by engine: engine 0 is the manifest's first expert.

    vLLM's own logger would unregister every metric of an engine built earlier in the same process.
    """

    def __init__(self, experts: int):
        self._experts = experts
        self._logger: PrometheusStatLogger | None = None
        self._announced = False
        self._lock = threading.Lock()  # engines are built in threads of their own

    def logger(self, vllm_config: Any) -> PrometheusStatLogger:
        with self._lock:
            if self._logger is None:
                self._logger = PrometheusStatLogger(vllm_config, list(range(self._experts)))
            return self._logger

    def factory_for(self, expert: int) -> type[PrometheusStatLogger]:
        """A stat logger class, as `AsyncLLM` asks for one, that records as engine ``expert``."""
        shared = self

        class ExpertMetrics(PrometheusStatLogger):
            def __init__(self, vllm_config: Any, engine_indexes: Any = None):
                self._logger = shared.logger(vllm_config)

            def record(self, *args: Any, **kwargs: Any) -> None:
                kwargs["engine_idx"] = expert
                self._logger.record(*args, **kwargs)

            def log_engine_initialized(self) -> None:
                if expert == 0 and not shared._announced:  # its next engine would register them again
                    shared._announced = True
                    self._logger.log_engine_initialized()

            def record_admission_rejection(self, *args: Any, **kwargs: Any) -> None:
                self._logger.record_admission_rejection(*args, **kwargs)

            def record_sleep_state(self, *args: Any, **kwargs: Any) -> None:
                self._logger.record_sleep_state(*args, **kwargs)

        return ExpertMetrics


def named_log(name: str) -> type[LoggingStatLogger]:
    """A stat logger class whose lines in the log have an expert's name: vLLM would call every engine "Engine 000"."""

    class NamedLog(LoggingStatLogger):
        @property
        def log_prefix(self) -> str:
            return f"{name}: "

    return NamedLog


def without_nameless_log(manager: Any) -> None:
    """Take the logger that vLLM adds by itself out of an engine's `StatLoggerManager`."""
    manager.stat_loggers = [
        logger
        for logger in manager.stat_loggers
        if not isinstance(logger, PerEngineStatLoggerAdapter)
        or any(type(each) is not LoggingStatLogger for each in logger.per_engine_stat_loggers.values())
    ]
