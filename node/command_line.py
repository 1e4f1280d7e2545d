"""What commands have in common: options, reading the config, and how one fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from node.kernel.errors import ConfigError

if TYPE_CHECKING:
    from node.config_sections import Config

ConfigPath = Annotated[Path, typer.Option("--config", help="The node's TOML file.")]
Url = Annotated[str, typer.Option("--url", help="Address of the node's HTTP interface.")]
NodeUrl = Annotated[str, typer.Option("--url", help="Address of the node's HTTP interface; the config's by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the node's answer as it is.")]
WaitSeconds = Annotated[float, typer.Option("--wait-s", min=1.0, help="Give up waiting after so many seconds.")]
WAIT_S = 600.0
NODE_URL = "http://127.0.0.1:8080"


def loaded(path: Path, secrets: bool = True) -> Config:
    """The config; the process ends with its mistakes where it has some."""
    from node.config import load_config

    try:
        return load_config(path, secrets)
    except ConfigError as error:
        fail(*(f"{path}: {problem}" for problem in error.problems))


def fail(*lines: str) -> NoReturn:
    for line in lines:
        typer.echo(line, err=True)
    raise typer.Exit(1)
