"""Whose statistics a line of vLLM's log has."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.loggers import LoggingStatLogger, PerEngineStatLoggerAdapter, PrometheusStatLogger

from decar.server.vllm_adapter.metrics import named_log, without_nameless_log


def made(kind: type, **attributes: Any) -> Any:
    """One of vLLM's loggers without the configuration that it is made of."""
    logger = object.__new__(kind)
    vars(logger).update(attributes)
    return logger


def test_lines_begin_with_the_experts_name() -> None:
    assert made(named_log("code"), engine_index=0).log_prefix == "code: "


def test_vllms_own_lines_are_taken_out_and_nothing_else() -> None:
    own = made(PerEngineStatLoggerAdapter, per_engine_stat_loggers={0: made(named_log("code"))})
    vllms = made(PerEngineStatLoggerAdapter, per_engine_stat_loggers={0: made(LoggingStatLogger)})
    prometheus = made(PrometheusStatLogger)
    manager = SimpleNamespace(stat_loggers=[prometheus, own, vllms])
    without_nameless_log(manager)
    assert manager.stat_loggers == [prometheus, own]
