"""What the command line does with tenants' quotas: asks a running node, and changes them with its operator's token."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from node.config_sections import Config
from node.console import NodeUnreachable, answer_of
from node.kernel.types import QUOTAS
from node.serving.operator_token import read_token

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # told apart, not listened on
_UNLIMITED: Final = "any"


def quota_path(tenant: str) -> str:
    return f"/v1/tenants/{quote(tenant, safe='')}/quota"


def url_of(config: Config) -> str:
    """Where the config's node answers, from its own machine. Raises NodeUnreachable when the config can't say."""
    host, port = config.http.host, config.http.port
    if not port:
        raise NodeUnreachable("[http] port is 0, so the config does not say where the node listens; give --url")
    host = _ANY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def change(config: Config, url: str, tenant: str, changes: Mapping[str, float | None]) -> dict[str, Any]:
    """Change a tenant's quota, None: take that limit away; what holds then. Raises NodeUnreachable, ConfigError."""
    answer = patch(config, url, quota_path(tenant), {**changes, "who": user()})
    return msgspec.json.decode(answer, type=dict[str, Any])


def patch(config: Config, url: str, path: str, body: Mapping[str, object]) -> bytes:
    """Change something with the operator's token; what the node answers. Raises NodeUnreachable, ConfigError."""
    token = read_token(Path(config.node.data_dir))
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return answer_of(url or url_of(config), path, "PATCH", msgspec.json.encode(body), headers)


def user() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return "operator"
    return name[:64] if name.isascii() and name.isprintable() and name else "operator"


def lines(answer: Mapping[str, Any]) -> list[str]:
    """A line for each limit as it holds now, and by whom it is so."""
    quota, asked = answer.get("quota", {}), answer.get("asked", {})
    has = {"models_max": "models", "stored_bytes_max": "stored_bytes", "window_bytes_max": "window_bytes"}
    told = []
    for name in QUOTAS:
        value = answer.get("limits", {}).get(name)
        shown = _UNLIMITED if name == "rows_s_max" and not value else f"{value:g}"
        notes = [f"quota {quota[name]:g}" if name in quota else "as the config allows all tenants"]
        if name in asked:
            notes.append(f"its tenant.toml asks for {asked[name]:g}")
        if name in has:
            notes.append(f"it has {answer.get(has[name], 0):g}")
        if refused := answer.get("refused", {}).get(name):
            notes.append(f"{refused} models were refused")
        told.append(f"{name} = {shown} ({', '.join(notes)})")
    if answer.get("who"):
        told.append(f"set by {answer['who']}")
    return told
