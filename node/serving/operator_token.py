"""Who may change something over HTTP: whoever can read a file in the node's data folder."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from http import HTTPStatus
from pathlib import Path

from node.kernel.errors import ConfigError
from node.serving.problems import Refusal

FILE = "operator-token"
_TOKEN_BYTES = 32
_FILE_BYTES_MAX = 4096


def make_token(folder: Path) -> str:
    """The node's token, made if there is none, readable by the node's user only. Raises ConfigError."""
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            # Under its name only once it is whole: a node that dies meanwhile must not leave an empty one.
            made = folder / f".{FILE}.{os.getpid()}"
            made.unlink(missing_ok=True)
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(_TOKEN_BYTES))
            try:
                os.link(made, path)
            finally:
                made.unlink()
    except OSError as error:
        raise ConfigError([f"{path} can't be made ({error.strerror}); let the node write its data_dir"]) from error
    return read_token(folder)


def read_token(folder: Path) -> str:
    """Raises ConfigError when it can't be read."""
    path = folder / FILE
    try:
        with path.open() as file:
            token = file.read(_FILE_BYTES_MAX).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(
            [f"{path} can't be read ({reason}); say this as the node's user, on its machine, once it has started"]
        ) from error
    if not token:
        raise ConfigError([f"{path} is empty; delete it and start the node again"])
    return token


def check_operator(authorization: str, token: str, *, close: bool) -> None:
    """Raises Refusal unless the header has the token."""
    scheme, _, given = authorization.partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    if not token or scheme.lower() != "bearer" or not right:
        detail = (
            f"changes need the header Authorization: Bearer with what the file {FILE} in the node's data_dir holds;"
            " `headrace quota`, `promote` and `rollback` read it by themselves"
        )
        headers = {"WWW-Authenticate": "Bearer"}
        raise Refusal(HTTPStatus.UNAUTHORIZED, "not-an-operator", detail, headers=headers, close=close)
