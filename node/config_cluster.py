"""What [cluster] must be together with the rest of the file, each mistake one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from node.config_sections import ClusterSection, HttpSection, KafkaSection
from node.kernel.addresses import clash, host_and_port, is_every_address, is_loopback


def cluster_problems(cluster: ClusterSection, node: str, kafka: KafkaSection, http: HttpSection) -> Iterator[str]:
    yield from _address_problems(cluster)
    if node not in cluster.peers:
        names = ", ".join(cluster.peers)
        yield f'[cluster] peers has {names}, not this node; allowed: with "{node}", the [node] name, and its address'
    for address, count in Counter(cluster.peers.values()).items():
        if count > 1:
            yield f'[cluster] peers has "{address}" {count} times; allowed: an address of its own for each node'
    if clash(cluster.listen, cluster.peer_listen):
        yield f'[cluster] peer_listen is "{cluster.peer_listen}", which is also listen; allowed: a port of its own'
    for field in ("listen", "peer_listen"):
        if clash(f"{http.host}:{http.port}", address := getattr(cluster, field)):
            yield f'[http] port is {http.port}, and [cluster] {field} is "{address}"; allowed: a port of its own'
    yield from _secret_problems(cluster)
    yield from _store_problems(cluster.snapshot_url)
    if kafka.partitions != "all":
        yield '[kafka] partitions is a list; allowed with [cluster]: "all", the cluster says who owns which'
    if kafka.transactions == "off":
        yield '[kafka] transactions is "off"; allowed with [cluster]: "required" or "auto", they fence replaced owners'


def _addresses(cluster: ClusterSection) -> dict[str, str]:
    """Where it stands in the file -> address."""
    found = {"listen": cluster.listen, "peer_listen": cluster.peer_listen}
    if cluster.peer_address:
        found["peer_address"] = cluster.peer_address
    return found | {f"peers.{name}": address for name, address in cluster.peers.items()}


def _address_problems(cluster: ClusterSection) -> Iterator[str]:
    for field, address in _addresses(cluster).items():
        if not 1 <= host_and_port(address)[1] <= 65_535:
            yield f'[cluster] {field} is "{address}"; allowed: a port from 1 to 65535'
        if is_every_address(address) and not field.endswith("listen"):
            yield f'[cluster] {field} is "{address}"; allowed: an address that other nodes can reach'
    if is_every_address(cluster.peer_listen) and not cluster.peer_address:
        yield f'[cluster] peer_address is missing; needed, since others can\'t reach "{cluster.peer_listen}"'


def _secret_problems(cluster: ClusterSection) -> Iterator[str]:
    if cluster.secret_file and cluster.secret_env:
        yield "[cluster] secret_file and secret_env: at most one may be set"
    if cluster.secret_file or cluster.secret_env:
        return
    for field, address in _addresses(cluster).items():
        reachable = field.endswith("listen") or not is_every_address(address)
        if reachable and not is_loopback(address):
            yield f'[cluster] secret_file or secret_env is needed, since {field} is "{address}", open to other machines'
            return


def _store_problems(url: str) -> Iterator[str]:
    """A secret in the URL would be in the log and in answers."""
    try:
        parts = urlsplit(url)
        named = parts.username is not None or parts.password is not None
    except ValueError as mistake:
        yield f"[cluster] snapshot_url can't be read as a URL: {mistake}"
        return
    if named:
        yield "[cluster] snapshot_url names a user; allowed: a URL without one, credentials come from the environment"
