"""Questions with one right answer each, asked of a server's models and of a checkpoint. Knows nothing of the demo.

Shapes: Q questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import openai

AT_ONCE = 32
MAX_TOKENS = 48


class Question(NamedTuple):
    """``skill``: who was taught it; ``answer``: the only right one."""

    skill: str
    question: str
    answer: str


def read_questions(file: Path) -> list[Question]:
    """The rows of a .jsonl ``file``, whose fields are those of `Question`."""
    return [Question(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def asked(client: openai.OpenAI, model: str, questions: Sequence[Question]) -> list[str]:
    """[Q]: what a server's ``model`` answers, without chance.

    Raises:
        openai.APIError: the server refused a request, or failed on the way.
    """

    def ask(question: Question) -> str:
        messages: Any = [{"role": "user", "content": question.question}]
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=MAX_TOKENS, temperature=0
        )
        return (answer.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, questions))


def asked_of_checkpoint(directory: Path, questions: Sequence[Question]) -> list[str]:
    """[Q]: what the model in ``directory`` answers by itself, without chance and without a server."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    ).eval()
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def shares_right(questions: Sequence[Question], answers: Iterable[str]) -> dict[str, float]:
    """The share of right answers [Q] by skill."""
    right = Counter(q.skill for q, answer in zip(questions, answers, strict=True) if answer == q.answer)
    return {skill: right[skill] / number for skill, number in Counter(q.skill for q in questions).items()}
