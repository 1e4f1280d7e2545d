"""Tables between this node and the cluster's catalog: `node.tables.service.TableLedger`."""

from __future__ import annotations

from collections.abc import Mapping

from node.cluster_models import Proposer, insist
from node.kernel.errors import NotFound
from node.kernel.table_versions import Feed, Table, TableVersion
from replication.catalog_tables import waiting_held
from replication.commands import DropTable, FollowTopic, PutTable, UnfollowTopic


class CatalogTables:
    def __init__(self, cluster: Proposer) -> None:
        self._cluster = cluster

    def tables(self) -> Mapping[str, Table]:
        return self._cluster.catalog.tables

    def waits_for(self, name: str) -> list[str]:
        catalog = self._cluster.catalog
        table = catalog.tables.get(name)
        if table is None or table.passed is None:
            return []
        return sorted(catalog.nodes.keys() - catalog.holders.get(table.passed.version, {}).keys())

    def held(self, name: str) -> bool:
        return waiting_held(self._cluster.catalog, name)

    async def put(self, name: str, version: TableVersion) -> None:
        await self._cluster.agreed()
        await insist(
            self._cluster,
            lambda catalog: PutTable(
                revision=catalog.revision,
                name=name,
                version=version.version,
                schema=version.schema,
                rows=version.rows,
                bytes=version.bytes,
                who=version.who,
                at_ms=version.at_ms,
                feed=version.feed,
                offsets=version.offsets,
            ),
        )

    async def follow(self, name: str, feed: Feed) -> None:
        await self._cluster.agreed()
        await insist(
            self._cluster,
            lambda catalog: FollowTopic(
                revision=catalog.revision,
                name=name,
                topic=feed.topic,
                schema=feed.schema,
                every_ms=feed.every_ms,
                who=feed.who,
                at_ms=feed.at_ms,
            ),
        )

    async def unfollow(self, name: str) -> None:
        await self._cluster.agreed()
        await insist(self._cluster, lambda catalog: UnfollowTopic(revision=catalog.revision, name=name))

    async def drop(self, name: str) -> None:
        if name not in (await self._cluster.agreed()).tables:
            raise NotFound(f"there is no table {name}; `headrace table list` names those that are")
        await insist(self._cluster, lambda catalog: DropTable(revision=catalog.revision, name=name))
