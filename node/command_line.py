"""What commands have in common: options, reading the config, and how one fails."""

from __future__ import annotations

import os
import pwd
import shlex
import sys
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


def loaded(path: Path, *, secrets: bool = True, writes: bool = False) -> Config:
    """The config; the process ends with its mistakes where it has some.

    A command that `writes` into the node's data_dir is refused to root if that is another user's.
    """
    from node.config import load_config

    try:
        config = load_config(path, secrets)
    except ConfigError as error:
        fail(*(f"{path}: {problem}" for problem in error.problems))
    problem = _owner_problem(Path(config.node.data_dir)) if writes else ""
    if problem:
        fail(problem)
    return config


def _owner_problem(data_dir: Path) -> str:
    """Why root may not write there; '' when it may. Other users are held back by the kernel."""
    from node.config import nearest_existing

    place = nearest_existing(data_dir)
    owner = place.stat().st_uid
    if os.geteuid() != 0 or owner == 0:
        return ""
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    command = shlex.join(["headrace", *sys.argv[1:]])
    return (
        f"[node] data_dir is {data_dir}, where {place} is user {name}'s, and the node could not use what root leaves "
        f"there; say this as that user: runuser -u {name} -- {command}"
    )


def fail(*lines: str) -> NoReturn:
    for line in lines:
        typer.echo(line, err=True)
    raise typer.Exit(1)
