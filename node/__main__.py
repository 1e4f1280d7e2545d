"""The command line: `headrace run | check | status | models`, and what operators do to a cluster.

Imports are inside the commands, so that each starts as quickly as what it does allows.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from node import table_commands
from node.command_line import NODE_URL, WAIT_S, AsJson, ConfigPath, NodeUrl, Url, WaitSeconds, fail, loaded
from node.kernel.errors import ConfigError, HeadraceError, printable
from node.kernel.limits import MOVES_MAX, NODES_MAX, STANDBY_COUNT_MAX

if TYPE_CHECKING:
    from node.config_sections import Config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

NodeName = Annotated[str, typer.Argument(metavar="NODE", help="Name of a node, as its [node] name.")]
RaftAddress = Annotated[str, typer.Argument(metavar="RAFT_ADDRESS", help="HOST:PORT of the new node for Raft.")]
PartitionNumbers = Annotated[
    list[int] | None, typer.Argument(metavar="PARTITION", help="Its number; without any: all.")
]
Outcome = TypeVar("Outcome")
Wait = Annotated[bool, typer.Option("--wait", help="End only once it is done.")]


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"headrace {version('headrace')}")
    except PackageNotFoundError:
        typer.echo("headrace, run from its source tree without being installed")
    raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Runs many teams' models on a Kafka event stream."""


@app.command()
def run(config: ConfigPath) -> None:
    """Run a node.

    It ends on SIGTERM or SIGINT, after it has finished its cycles and committed them.
    """
    settings = loaded(config, writes=True)
    from node.warming import warmed

    try:
        warm = warmed(settings.tenants)  # before the imports below: it takes longest of all, and runs beside them
        from node.logs import configure_logging

        configure_logging(settings.node.log_format, settings.node.log_level, settings.node.name)
        from node.app import run as run_node

        gc.freeze()  # what was imported stays
        code = run_node(settings, warm)
    except HeadraceError as error:
        fail(str(error))
    raise typer.Exit(code)


@app.command()
def check(config: ConfigPath) -> None:
    """Check a config file.

    Prints a line for each mistake and exits 1, or a summary of what the node would do.
    """
    from node.config_check import use_problems

    settings = loaded(config)
    problems = use_problems(settings)
    if problems:
        fail(*(f"{config}: {printable(problem)}" for problem in problems))
    typer.echo(f"{config}: no mistakes")
    for name, value in _summary(settings):
        typer.echo(f"  {name:<13}{value}")


@app.command()
def status(url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show the state of a running node.

    Its partitions and its tenants, with the reason for whatever does not run. Of a cluster also the nodes, who has
    each partition, and what moves and why; as JSON that is under "cluster".
    """
    from node import console

    try:
        answer, cluster = console.fetch_object(url, "/v1/status"), console.fetch_cluster(url)
        if as_json:
            typer.echo(console.as_json({**answer, "cluster": cluster}))
        else:
            console.show(*console.status_view(answer), *(console.cluster_view(cluster) if cluster else ()))
    except HeadraceError as error:
        fail(str(error))


@app.command()
def features(url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show the features that tenants share.

    Each with its owner, definition, type, users and cost, and what was refused and why.
    """
    from node import console

    try:
        if as_json:
            typer.echo(console.fetch(url, "/v1/features"))
        else:
            console.show(*console.features_view(console.fetch_object(url, "/v1/features")))
    except HeadraceError as error:
        fail(str(error))


@app.command()
def models(url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show the models of a running node.

    All versions, with their state and the reason for it.
    """
    from node import console

    try:
        answer = console.fetch_models(url)
        if as_json:
            typer.echo(console.as_json(answer))
        else:
            console.show(*console.models_view(answer))
    except HeadraceError as error:
        fail(str(error))


@app.command()
def tenant_log(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Its name.")],
    url: Url = NODE_URL,
    as_json: AsJson = False,
) -> None:
    """Show what a tenant's models printed lately, on a running node."""
    from urllib.parse import quote

    from node import console

    path = f"/v1/tenants/{quote(tenant, safe='')}/log"
    try:
        if as_json:
            typer.echo(console.fetch(url, path))
        else:
            console.show(*console.log_view(console.fetch_object(url, path)))
    except HeadraceError as error:
        fail(str(error))


@app.command()
def explain_share(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Its name.")],
    url: Url = NODE_URL,
    as_json: AsJson = False,
) -> None:
    """Show what a tenant asked for and got of late on a running node, and what held it back.

    Over the last 10 seconds, minute and 10 minutes: CPU time and shares of it, rows, and for how long they waited for
    what.
    """
    from urllib.parse import quote

    from node import console

    path = f"/v1/tenants/{quote(tenant, safe='')}/share"
    try:
        if as_json:
            typer.echo(console.fetch(url, path))
        else:
            console.show(*console.share_view(console.fetch_object(url, path)))
    except HeadraceError as error:
        fail(str(error))


quota = typer.Typer(no_args_is_help=True, help="Show or change what operators allow one tenant.")
app.add_typer(quota, name="quota")
TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Its name; it need not be there yet.")]


@quota.command("show")
def show_quota(tenant: TenantName, url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show what a tenant may have, what it has, and what it was refused."""
    from node import console, quota_console

    path = quota_console.quota_path(tenant)
    try:
        if as_json:
            typer.echo(console.fetch(url, path))
        else:
            for line in quota_console.lines(console.fetch_object(url, path)):
                typer.echo(printable(line))
    except HeadraceError as error:
        fail(str(error))


@quota.command("set")
def set_quota(
    tenant: TenantName,
    config: ConfigPath,
    url: NodeUrl = "",
    weight: Annotated[float | None, typer.Option(help="Of its share of model CPU time.")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="Memory of its worker.")] = None,
    rows_s_max: Annotated[float | None, typer.Option(help="Rows a second on each node; 0: any number.")] = None,
    models_max: Annotated[int | None, typer.Option(help="Models.")] = None,
    stored_bytes_max: Annotated[int | None, typer.Option(help="Bytes of each customer's row for its outputs.")] = None,
    window_bytes_max: Annotated[int | None, typer.Option(help="Bytes of each customer's row for its windows.")] = None,
) -> None:
    """Set some of a tenant's quotas, on a running node and in its cluster, from now on.

    They hold in place of what [tenants] in the config allows all; the tenant may ask for less in its tenant.toml.
    --config is the file of a node on this machine, whose operator's token is read from its data_dir.
    """
    given = {
        "weight": weight,
        "memory_mb": memory_mb,
        "rows_s_max": rows_s_max,
        "models_max": models_max,
        "stored_bytes_max": stored_bytes_max,
        "window_bytes_max": window_bytes_max,
    }
    changes: dict[str, float | None] = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if value is not None and not math.isfinite(value):  # JSON has neither, and null would take the quota away
            fail(f"{name} can't be {value}; give a number")
    if not changes:
        fail("nothing to set; name a limit, such as --weight 2, or see `headrace quota show`")
    _change_quota(tenant, config, url, changes)


@quota.command("clear")
def clear_quota(
    tenant: TenantName,
    names: Annotated[list[str] | None, typer.Argument(metavar="LIMIT", help="Such as rows_s_max; else all.")] = None,
    *,
    config: ConfigPath,
    url: NodeUrl = "",
) -> None:
    """Take quotas of a tenant away: what [tenants] in the config allows all holds again."""
    from node.kernel.types import QUOTAS

    unknown = [name for name in names or () if name not in QUOTAS]
    if unknown:
        fail(f"{unknown[0]} is no quota; there are {', '.join(QUOTAS)}")
    _change_quota(tenant, config, url, dict.fromkeys(names or QUOTAS))


def _change_quota(tenant: str, config: Path, url: str, changes: dict[str, float | None]) -> None:
    from node import quota_console

    try:
        for line in quota_console.lines(quota_console.change(loaded(config, secrets=False), url, tenant, changes)):
            typer.echo(printable(line))
    except ConfigError as error:
        fail(*error.problems)
    except HeadraceError as error:
        fail(str(error))


ModelPath = Annotated[str, typer.Argument(metavar="TENANT/MODEL", help="The model.")]
VersionDigits = Annotated[str, typer.Option("--version", help="Its first digits, to be sure that it is this one.")]
Why = Annotated[str, typer.Option("--reason", help="Kept in the model's history.")]


@app.command()
def rollout(model: ModelPath, url: Url = NODE_URL, as_json: AsJson = False) -> None:
    """Show a model's versions: which is live, what is seen of one in stages, who changed what and why."""
    from node import console, rollout_console

    try:
        path = rollout_console.model_path(model)
        if as_json:
            typer.echo(console.fetch(url, path))
        else:
            for line in rollout_console.lines(console.fetch_object(url, path)):
                typer.echo(printable(line))
    except HeadraceError as error:
        fail(str(error))


@app.command()
def promote(
    model: ModelPath,
    config: ConfigPath,
    version: VersionDigits = "",
    live: Annotated[bool, typer.Option("--live", help="Past all further stages.")] = False,
    reason: Why = "",
    url: NodeUrl = "",
) -> None:
    """Let a version that runs beside the live one go to its next stage, or live, whatever was seen of it.

    --config is the file of a node on this machine, whose operator's token is read from its data_dir.
    """
    _move(model, config, url, move="promote", version=version, live=live, reason=reason)


@app.command()
def rollback(
    model: ModelPath, config: ConfigPath, version: VersionDigits = "", reason: Why = "", url: NodeUrl = ""
) -> None:
    """Quarantine the version that is in stages; or else the live one, and run the one before it again.

    --config is the file of a node on this machine, whose operator's token is read from its data_dir.
    """
    _move(model, config, url, move="roll_back", version=version, reason=reason)


def _move(model: str, config: Path, url: str, **wish: object) -> None:
    from node import rollout_console

    try:
        for line in rollout_console.lines(rollout_console.move(loaded(config, secrets=False), url, model, **wish)):
            typer.echo(printable(line))
    except ConfigError as error:
        fail(*error.problems)
    except HeadraceError as error:
        fail(str(error))


@app.command()
def sandbox_report(config: ConfigPath, as_json: AsJson = False) -> None:
    """Show which layers of the sandbox would hold a worker in, started from here.

    By a worker that is started as the node starts them and thrown away. Exits 1 if a layer that [tenants]
    sandbox_required demands is missing. A control group is there only if this is run in one of its own, as systemd
    gives the node: what a running node found is in its `status --json`.
    """
    from node import console
    from node.app import sandbox_report as probe
    from node.logs import configure_logging

    settings = loaded(config, secrets=False)
    configure_logging("console", "warning", settings.node.name)
    report = _operate(probe(settings))
    if as_json:
        typer.echo(console.as_json(report))
    else:
        console.show(*console.sandbox_view(report))
    if report["lacking"]:
        raise typer.Exit(1)


@app.command()
def drain(node: NodeName, config: ConfigPath, wait: Wait = False, wait_s: WaitSeconds = WAIT_S) -> None:
    """Move all that a node owns to others.

    Each partition moves once another node has caught up, and pauses for well under a second. The node goes on as a
    standby; with --wait the command ends when it owns nothing and can be stopped.
    """
    from node import cluster_console

    _operate(cluster_console.drain(loaded(config, secrets=False), node, wait_s if wait else 0, typer.echo))


@app.command()
def undrain(node: NodeName, config: ConfigPath) -> None:
    """Let a drained node own partitions again."""
    from node import cluster_console

    _operate(cluster_console.undrain(loaded(config, secrets=False), node, typer.echo))


@app.command()
def join(
    node: NodeName, raft_address: RaftAddress, config: ConfigPath, wait: Wait = False, wait_s: WaitSeconds = WAIT_S
) -> None:
    """Let a new node join the cluster: say this first, then start it.

    --config is the file of a node that is a member. With --wait the command ends when the new one has joined.
    """
    from node import cluster_console

    _operate(cluster_console.join(loaded(config, secrets=False), node, raft_address, wait_s if wait else 0, typer.echo))


@app.command()
def leave(
    node: NodeName,
    config: ConfigPath,
    dead: Annotated[bool, typer.Option("--dead", help="The node is gone for good: do not drain it first.")] = False,
    wait_s: WaitSeconds = WAIT_S,
) -> None:
    """Remove a node from the cluster, for good.

    It is drained first. To replace a dead one: `headrace leave NAME --dead`, then `headrace join` the new one.
    """
    from node import cluster_console

    _operate(cluster_console.leave(loaded(config, secrets=False), node, dead, wait_s, typer.echo))


@app.command("accept-loss")
def accept_loss(config: ConfigPath) -> None:
    """Let a node vote that came back with an empty disk, when a majority of the nodes did so at once.

    The last resort: without a majority that kept its disks no leader is elected. Start the empty node once, stop it,
    say this with its config, and start it again; for as few of them as make a majority with those that kept theirs.
    """
    from node import cluster_console

    _operate(cluster_console.accept_loss(loaded(config, secrets=False, writes=True), typer.echo))


@app.command()
def settings(
    config: ConfigPath,
    standbys: Annotated[
        int | None, typer.Option(min=0, max=STANDBY_COUNT_MAX, help="Copies of a partition beside its owner's.")
    ] = None,
    snapshot_holders_min: Annotated[
        int | None,
        typer.Option(
            min=1, max=NODES_MAX, help="Nodes that must have verified a snapshot before the changelog is cut behind it."
        ),
    ] = None,
    moves_max: Annotated[int | None, typer.Option(min=1, max=MOVES_MAX, help="Partitions that move at once.")] = None,
    builds_max: Annotated[
        int | None, typer.Option(min=1, max=MOVES_MAX, help="New standbys that catch up at once.")
    ] = None,
) -> None:
    """Show the settings that hold for the whole cluster, or set some.

    The config of its first node gave them; from then on they are changed here, while the nodes run.
    """
    from node import cluster_console

    changes = {
        "standbys": standbys,
        "snapshot_holders_min": snapshot_holders_min,
        "moves_max": moves_max,
        "builds_max": builds_max,
    }
    _operate(cluster_console.settings(loaded(config, secrets=False), changes, typer.echo))


@app.command()
def snapshot(partitions: PartitionNumbers = None, *, config: ConfigPath) -> None:
    """Take a snapshot of partitions now, or of all: on each node that has them."""
    from node import cluster_console

    _operate(cluster_console.snapshot(loaded(config, secrets=False), partitions or (), typer.echo))


@app.command()
def verify(partitions: PartitionNumbers = None, *, config: ConfigPath, as_json: AsJson = False) -> None:
    """Verify that each standby has its owner's rows, and that all snapshots are whole.

    The nodes go on with their work meanwhile. Exits 1 if anything differs, is damaged, or could not be compared.
    """
    from node import cluster_console

    if not _operate(cluster_console.verify(loaded(config, secrets=False), partitions or (), as_json, typer.echo)):
        raise typer.Exit(1)


@app.command()
def restore(
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0, help="Its number.")],
    config: ConfigPath,
    source: Annotated[
        str, typer.Option("--from", help="A URL such as [cluster] snapshot_url, or HOST:PORT of a node's peer_listen.")
    ] = "",
) -> None:
    """Replace a stopped node's store of a partition by a snapshot; its own newest one without --from.

    A node that runs does this by itself: it is for a source of your choice.
    """
    from node import cluster_console

    settings = loaded(config, secrets=False, writes=True)
    _operate(cluster_console.restore(settings, partition, source, typer.echo))


app.add_typer(table_commands.tables, name="table")
exports = typer.Typer(no_args_is_help=True, help="Write what the platform has to files.")
app.add_typer(exports, name="export")
FromTime = Annotated[str, typer.Option("--from", help="Event time, 2026-01-31T06:00 or ms; the first there is.")]
ToTime = Annotated[str, typer.Option("--to", help="Event time up to which, not included; all there is.")]


@exports.command("training")
def export_training(
    model: ModelPath,
    config: ConfigPath,
    from_time: FromTime = "",
    to_time: ToTime = "",
    out: Annotated[Path | None, typer.Option(help="A new folder; <tenant>.<model>.training by default.")] = None,
    version: VersionDigits = "",
) -> None:
    """Write the rows that a model was fed, with its outputs, as Parquet: a file for each version.

    Those that its manifest's log_rows has kept, bit for bit. They are read from Kafka, so nodes need not run, and do
    not notice if they do.
    """
    from node import rollout_console, training_console
    from node.training.times import time_ms

    try:
        name = rollout_console.model_name(model)
        wanted = training_console.Wanted(name, time_ms(from_time, 0), time_ms(to_time, 1 << 62), version)
    except HeadraceError as error:
        fail(str(error))
    folder = out or Path(f"{name.tenant}.{name.model}.training")
    for line in _operate(training_console.export(loaded(config), wanted, folder)):
        typer.echo(line)


@app.command("check-training")
def check_training(
    model: ModelPath,
    config: ConfigPath,
    from_time: FromTime = "",
    to_time: ToTime = "",
    rows_max: Annotated[int, typer.Option(min=1, help="Of each partition: the first ones.")] = 200_000,
    as_json: AsJson = False,
) -> None:
    """Compute rows that a model was fed anew, from the events, and compare every bit.

    By the code that nodes run, over the source topics and the changelog; nodes do not notice. What is found is in the
    model's status on the node of --config. Exits 1 if anything differs, or nothing could be compared.
    """
    from node import console, rollout_console, training_check, training_console
    from node.training.times import time_ms

    try:
        name = rollout_console.model_name(model)
        wanted = training_console.Wanted(name, time_ms(from_time, 0), time_ms(to_time, 1 << 62))
    except HeadraceError as error:
        fail(str(error))
    found = _operate(training_check.check(loaded(config, writes=True), wanted, rows_max))
    if as_json:
        typer.echo(console.encoded(found))
    else:
        for line in training_check.lines(found):
            typer.echo(printable(line))
    if not found.sound or not found.compared:
        raise typer.Exit(1)


def _operate(command: Coroutine[Any, Any, Outcome]) -> Outcome:
    import asyncio

    try:
        return asyncio.run(command)
    except ConfigError as error:
        fail(*error.problems)
    except HeadraceError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped waiting; what was asked for goes on, `headrace status` shows how far")


def _summary(config: Config) -> list[tuple[str, str]]:
    kafka, events = config.kafka, config.events
    fields = ", ".join(f"{name} ({field.type})" for name, field in events.fields.items())
    partitions = "all" if kafka.partitions == "all" else ", ".join(map(str, kafka.partitions))
    return [
        ("node", f"{config.node.name}, data in {config.node.data_dir}"),
        ("kafka", f"{', '.join(kafka.bootstrap)}, transactions {config.transactions}"),
        ("reads", f"{', '.join(kafka.topics)}; partitions: {partitions}"),
        (
            "writes",
            ", ".join((kafka.inferences_topic, kafka.changelog_topic, kafka.dead_letters_topic, kafka.rows_topic)),
        ),
        ("event types", ", ".join(events.types)),
        ("fields", fields or "none"),
        ("profile", ", ".join(config.profile) or "none"),
        ("tenants", _watched_summary(Path(config.tenants.directory))),
        ("http", f"{config.http.host}:{config.http.port}"),
        ("cluster", _cluster_summary(config)),
    ]


def _watched_summary(directory: Path) -> str:
    there = directory.is_dir()
    return (
        str(directory) if there else f"{directory}, which is not there: no model is taken until it is made or mounted"
    )


def _cluster_summary(config: Config) -> str:
    cluster = config.cluster
    if cluster is None:
        return "none: a node on its own"
    others = [name for name in cluster.peers if name != config.node.name]
    return f"Raft at {cluster.listen}, peers at {cluster.peer_listen}; with {', '.join(others) or 'no other node yet'}"


_GARBAGE_THRESHOLDS = (50_000, 20, 50)


def main() -> None:
    # Imports leave many objects and next to no garbage; to look for it as often as usual takes a seventh of their time.
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    app(prog_name="headrace")


if __name__ == "__main__":
    main()
