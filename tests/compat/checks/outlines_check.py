"""outlines: structured answers of a remote model, over OpenAI's API and with vLLM's own fields."""

from __future__ import annotations

import json
from typing import Literal

import openai
import outlines
from common import EXPERT, KEY, MODEL, URL, remark, seen
from outlines.types import Regex
from pydantic import BaseModel


class City(BaseModel):
    name: str
    people: int


client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
for name in (MODEL, EXPERT):
    over_openai = outlines.from_openai(client, name)
    assert json.loads(over_openai("Which city?", City))["people"] == 3
    assert over_openai("Hi", max_tokens=4)
    assert "".join(over_openai.stream("Hi", max_tokens=4)) == over_openai("Hi", max_tokens=4)
seen("from_openai: objects, text, streams")
of_vllm = outlines.from_vllm(client, MODEL)
assert json.loads(of_vllm("Which city?", City))["people"] == 3
assert of_vllm("Which?", Literal["red", "blue"]) in ("red", "blue")
assert of_vllm("Which?", Regex("[ab]{3}")) in {a + b + c for a in "ab" for b in "ab" for c in "ab"}
seen("from_vllm: objects, choices, regular expressions")
remark()
