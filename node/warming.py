"""What a node starts before it imports itself: the process that its workers are forked from.

That imports every model library, in more time than all else takes that a node does before it owns anything, so it
comes first and runs beside the rest. Nothing heavy may be imported here.
"""

from __future__ import annotations

from node.config_sections import TenantsSection
from tenants.cgroups import ControlGroups
from tenants.sandbox import SandboxSettings
from tenants.warm_process import WarmProcess


def warmed(tenants: TenantsSection) -> WarmProcess:
    """Started, not waited for. Raises WorkerLost."""
    return WarmProcess(sandbox_settings(tenants), ControlGroups.of_this_process())


def sandbox_settings(tenants: TenantsSection) -> SandboxSettings:
    return SandboxSettings(
        required=frozenset(tenants.sandbox_required),
        libraries=frozenset(tenants.allow),
        extra_globals=tuple(allowed_global(name) for name in tenants.allow_globals),
    )


def allowed_global(dotted: str) -> str:
    """A line of the workers' list of globals; what an operator adds may be called too."""
    module, _, name = dotted.rpartition(".")
    return f"{module} {name} call"
