"""Reading a tenant's features.toml. Blocking: the watcher calls it in a thread."""

from __future__ import annotations

from pathlib import Path

from node.kernel.errors import ManifestError
from node.kernel.limits import MANIFEST_BYTES_MAX
from tenants import folder
from tenants.registry import FeaturesSeen, FeaturesUnreadable
from tenants.shared_names import FEATURES_FILE


def read_features(
    root: Path, tenant: str, signature: folder.Signature | None, first: bool
) -> FeaturesSeen | FeaturesUnreadable | None:
    """What the file says; None when it went meanwhile. `signature` None: there is none. `first` as of a pair.

    Raises OSError when it can't be read.
    """
    if signature is None:
        return FeaturesSeen(tenant, "")
    try:
        with folder.opened(root, tenant, FEATURES_FILE, MANIFEST_BYTES_MAX) as held:
            return FeaturesSeen(tenant, held.read().decode(), first)
    except ManifestError as error:
        return FeaturesUnreadable(tenant, error.problems)
    except UnicodeDecodeError:
        return FeaturesUnreadable(tenant, (f"{FEATURES_FILE}: not UTF-8; save it as UTF-8",))
    except FileNotFoundError:
        return None
