"""(P) What a model's features come from."""

from __future__ import annotations

from node.kernel.types import EVENT_TIME
from tenants.expression import EventField, FeatureValue, walk
from tenants.manifest import Manifest


def event_features(manifest: Manifest) -> frozenset[str]:
    """The features that have no value without an event: they use its fields or type, themselves or through others.

    Its time is not meant: whoever asks for features without an event says as of when.
    """
    found: set[str] = set()
    for feature in manifest.features:
        for node in walk(feature.expression):
            of_event = isinstance(node, EventField) and node.field != EVENT_TIME
            if of_event or (isinstance(node, FeatureValue) and node.name in found):
                found.add(feature.name)
    return frozenset(found)
