"""The commands of `decar chat`, by what they do to a conversation."""

import json
from pathlib import Path

import pytest

from decar.clients.api import Piece, v1_of
from decar.clients.conversation import COMMANDS, Conversation, Mistake, parse_weights
from decar.clients.picture import harmless

NAMES = ["code", "prose", "maths"]


@pytest.fixture
def conversation() -> Conversation:
    return Conversation("demo", NAMES, "demo", {"trace": True})


def exchange(conversation: Conversation, question: str) -> None:
    conversation.ask(question)
    conversation.answered([Piece("an "), Piece("answer")])


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("code=.7", {"code": 0.7, "prose": 0.15, "maths": 0.15}),
        ("code=.7 prose=.3", {"code": 0.7, "prose": 0.3}),
        ("code=1,prose=3", {"code": 1.0, "prose": 3.0}),
        ('{"code": 1, "prose": 3}', {"code": 1, "prose": 3}),
        ("code=1", {"code": 1.0}),
    ],
)
def test_weights_as_a_user_writes_them(text: str, weights: dict[str, float]) -> None:
    assert parse_weights(text, NAMES) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cod=1", "did you mean 'code'"),
        ("xyz=1", "the experts are code, prose, maths"),
        ("code=much", "'much' is no number"),
        ("code", "it has no number"),
        ("code=-1", "0 or more"),
        ("code=nan", "0 or more"),
        ("code=0 prose=0 maths=0", "above 0"),
        ("{", "no JSON"),
        ('{"cod": 1}', "did you mean 'code'"),
    ],
)
def test_weights_that_are_none(text: str, says: str) -> None:
    with pytest.raises(Mistake, match=says):
        parse_weights(text, NAMES)


def test_an_expert_or_weights_are_asked_and_never_both(conversation: Conversation) -> None:
    assert conversation.request() == ("demo", {"trace": True})
    assert conversation.command("/weights code=.7 prose=.3") == "weights: code 0.7, prose 0.3"
    assert conversation.request() == ("demo", {"trace": True, "weights": {"code": 0.7, "prose": 0.3}})
    assert conversation.command("/expert prose") == "asking demo/prose"
    assert conversation.request() == ("demo/prose", {"trace": True})
    assert conversation.command("/weights") == "weights: the router's"
    assert conversation.request() == ("demo", {"trace": True})
    conversation.command("/expert code")
    assert conversation.command("/expert") == "asking demo"
    with pytest.raises(Mistake, match="did you mean 'prose'"):
        conversation.command("/expert pros")


def test_a_question_without_an_answer_is_taken_back(conversation: Conversation) -> None:
    exchange(conversation, "first")
    conversation.ask("second")
    conversation.answered([])
    assert [said["content"] for said in conversation.messages] == ["first", "an answer"]
    assert conversation.question == "first"


def test_the_oldest_or_all_is_forgotten(conversation: Conversation) -> None:
    exchange(conversation, "first")
    exchange(conversation, "second")
    assert conversation.command("/forget") == "forgotten; 1 questions and answers are left"
    assert conversation.messages[0]["content"] == "second"
    conversation.command("/new")
    assert not conversation.messages
    with pytest.raises(Mistake, match="nothing to forget"):
        conversation.command("/forget")


def test_it_is_saved_and_nothing_else_is_overwritten(conversation: Conversation, tmp_path: Path) -> None:
    exchange(conversation, "what?")
    markdown = tmp_path / "a chat.md"
    assert conversation.command(f"/save '{markdown}'") == f"saved 2 messages to {markdown}"
    assert markdown.read_text() == "**you:** what?\n\n**demo:** an answer\n"
    exchange(conversation, "and?")
    conversation.command(f"/save '{markdown}'")
    assert "and?" in markdown.read_text()
    as_json = tmp_path / "chat.json"
    conversation.command(f"/save {as_json}")
    assert json.loads(as_json.read_text()) == {"model": "demo", "messages": conversation.messages}
    other = tmp_path / "mine.md"
    other.write_text("mine")
    for command, says in (
        (f"/save {other}", "exists already"),
        (f"/save {tmp_path}/nowhere/x.md", "cannot write"),
        ("/save", "one file"),
        ("/save 'a", "No closing quotation"),
    ):
        with pytest.raises(Mistake, match=says):
            conversation.command(command)
    assert other.read_text() == "mine"


def test_help_names_every_command_and_others_are_told(conversation: Conversation) -> None:
    said = conversation.command("/help")
    assert all(command in said for command in COMMANDS)
    with pytest.raises(Mistake, match="did you mean /weights"):
        conversation.command("/wieghts code=1")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://host:1/", "http://host:1/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("http://host/under/v1", "http://host/under/v1"),
    ],
)
def test_an_address_needs_no_v1(given: str, address: str) -> None:
    assert v1_of(given) == address


def test_a_terminal_obeys_no_model() -> None:
    assert harmless("a\tb\nc\x1b[2J\x07\x9b1m\r👩‍🔬é") == "a\tb\nc\ufffd[2J\ufffd\ufffd1m\ufffd👩‍🔬é"
