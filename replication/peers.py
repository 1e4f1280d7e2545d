"""HTTP between the cluster's nodes: calls that are signed both ways, and files, all of it bounded.

`PeerServer` answers the routes it was given, `PeerClient` asks. An error of ours in a handler reaches the caller as
an error: NotFound as NotFound, what may pass (StoreUnavailable, BrokerUnavailable, ClusterUnavailable, PeerUnavailable)
as PeerUnavailable, any other as PeerRefused with its reason. A call is signed for one node by name; which node is at
an address, the client learns from the node itself, by a signed refusal. Who has the secret is believed.
"""

from __future__ import annotations

from replication.peer_client import PeerClient, PeerClientStatistics, part_of
from replication.peer_messages import PeerCall, PeerReply, PeerRoute
from replication.peer_server import PeerServer, PeerServerStatistics

__all__ = [
    "PeerCall",
    "PeerClient",
    "PeerClientStatistics",
    "PeerReply",
    "PeerRoute",
    "PeerServer",
    "PeerServerStatistics",
    "part_of",
]
