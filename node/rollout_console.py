"""What the command line does with models' versions: promotes one in stages, rolls one back, and tells of both."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec

from node.config_sections import Config
from node.kernel.errors import HeadraceError, printable
from node.kernel.types import ModelName
from node.quota_console import patch, user


class NoModel(HeadraceError):
    """What an operator wrote can't be a model's name."""


def model_name(text: str) -> ModelName:
    """Raises NoModel."""
    tenant, _, model = text.partition("/")
    if not tenant or not model or "/" in model:
        raise NoModel(f"{printable(text)} is no model; say TENANT/MODEL")
    return ModelName(tenant, model)


def model_path(text: str) -> str:
    """Raises NoModel."""
    name = model_name(text)
    return f"/v1/models/{quote(name.tenant, safe='')}/{quote(name.model, safe='')}"


def move(config: Config, url: str, name: str, **wish: object) -> dict[str, Any]:
    """Promote or roll back; what holds then. Raises NoModel, NodeUnreachable, ConfigError."""
    return msgspec.json.decode(patch(config, url, model_path(name), {**wish, "who": user()}), type=dict[str, Any])


def lines(answer: Mapping[str, Any]) -> list[str]:
    """A line for each version that runs or was found last, and for each change there was, the newest last."""
    told = []
    for one in answer.get("versions", ()):
        told.append(f"{one.get('version')} {one.get('state')}")
        told.extend(f"  {reason}" for reason in one.get("reasons", ()))
        if one.get("stage"):
            told.extend(f"  {line}" for line in stage_lines(one["stage"]))
    for one in answer.get("history", ()):
        at = datetime.fromtimestamp(one.get("at_ms", 0) / 1000, UTC)
        reason = f": {one['reason']}" if one.get("reason") else ""
        told.append(f"{at:%Y-%m-%d %H:%M:%S} {one.get('version', '')[:12]} {one.get('to')} by {one.get('who')}{reason}")
    return told


def stage_lines(stage: Mapping[str, Any]) -> list[str]:
    seen = [f"{stage.get('rows')} rows", f"{stage.get('errors')} failed", f"{stage.get('dropped')} not shown"]
    if stage.get("agreement") is not None:
        seen.append(f"agreement {stage['agreement']:.4f} of {stage.get('compared')}")
    if stage.get("cost_ratio") is not None:
        seen.append(f"cost ratio {stage['cost_ratio']:.2f}")
    seen.append(f"drift {stage.get('drift', 0):.3f}")
    seen.append(f"p99 {stage.get('p99_ms', 0):.3g} ms, live {stage.get('live_p99_ms', 0):.3g} ms")
    told = [f"stage {stage.get('number')} of {stage.get('of')}, {stage.get('stage')}: {', '.join(seen)}"]
    if stage.get("verdict"):
        told.append(f"{stage['verdict']}: {stage.get('verdict_reason')}")
    return told
