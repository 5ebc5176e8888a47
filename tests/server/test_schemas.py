"""/openapi.json says what decar adds to vLLM's description, and decar's routes answer what it says."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from fastapi import Body, FastAPI
from pydantic import BaseModel

from decar.server.gateway.gate import GENERATING
from decar.server.gateway.request import DecarOptions

from .test_middleware import ADMIN, app_of, client_of


class Asked(BaseModel):
    model: str | None = None


def described_app() -> FastAPI:
    """Every route that generates, with a body that vLLM describes; /invocations has none."""
    app = app_of(admin="admin")
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") != "/v1/completions"
    ]

    async def invocations() -> None: ...

    async def generates(body: Asked = Body()) -> None: ...

    for path in GENERATING | {"/tokenize"}:
        app.post(path)(invocations if path == "/invocations" else generates)
    return app


async def description() -> dict[str, Any]:
    async with client_of(described_app()) as client:
        schema: dict[str, Any] = (await client.get("/openapi.json")).json()
        assert (await client.get("/openapi.json")).json() == schema  # once more
    return schema


def resolved(schema: dict[str, Any], path: str, *keys: str) -> dict[str, Any]:
    found: Any = schema["paths"][path]
    for key in keys:
        found = found[key]
        if "$ref" in found:
            found = schema["components"]["schemas"][found["$ref"].rpartition("/")[2]]
    found = dict(found)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("path", sorted(GENERATING - {"/invocations"}))
async def test_every_request_that_takes_decar_says_so(path: str) -> None:
    schema = await description()
    body = resolved(schema, path, "post", "requestBody", "content", "application/json", "schema")
    [reference, null] = body["properties"]["decar"]["anyOf"]
    assert null == {"type": "null"}
    options = schema["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
    assert set(options["properties"]) == set(DecarOptions.model_fields)
    assert all("description" in field for field in options["properties"].values())
    answer = resolved(schema, path, "post", "responses", "200", "content", "application/json", "schema")
    assert answer["properties"]["decar"] == {"$ref": "#/components/schemas/DecarAnswer"}


async def test_invocations_take_what_completions_take() -> None:
    body = (await description())["paths"]["/invocations"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["anyOf"]


async def test_what_decars_own_routes_answer_is_described() -> None:
    schema = await description()
    async with client_of(described_app()) as client:
        for path in ("/v1/ensemble", "/v1/models"):
            of = resolved(schema, path, "get", "responses", "200", "content", "application/json", "schema")
            assert of["properties"]
            for headers in ({}, ADMIN):
                answer = (await client.get(path, headers=headers)).json()
                jsonschema.validate(answer, {**of, "components": schema["components"]})
                assert set(answer) <= set(of["properties"])
    reload = resolved(
        schema, "/v1/ensemble/reload", "post", "responses", "200", "content", "application/json", "schema"
    )
    assert {"exchanged", "added", "removed", "message"} <= set(reload["properties"])
    assert {"400", "403", "409"} <= set(schema["paths"]["/v1/ensemble/reload"]["post"]["responses"])


async def test_what_everybody_sees_has_no_empty_fields_of_the_admins() -> None:
    async with client_of(described_app()) as client:
        [expert, _] = (await client.get("/v1/ensemble")).json()["experts"]
        assert not {"pid", "path"} & set(expert)
        [expert, _] = (await client.get("/v1/ensemble", headers=ADMIN)).json()["experts"]
        assert {"pid", "path"} <= set(expert)
