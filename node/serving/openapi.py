"""The OpenAPI 3.1 document, made from the table of routes and the structs they answer with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from node.kernel.limits import CUSTOMER_BYTES_MAX
from node.serving.problems import PROBLEM_TYPE, Problem
from node.serving.routes import JSON_TYPE, Route

OPENAPI_VERSION = "3.1.0"
_REFERENCE = "#/components/schemas/{name}"
_VARIABLE = re.compile(r"\{(\w+)\}")
_ANYWHERE = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.REQUEST_URI_TOO_LONG,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


def openapi_document(routes: Sequence[Route], title: str, version: str) -> dict[str, Any]:
    answers = list(dict.fromkeys(route.answer for route in routes if route.answer is not None))
    bodies = [route.change.body for route in routes if route.change is not None]
    _, schemas = msgspec.json.schema_components([*answers, *bodies, Problem], ref_template=_REFERENCE)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": title, "version": version},
        "paths": _paths(routes),
        "components": {"schemas": schemas, "securitySchemes": {"operator": {"type": "http", "scheme": "bearer"}}},
    }


def _paths(routes: Sequence[Route]) -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.template, {}).update(_operations(route))
    return paths


def _operations(route: Route) -> dict[str, Any]:
    if route.method != "GET":
        method, changes = route.method.lower(), _operation(route)
        named = {"operationId": f"{method}_{changes['operationId']}", "security": [{"operator": []}]}
        sent = {"requestBody": {"required": True, "content": {route.takes: {}}}} if route.takes else {}
        return {method: {**changes, **sent, **named}}
    if route.change is None:
        return {"get": _operation(route)}
    change, reads = route.change, _operation(route)
    changes = {
        **reads,
        "summary": change.summary,
        "operationId": f"change_{reads['operationId']}",
        "parameters": _path_parameters(route),
        "requestBody": {
            "required": True,
            "content": {JSON_TYPE: {"schema": {"$ref": _REFERENCE.format(name=change.body.__name__)}}},
        },
        "responses": {"200": reads["responses"]["200"]} | _problems((*_ANYWHERE, *change.statuses)),
        "security": [{"operator": []}],
    }
    return {"get": reads, "patch": changes}


def _operation(route: Route) -> dict[str, Any]:
    if route.answer is None:
        schema = {"type": "object" if route.content_type == JSON_TYPE else "string"}
    else:
        schema = {"$ref": _REFERENCE.format(name=route.answer.__name__)}
    return {
        "summary": route.summary,
        "operationId": "_".join(re.findall(r"[a-z]+", route.template.replace("v1", ""))),
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {"200": {"description": "OK", "content": {route.content_type: {"schema": schema}}}}
        | _problems((*_ANYWHERE, *route.statuses)),
    }


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1, "description": f"At most {CUSTOMER_BYTES_MAX} bytes of UTF-8."}
    return [
        {"name": name, "in": "path", "required": True, "schema": schema} for name in _VARIABLE.findall(route.template)
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    schema = next(iter(msgspec.json.schema_components([route.query])[1].values()))
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": _without_default(part)}
        for name, part in schema["properties"].items()
    ]


def _without_default(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "default"}


def _problems(statuses: Iterable[HTTPStatus]) -> dict[str, Any]:
    content = {PROBLEM_TYPE: {"schema": {"$ref": _REFERENCE.format(name=Problem.__name__)}}}
    return {str(status.value): {"description": status.phrase, "content": content} for status in sorted(set(statuses))}
