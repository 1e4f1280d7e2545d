"""Tables between this node and the cluster's catalog: `node.tables.service.TableLedger`."""

from __future__ import annotations

from collections.abc import Mapping

from node.cluster_models import Proposer, insist
from node.kernel.errors import NotFound
from node.kernel.table_versions import Table, TableVersion
from replication.commands import DropTable, PutTable


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
            ),
        )

    async def drop(self, name: str) -> None:
        if name not in (await self._cluster.agreed()).tables:
            raise NotFound(f"there is no table {name}; `headrace table list` names those that are")
        await insist(self._cluster, lambda catalog: DropTable(revision=catalog.revision, name=name))
