"""What `decar explain` draws, on terminals that can colour and on those that cannot."""

import io

import pytest
import typer
from rich.console import Console

from decar.clients.explain import Piece, explain, show, show_steps

NAMES = ["code", "prose"]
PIECES = [
    Piece("def ", [[0.95, 0.05]], ["code"]),
    Piece("f(x):\n", [[0.9, 0.1], [0.7, 0.3]], ["code", "code"]),
    Piece("é is", [[0.45, 0.55]], ["code"]),
    Piece(" it", [[0.0, 1.0]], ["prose"]),
]


def drawn(**settings: object) -> str:
    output = io.StringIO()
    show(Console(file=output, width=80, highlight=False, **settings), NAMES, "a\nprompt", PIECES)  # type: ignore[arg-type]
    return output.getvalue()


def test_without_colour_a_line_names_the_speaker_of_each_run() -> None:
    lines = drawn().splitlines()
    assert lines[0] == "prompt      | a\\nprompt"
    assert lines[1] == "code   85% | def f(x):\\n"
    assert lines[2] == "prose  78% | é is it"
    assert lines[4:6] == ["code  ██▆▄▁  60.0%", "prose ▁▁▃▅█  40.0%"]
    assert "active experts a token: 1.80" in lines[6]
    assert lines[7] == "leader: code, prose from token 5 on"
    assert "\x1b" not in "".join(lines)


def test_with_colour_every_token_has_its_speakers() -> None:
    text = drawn(force_terminal=True, color_system="standard")
    assert "\x1b[2mprompt\x1b[0m" in text  # dim
    assert "\x1b[1;36mdef \x1b[0m" in text  # bold cyan: code, sure
    assert "\x1b[4;35mé is\x1b[0m" in text  # underlined magenta: prose, hardly
    assert "\x1b[1;35m it\x1b[0m" in text


@pytest.mark.parametrize(
    ("words", "base_url"), [(["only one"], None), (["runs/demo/ensemble", "a"], "http://x/v1")]
)
def test_a_missing_word_is_told_from_one_too_many(words: list[str], base_url: str | None) -> None:
    with pytest.raises(typer.BadParameter, match="PROMPT"):
        explain(words, base_url=base_url)


def test_more_tokens_than_a_line_has_room_for_are_averaged() -> None:
    output = io.StringIO()
    pieces = [Piece("a", [[0.0, 1.0] if t < 100 else [1.0, 0.0]], ["code"]) for t in range(200)]
    show(Console(file=output, width=40), NAMES, "", pieces)
    row = next(line for line in output.getvalue().splitlines() if line.startswith("code  ▁"))
    assert len(row) <= 40
    assert row.count("▁") == row.count("█") > 10


def test_an_empty_answer_is_said_to_be_one() -> None:
    output = io.StringIO()
    show(Console(file=output), NAMES, "prompt", [])
    assert "the answer is empty" in output.getvalue()


def test_a_flow_is_shown_as_it_is_revealed() -> None:
    """Nobody leads it; what the prompt has is there from the beginning."""
    pieces = [
        Piece("def ", [[0.95, 0.05]], revealed_at=[2]),
        Piece("f(x)", [[0.6, 0.4]], revealed_at=[0]),
        Piece(":\n", [[0.3, 0.7]], revealed_at=[1]),
    ]
    output = io.StringIO()
    console = Console(file=output, width=80, highlight=False)
    show_steps(console, pieces)
    show(console, NAMES, "a", pieces)
    lines = output.getvalue().splitlines()
    assert lines[:4] == ["step 0 ░f(x)░", "step 1 ░f(x):\\n", "step 2 def f(x):\\n", ""]
    assert not any(line.startswith("leader") for line in lines)


def test_of_many_steps_some_are_shown_the_last_among_them() -> None:
    output = io.StringIO()
    pieces = [Piece("a", [[1.0, 0.0]], revealed_at=[i + 1]) for i in range(100)]
    show_steps(Console(file=output, width=200), pieces)
    lines = output.getvalue().splitlines()
    assert len(lines) == 1 + 12 + 1
    assert lines[-2] == "step 100 " + "a" * 100
