"""Code in documents is right as far as that shows without a server: `tests/e2e/test_documents.py` runs the rest."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from PIL import Image

from decar.router.manifest import Manifest
from decar.server.gateway.flow_request import FlowOptions
from decar.server.gateway.request import DecarOptions
from decar.training.config import DataConfig, DocumentConfig, TrainConfig
from decar.training.data.sources import read_documents
from tests.commands import NoSuchCommand, check
from tests.documents import (
    DOCUMENTS,
    OWN,
    ROOT,
    Block,
    blocks,
    commands,
    every_block,
    inline_commands,
    name_of,
)

NOT_RUN = {
    "docs/clients.md": 4,
    "docs/bring-your-own.md": 1,
    "docs/operations.md": 1,
    "docs/scale.md": 1,
    "docs/terminal.md": 1,
}
"""How many blocks of a document are marked as not run."""
LANGUAGES = {"bash", "json", "python", "text", "yaml"}


def test_what_is_not_run_is_known() -> None:
    marked = [block for document in DOCUMENTS for block in blocks(document) if block.not_run]
    counted = Counter(name_of(block.document) for block in marked)
    assert counted == NOT_RUN, "\n".join(f"{block}: {block.not_run}" for block in marked)


def test_what_has_no_check_is_marked() -> None:
    unknown = [
        f"{block}: {block.language or 'no language'}"
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language not in LANGUAGES and not block.not_run
    ]
    assert not unknown, f"say which of {sorted(LANGUAGES)} it is, or why it is not run (tests/documents.py)"


def test_there_are_blocks_of_each_language() -> None:
    """Else they are no longer found."""
    assert {block.language for document in DOCUMENTS for block in blocks(document)} >= LANGUAGES


def test_a_marked_block_is_not_run_and_an_indented_command_is(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "# X\n\n<!-- not run: needs a cluster -->\n```js\nlet x;\n```\n\n    make test\n\nor\n\n    log p = x\n\n"
        "- item\n\n  ```yaml\n  a: 1\n  ```\n"
    )
    found = [(block.line, block.language, block.text, block.not_run) for block in blocks(document)]
    assert found == [
        (4, "js", "let x;\n", "needs a cluster"),
        (7, "bash", "make test\n", None),
        (16, "yaml", "a: 1\n", None),
    ]


# ---------------------------------------------------------------------------------------------- shell


@pytest.mark.parametrize("block", every_block("bash"), ids=str)
def test_shell_blocks_can_be_given(block: Block) -> None:
    syntax = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert syntax.returncode == 0, syntax.stderr
    found = list(commands(block.text))
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("block", every_block("text"), ids=str)
def test_what_a_text_block_commands_can_be_given(block: Block) -> None:
    for line in block.text.splitlines():
        prompt, command = line[:2], line[2:]
        if prompt == "$ ":
            for words in commands(command):
                check(words)
        assert line.split(" ")[0] not in OWN, (
            f"{block}: {line!r} is a command: make the block bash, or begin the line with '$ '"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_in_a_line_can_be_given(document: Path) -> None:
    for span in inline_commands(document):
        for words in commands(span):
            check(words, whole=False)


def test_commands_in_lines_are_found() -> None:
    assert "make seams VLLM=0.33.0" in inline_commands(ROOT / "docs/start.md")


def test_a_script_is_read_as_its_commands() -> None:
    script = """
    set=1 make test  # not this
    for pair in a:1 b:2; do
      ssh $host "cd work && nohup decar-train expert $expert x.yaml >$expert.log 2>&1 </dev/null &"
    done
    curl -d '{"a": "b;
    c"}' url \\
        | jq . && tools/x.sh
    experts=(code prose)
    """
    assert list(commands(script)) == [
        ["make", "test"],
        ["ssh", "$host", "cd work && nohup decar-train expert $expert x.yaml >$expert.log 2>&1 </dev/null &"],
        ["cd", "work"],
        ["decar-train", "expert", "$expert", "x.yaml"],
        ["curl", "-d", '{"a": "b;\n    c"}', "url"],
        ["jq", "."],
        ["tools/x.sh"],
    ]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("decar sevre DIR", "sevre"),
        ("decar serve", "directory"),
        ("decar serve DIR --prot 8000", "--prot"),
        ("decar serve DIR --port x", "port"),
        ("decar serve DIR --min-experts 0", "min-experts"),
        ("decar explain DIR x --no-such-flag", "--no-such-flag"),
        ("decar bench ttft DIR --no-such-flag", "--no-such-flag"),
        ("decar-train run", "CONFIG.yaml"),
        ("decar-train run configs/no.yaml", "configs/no.yaml"),
        ("decar-train run configs/demo.yaml --set nmae=x", "nmae"),
        ("decar-train export configs/demo.yaml --merge mean", "mean"),
        ("make no-such-target", "no-such-target"),
        ("make seams VLM=1", "VLM"),
        ("tools/check_gpu.sh exactly", "exactly"),
        ("tools/no.sh", "tools/no.sh"),
        ("python -m decar.training.no", "decar.training.no"),
        ("accelerate launch -m decar.training experts code x.yaml", "experts"),
        ("frobnicate x", "frobnicate"),
    ],
)
def test_a_command_that_cannot_be_given_is_found(
    command: str, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (words,) = commands(command)
    with pytest.raises(NoSuchCommand) as raised:
        check(words)
    assert word in str(raised.value) + capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "decar --version",
        "decar serve DIR --port PORT --max-model-len 512",
        "decar serve DIR --help",
        "decar bench serve --shape 40M",
        "decar-train expert $expert configs/demo.yaml",
        "decar-train run CONFIG.yaml --set A.B=VALUE",
        "make bench",
        ".venv/bin/python -m pytest",
    ],
)
def test_a_command_that_can_be_given_is_taken(command: str) -> None:
    (words,) = commands(command)
    check(words)


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("block", every_block("json"), ids=str)
def test_json_blocks_are_what_decar_reads(block: Block, tmp_path: Path) -> None:
    options = FlowOptions if block.document.name == "flows.md" else DecarOptions
    try:
        values = [json.loads(block.text)]
    except json.JSONDecodeError:
        values = [json.loads(line) for line in block.text.splitlines()]
    for value in values:
        _check_json(value, tmp_path, options)


def _check_json(value: dict[str, Any], folder: Path, options: type[DecarOptions]) -> None:
    """A request, a manifest, a row of training data, or the `decar` object of a request."""
    if "model" in value:
        options.model_validate(value.get("decar", {}))
    elif "experts" in value:
        Manifest.model_validate(value)
    elif value.keys() & {"messages", "conversations"}:
        if "image" in value:
            (folder / value["image"]).parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / value["image"])
        (folder / "data.jsonl").write_text(json.dumps(value))
        data = DataConfig(files=[str(folder / "data.jsonl")])
        assert len(list(read_documents(data, DocumentConfig(min_chars=1), seed=0))) == 1
    else:
        options.model_validate(value)


@pytest.mark.parametrize("block", every_block("yaml"), ids=str)
def test_yaml_blocks_are_what_decar_reads(block: Block) -> None:
    for value in yaml.safe_load_all(block.text):
        if isinstance(value, dict) and 2 * len(value.keys() & TrainConfig.model_fields.keys()) >= len(value):
            _check_training(value)


def _check_training(sections: dict[str, Any]) -> None:
    """Sections of a training configuration fit into one of those that come with decar, in place of its own."""
    problems = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        try:
            TrainConfig.model_validate({**yaml.safe_load(path.read_text()), **sections})
        except pydantic.ValidationError as error:
            problems.append(f"{path.name}: {error}")
        else:
            return
    pytest.fail("\n".join(problems))


def test_sections_that_do_not_fit_are_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="warmpu"):
        _check_training({"training": {"warmpu": 0.03}})


@pytest.mark.parametrize("block", every_block("python"), ids=str)
def test_python_blocks_are_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


# ---------------------------------------------------------------------------------------------- pages


def test_every_page_can_be_found_from_the_sites_navigation() -> None:
    listed = set(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed, f"add {sorted(pages - listed)} to nav in mkdocs.yml"
    others = {name_of(path) for path in DOCUMENTS if not path.is_relative_to(ROOT / "docs")} - {"README.md"}
    assert listed == pages | others | {"index.md", "CHANGELOG.md"}


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav if isinstance(nav, list) else nav.values()) for page in _pages(item)]


def test_the_readme_is_short_and_begins_with_a_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 500
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "bash")
    assert next(commands(first.text)) == ["make", "demo"]
