"""Configurations: overrides, per-expert models, and one clear line per mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from decar.router.errors import TrainingError
from decar.training.config import load_config
from decar.training.expert.model import check_model
from tests.training.conftest import WriteConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_set_reaches_nested_fields_lists_and_absent_sections(write_config: WriteConfig) -> None:
    config = load_config(
        write_config(),
        [
            "training.max_steps=3",
            "experts.1=wales",
            "mixing.rule=logit",
            "training.learning_rate=1e-4",
            "name=other",
        ],
    )
    assert (config.training.max_steps, config.expert_names, config.mixing.rule) == (
        3,
        ["code", "wales"],
        "logit",
    )
    assert (config.training.learning_rate, config.name) == (1e-4, "other")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_that_come_along_are_valid(path: Path) -> None:
    assert load_config(path).expert_names


def test_an_expert_lays_its_model_over_the_common_one(write_config: WriteConfig) -> None:
    config = load_config(write_config(experts=["code", {"name": "prose", "model": {"hidden_size": 64}}]))
    assert config.model_of("code")["hidden_size"] == 32
    assert config.model_of("prose")["hidden_size"] == 64
    assert config.model_of("prose")["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"learning_rat": 1}},
            "training.learning_rat: unknown field; did you mean 'learning_rate'?",
        ),
        ({"expert": []}, "expert: unknown field; did you mean 'experts'?"),
        ({"training": {"batch_size": 0}}, "training.batch_size: .*greater than 0.*got 0"),
        ({"data": {"files": []}}, "no data; list `files` or `builtin` sources"),
        ({"experts": ["a", "a"], "partition": {"name_by": {}}}, "two experts are named 'a'"),
        ({"experts": ["../a"]}, "experts.0.name: .*got '../a'"),
        ({"partition": {"name_by": {"cod": "x"}}}, "partition.name_by names 'cod'"),
        ({"model": {"checkpoint": "/x"}}, "leaves no room for"),
        ({"experts": ["code", {"name": "prose", "model": {"checkpoint": "/x"}}]}, "set tokenizer.path"),
        ({"data": {"builtin": ["python-stdlb"]}}, "data.builtin.0: .*'python-stdlib'"),
    ],
)
def test_mistakes_are_named(write_config: WriteConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        load_config(write_config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "write it as a.b=value"),
        ("training..x=1", "write it as a.b=value"),
        ("name.x=1", "there is no 'x' to set"),
        ("experts.7=x", "there is no '7' to set"),
        ("training.max_steps=[", "not valid YAML"),
        ("training.max_step=1", "did you mean 'max_steps'"),
    ],
)
def test_wrong_overrides_are_named(write_config: WriteConfig, override: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_config(write_config(), [override])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1,\n")
    with pytest.raises(TrainingError, match=r"broken.yaml is not valid YAML .*line 2"):
        load_config(broken)
    broken.write_text("- 1\n")
    with pytest.raises(TrainingError, match="has to be a YAML mapping"):
        load_config(broken)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 8}, "model.hiden_size: unknown field of llama; did you mean 'hidden_size'?"),
        ({"hidden_size": "wide"}, "the model of 'code' cannot be built"),
        ({"model_type": "lama"}, "no 'lama'; did you mean 'llama'?"),
    ],
)
def test_model_mistakes_are_named(write_config: WriteConfig, model: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message.replace("?", r"\?")):
        check_model(load_config(write_config(model=model)).recipe("code"))


def test_a_recipe_stays_as_it_is_when_a_model_is_made_of_it(write_config: WriteConfig) -> None:
    """transformers writes defaults into the nested parts that it is given."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes}
    model = {"model_type": "llava", "text_config": sizes, "vision_config": vision}
    data = yaml.safe_load(write_config().read_text()) | {"model": model}
    path = write_config()
    path.write_text(yaml.safe_dump(data))
    recipe = load_config(path).recipe("code")
    check_model(recipe)
    assert recipe.model == model
