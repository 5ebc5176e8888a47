"""instructor: answers as objects, by tools and by JSON schema, whole and in parts.

Its mode JSON gives a grammar no schema: for experts with skill.
"""

from __future__ import annotations

import instructor
import openai
from common import CHAT, EXPERT, KEY, MODEL, URL, remark, seen
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


plain = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    for model in (MODEL, EXPERT):
        person, raw = client.chat.completions.create_with_completion(
            model=model, messages=CHAT, response_model=Person, max_retries=0
        )
        assert isinstance(person, Person)
        assert (person.age, raw.model) == (3, model)
    parts = list(client.chat.completions.create_partial(model=MODEL, messages=CHAT, response_model=Person))
    assert parts[-1].age == 3
    seen(mode.value)
remark("whole and in parts")
