"""What is chosen by a manifest's kind, before any engine is started."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from decar.router import Ensemble, Reading, changes
from decar.router.errors import EnsembleError, StartError
from decar.server.kinds import AutoregressiveKind, FlowKind, kind_of
from decar.server.metrics import FlowMetrics
from decar.server.protocol.plane import Plane
from decar.server.vllm_adapter.arguments import flow_engine_config
from tests.flow_reference import make_flow_ensemble


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flow_ensemble(
        tmp_path_factory.mktemp("kinds") / "flows", {"a": 1, "b": 2}, (1, 1), name="flows"
    )


def test_the_manifest_says_which(directory: Path) -> None:
    ensemble = Ensemble.load(directory)
    assert isinstance(kind_of(ensemble), FlowKind)
    other = ensemble.manifest.model_copy(update={"kind": "autoregressive", "flow": None})
    assert isinstance(kind_of(Ensemble(directory, other, ensemble.experts)), AutoregressiveKind)


@pytest.mark.parametrize(
    ("flag", "given"),
    [("--ray", ("auto", 1, 0)), ("--simulated-hosts", (None, 2, 0)), ("--wire-rows", (None, 1, 8))],
)
def test_flags_of_the_other_kind_are_refused(flag: str, given: tuple[str | None, int, int]) -> None:
    with pytest.raises(StartError, match=f"^{flag} is not offered for a flow ensemble"):
        FlowKind().refuse(*given)
    AutoregressiveKind().refuse(*given)
    FlowKind().refuse(None, 1, 0)


def test_an_expert_that_cannot_be_served_is_named(directory: Path) -> None:
    ensemble = Ensemble.load(directory)
    args = Namespace(tensor_parallel_size=2)
    with pytest.raises(StartError, match=r"'a'.*--tensor-parallel-size out"):
        flow_engine_config(ensemble, 0, args)
    ensemble.experts[1].config["architectures"] = ["ModernBertForMaskedLM"]
    with pytest.raises(
        StartError, match=r"'b' \(ModernBertForMaskedLM\) cannot be an expert of a flow ensemble"
    ):
        flow_engine_config(ensemble, 1, Namespace(tensor_parallel_size=1))


def test_what_a_reload_may_change(directory: Path) -> None:
    """How tokens are revealed; not what stands for those that are not."""
    before = Reading.of(directory)
    path = directory / "ensemble.json"
    text = path.read_text()
    manifest = json.loads(text)
    try:
        path.write_text(json.dumps({**manifest, "flow": {**manifest["flow"], "steps": 3}}))
        assert changes(before, Reading.of(directory)).rest == ("flow.steps",)
        path.write_text(json.dumps({**manifest, "flow": {"mask_token_id": 1}}))
        with pytest.raises(EnsembleError, match="mask token cannot change"):
            changes(before, Reading.of(directory))
    finally:
        path.write_text(text)


def test_metrics_of_flows_are_counted() -> None:
    plane = Plane.create(1, 2, 4, 4)
    registry = CollectorRegistry()
    metrics = FlowMetrics(plane, registry)
    metrics.round(5)
    metrics.stepped(2, 3)
    for name, value in {"rounds": 1, "rows": 5, "steps": 2, "tokens": 3}.items():
        assert registry.get_sample_value(f"decar:flow_{name}_total") == value
    plane.unlink()
