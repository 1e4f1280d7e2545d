"""`headrace table`: its commands and their options; what they do is in `node.table_console`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.command_line import NODE_URL, WAIT_S, AsJson, ConfigPath, NodeUrl, Url, WaitSeconds, fail, loaded
from node.kernel.errors import HeadraceError

if TYPE_CHECKING:
    from node.config_sections import Config

tables = typer.Typer(no_args_is_help=True, help="Tables: global data that features look up, in versions.")
TableName = Annotated[str, typer.Argument(metavar="TABLE", help="Its name, as in tables.<name>.")]


@tables.command("put")
def table_put(
    name: TableName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet, CSV with a header, or NDJSON.")],
    config: ConfigPath,
    key: Annotated[str, typer.Option(help="The key column; needed of a new table.")] = "",
    file_format: Annotated[str, typer.Option("--format", help="parquet, csv or ndjson; else by the name.")] = "",
    column: Annotated[list[str] | None, typer.Option(help="Take only such columns.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="NAME=number, text or boolean; else inferred.")
    ] = None,
    default: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: what a missing value gives.")] = None,
    url: NodeUrl = "",
    wait_s: WaitSeconds = WAIT_S,
) -> None:
    """Put a file as a table's next version, and wait until it is live on all nodes.

    It is checked whole: a file with a mistake is refused with its rows, and the table stays as it is.
    """
    from node import table_console

    query = {"key": key, "columns": ",".join(column or ()), "types": ",".join(kind or ())}
    query["defaults"] = ",".join(default or ())

    def put(settings: Config, address: str) -> str:
        query["format"] = table_console.format_of(file, file_format)
        return table_console.put(settings, address, name, file, query, wait_s)

    _change(config, url, put)


@tables.command("rollback")
def table_rollback(name: TableName, config: ConfigPath, url: NodeUrl = "", wait_s: WaitSeconds = WAIT_S) -> None:
    """Go back to the version that was live before; again, and it is the newer one once more."""
    from node import table_console

    _change(config, url, lambda settings, address: table_console.rollback(settings, address, name, wait_s))


@tables.command("drop")
def table_drop(name: TableName, config: ConfigPath, url: NodeUrl = "") -> None:
    """Drop a table that no live model reads, with all its versions."""
    from node import table_console

    _change(config, url, lambda settings, address: table_console.drop(settings, address, name))


@tables.command("follow")
def table_follow(
    name: TableName,
    config: ConfigPath,
    topic: Annotated[str, typer.Option(help="A compacted topic: JSON rows, by key; no value deletes.")],
    key: Annotated[str, typer.Option(help="The key column; needed of a new table.")] = "",
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="NAME=number, text or boolean of each column; of a new table.")
    ] = None,
    default: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: what a missing value gives.")] = None,
    every: Annotated[str, typer.Option(help="The shortest time between two versions.")] = "10s",
    url: NodeUrl = "",
) -> None:
    """Have a table follow a topic of rows: what has come becomes its next version, again and again."""
    from node import table_console

    query = {"topic": topic, "key": key, "types": ",".join(kind or ()), "defaults": ",".join(default or ())}

    def follow(settings: Config, address: str) -> str:
        query["every_ms"] = table_console.milliseconds(every)
        return table_console.follow(settings, address, name, query)

    _change(config, url, follow)


@tables.command("unfollow")
def table_unfollow(name: TableName, config: ConfigPath, url: NodeUrl = "") -> None:
    """Leave a table that follows a topic as it is."""
    from node import table_console

    _change(config, url, lambda settings, address: table_console.unfollow(settings, address, name))


@tables.command("list")
def table_list(url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show the tables of a running node, with their versions."""
    from node import console, table_console

    try:
        if as_json:
            typer.echo(console.fetch(url, "/v1/tables"))
        else:
            console.show(*table_console.tables_view(console.fetch_object(url, "/v1/tables")))
    except HeadraceError as error:
        fail(str(error))


def _change(config: Path, url: str, change: Callable[[Config, str], str]) -> None:
    """Ask the node for it and print the line that tells how it went."""
    from node.table_console import url_of

    settings = loaded(config, secrets=False)
    try:
        typer.echo(change(settings, url or url_of(settings)))
    except HeadraceError as error:
        fail(str(error))
