"""Commands that write into a node's data_dir, said by root where the node has a user of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_cli import GOOD, headrace

NODE_USER = 40_001
COMMANDS = {
    "run": ["run"],
    "restore": ["restore", "3"],
    "accept-loss": ["accept-loss"],
    "check-training": ["check-training", "grocery/coupon"],
}

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root gets past other users' permissions")


def config_in(folder: Path) -> Path:
    path = folder / "n1.toml"
    path.write_text(
        f'{GOOD}[node]\nname = "n1"\ndata_dir = "var/data"\n[cluster]\nlisten = "127.0.0.1:1"\n'
        'peers = { n1 = "127.0.0.1:1" }\npeer_listen = "127.0.0.1:2"\n'
        "[http]\nport = 0\n"
    )
    return path


def make_anothers(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, NODE_USER, NODE_USER)


async def refused(command: str, folder: Path, tmp_path: Path) -> None:
    """Said by root, `folder` being another's, the command is one line and leaves nothing."""
    make_anothers(folder)
    ran = await headrace(*COMMANDS[command], "--config", str(config_in(tmp_path)))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert f"[node] data_dir is {tmp_path / 'var' / 'data'}, where {folder} is user {NODE_USER}'s" in ran.err
    assert f"runuser -u {NODE_USER} -- headrace {command}" in ran.err
    assert os.listdir(folder) == []


@pytest.mark.parametrize("command", COMMANDS)
async def test_root_leaves_nothing_that_the_node_cannot_use(tmp_path: Path, command: str) -> None:
    await refused(command, tmp_path / "var" / "data", tmp_path)


async def test_nor_where_the_folder_is_yet_to_be_made(tmp_path: Path) -> None:
    await refused("run", tmp_path / "var", tmp_path)


async def test_a_check_may_be_roots(tmp_path: Path) -> None:
    make_anothers(tmp_path / "var")
    assert (await headrace("check", "--config", str(config_in(tmp_path)))).code == 0
