"""(P) How expressions name a feature that a tenant shares: `features.<tenant>.<name>`, the newest version of it, or
`features.<tenant>.<name>.v2`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from node.kernel.errors import NotFound
from node.kernel.types import FieldType

FEATURES_FILE: Final = "features.toml"

_VERSION: Final = re.compile(r"v([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, order=True)
class SharedName:
    """`tenant` is written as in expressions ('-' is '_'); `version` 0 means the newest."""

    tenant: str
    name: str
    version: int = 0

    def __str__(self) -> str:
        return f"features.{self.tenant}.{self.name}" + (f".v{self.version}" if self.version else "")

    @property
    def newest(self) -> SharedName:
        return SharedName(self.tenant, self.name)

    @staticmethod
    def of(parts: Sequence[str]) -> SharedName:
        """Of what follows `features.`. Raises NotFound when nothing can be called so."""
        version = _VERSION.fullmatch(parts[2]) if len(parts) == 3 else None
        if not all(parts) or len(parts) not in (2, 3) or (len(parts) == 3 and version is None):
            raise NotFound("a shared feature is features.<tenant>.<name>, or features.<tenant>.<name>.v2 of version 2")
        return SharedName(parts[0].replace("-", "_"), parts[1], int(version[1]) if version else 0)


@dataclass(frozen=True, slots=True)
class SharedValue:
    """A shared feature as an expression uses it. What it means is in `tenants.definitions`; its type never changes
    while it is used."""

    feature: SharedName
    type: FieldType


Resolver: TypeAlias = Callable[[SharedName], SharedValue]
"""What a shared feature is for one tenant. Raises NotFound, with what the tenant has to know."""


def nothing_shared(name: SharedName) -> SharedValue:
    """The Resolver of where nothing may be used."""
    raise NotFound(f"{name}: shared features can't be used here")


def taken_as_number(name: SharedName) -> SharedValue:
    """The Resolver of who asks of a manifest only what does not depend on what its features mean."""
    return SharedValue(name, "number")
