"""Every bound of the node in one place. A bound is here, named with its unit, or it does not exist.

What an operator may want to trade is in `node.config`, which is itself bounded by these.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

EVENT_BYTES_MAX = 1 * MIB
"""A larger source record is a dead letter, unread."""
EVENT_DEPTH_MAX = 64
"""Deeper JSON is a dead letter."""
CUSTOMER_BYTES_MAX = 256
EVENT_TYPE_BYTES_MAX = 128
TEXT_BYTES_MAX = 4 * KIB
"""Of one text field of an event; a longer one is a dead letter."""
EVENT_TYPES_MAX = 256
EVENT_FIELDS_MAX = 256
NUMBER_MAGNITUDE_MAX = 1e15
"""A number beyond it can't be summed exactly in float64 and is a dead letter."""
SOURCE_TOPICS_LEFT_MAX = 64
"""Source topics out of the config whose progress is kept, should they come back; beyond, what left first goes."""
EVENT_TIME_AGE_MS_MAX = 20 * 366 * 24 * 3600 * 1000
EVENT_TIME_AHEAD_MS_MAX = 24 * 3600 * 1000
"""An event time further from the Kafka timestamp is absurd: a dead letter."""
EVENT_TIME_SKEW_MS_MAX = 60_000
"""An event further ahead of the node's clock counts as come now where the time of a partition's events is asked for, or
one event would close all windows and sessions up to its time."""

POLL_EVENTS_MAX = 65_536
POLL_BYTES_MAX = 64 * MIB
CYCLE_WAIT_MS_MAX = 10_000
IDLE_POLL_MS = 250
"""How long a poll waits for an event while there is nothing else to do for a partition: it ends with the first one, so
this costs no latency; a stop is noticed that much later."""

DEAD_LETTER_BYTES_MAX = 900 * KIB
"""The original bytes are cut to this in a dead letter, and the letter says so."""
DEAD_LETTER_KEY_BYTES_MAX = 64 * KIB
DEAD_LETTER_DETAIL_BYTES_MAX = KIB
RECORD_BYTES_MAX = 900 * KIB
"""Of one Kafka record; brokers take 1 MiB unless set otherwise. A larger frame is split into parts."""
FRAME_PARTS_MAX = 4096
EXPORT_GROUP_BYTES = 64 * MIB
"""Of rows that an export holds before it writes them; each version's are held apart."""
EXPORT_VERSIONS_MAX = 64
"""Of one model, in one export."""
DIFFERENCES_TOLD_MAX = 20
"""Of one check of training data; all are counted."""
ROW_LOG_COMMITS_MAX = 1024
"""After so many commits with rows of a version, the rows topic says again what they follow from."""
FRAME_BYTES_MAX = 1024 * MIB

ROW_SLOTS_MAX = 4096
"""32 KiB a customer; a manifest that would need more is refused."""
ROW_REDUCTION_MS_MIN = 600_000
"""Between two times that a trial may have slots taken back from a partition's rows: each time the cached rows are
converted, and those that are stored take a few times as long to read until they change."""
ROW_REDUCTIONS_MAX = 65_536
"""Of a partition for ever: each leaves some bytes in the layout for each run of slots that it kept, 5 KB at worst."""
ROW_UNNEEDED_MS_MIN = 86_400_000
"""How long nothing must have needed a row's slots before they are taken back though there is room: a model may be gone
for a moment, and each time all rows are converted."""
ROW_UNNEEDED_SHARE_MIN = 0.25
"""Of a row's slots, before that is worth it: until then the rest costs CPU time, disk and memory as if it were used."""
LAYOUTS_CARRIED_MAX = 256
"""Earlier layouts of which it is remembered where their slots are now: 64 KiB each at most."""
ROW_CACHE_BYTES_MAX = 256 * MIB
"""Of each partition; the operator sets less or more in the config."""
WINDOW_MS_MAX = 400 * 24 * 3600 * 1000
WRITE_STALL_MS_MAX = 2_000
"""How long a store may refuse a write because its flushes or compactions lag, before it counts as unavailable."""
SEQUENCE_CHUNK_ROWS_MAX = 4096
WAITING_ROWS_MAX = 1_048_576
"""Of one tenant's triggers in one partition's sequence log; operators and tenants set less."""
WAITING_MB_MAX = 4096
WAITING_AGE_MS_MAX = 30 * 24 * 3600 * 1000
WAITING_SWEPT_ROWS_MIN = 4096
"""What was given up is taken out of a line of the sequence log once it is so many more rows than wait there."""
WAITING_PASSED_CHUNKS_MAX = 4096
"""And once it is so many chunks between those that are worked on and the first that is not."""
WAITING_SWEPT_CHUNKS = 512
"""That are put anew for it at a time, where that is enough."""
SETTLED_ROWS_MAX = 32_768
"""Late answers that one cycle commits beside its own; a chunk more at most."""
CYCLE_SLOTS_MAX = 4 * MIB
"""Of the rows of a micro-batch's customers, and as many of its late answers': where rows are wide, a cycle takes fewer
of both. The loop does nothing else while so many slots are read, folded and sent: some tenths of a second."""
INTERVAL_MS_MIN = 1_000
"""Of an interval model's `every`."""
INTERVAL_LOOK_MS = 100
"""How often a partition looks whether a run is due."""
INTERVAL_SCAN_ROWS_MAX = 1024
"""Rows that one cycle reads for a chunk of an interval run: a millisecond or two in which it does nothing else."""
INTERVAL_CHUNK_ROWS_MAX = 128
"""Of these, what the model is called with: committing them costs a later cycle a few milliseconds too."""
INTERVAL_REST_FACTOR = 40
INTERVAL_REST_BESIDE_EVENTS_FACTOR = 120
"""After a chunk was read, a partition reads none for so many times as long, the more if there were events meanwhile:
the rest is for them. A chunk costs twice as much again when it is answered and committed."""
INTERVAL_ROWS_SETTLED_MAX = 128
"""Rows of answered chunks that one cycle commits; a chunk at least."""
COUNTERS_FORMER_MAX = 1000
"""Counters of models that are not there any more, by name, in each frame of a partition; beyond, they are added up."""
INTERVAL_RUNS_KEPT_MAX = 4096
"""Interval models whose last run a partition remembers; beyond, those that are not there any more are forgotten."""

MODEL_BYTES_MAX = 512 * MIB
MODEL_UNPACKED_BYTES_MAX = 2048 * MIB
"""Of a model file once decompressed; the tenant's memory limit is usually reached first."""
MANIFEST_BYTES_MAX = 256 * KIB
TENANTS_MAX = 512
MODELS_PER_TENANT_MAX = 64
ROWS_PER_SECOND_MAX = 1e7
STORED_BYTES_MAX = ROW_SLOTS_MAX * 8
"""Of each customer's row, for the outputs of one tenant's models."""
WINDOW_BYTES_MAX = ROW_SLOTS_MAX * 8
"""Of each customer's row, for the windows that one tenant asks for."""
MEMORY_MB_MIN = 64
MEMORY_MB_MAX = 1_048_576
WEIGHT_MIN = 1e-3
WEIGHT_MAX = 1e3
"""Of a tenant's or model's share; further apart, shares mean nothing."""
FEATURES_PER_MODEL_MAX = 512
OUTPUTS_PER_MODEL_MAX = 32
LABEL_BYTES_MAX = 256
"""Of one text class of a model, as JSON: whole in each of its inferences, so rows alone would not bound these."""
SHARED_FEATURES_PER_TENANT_MAX = 256
SHARED_FEATURE_VERSIONS_MAX = 16
"""Of one shared feature: the newest, and earlier ones that are still used."""
SHARED_FEATURE_CHAIN_MAX = 16
"""Shared features that use each other, one through the next."""
EXPRESSION_DEPTH_MAX = 32
EXPRESSION_BYTES_MAX = 4 * KIB
ROWS_QUEUED_PER_MODEL_MAX = 65_536
CHUNKS_IN_FLIGHT_PER_MODEL_MAX = 4
CALL_DEADLINE_MS_MAX = 600_000
WORKER_BACKOFF_MS_MIN = 100
WORKER_BACKOFF_MS_MAX = 60_000
WORKER_START_MS_MAX = 30_000
TRIAL_MS_MAX = 120_000
TRIALS_MAX = 2
"""At once: one slow model file must not hold up everybody's."""
TRIAL_TURN_MS = 10_000
"""After it, a trial gives way to others that wait, and begins anew later."""
TRIAL_RETRY_MS_MIN = 500
TRIAL_RETRY_MS_MAX = 60_000
"""A trial that no worker could be had for, or no file, is made again after this."""
FAILED_ROWS_MIN = 256
"""Most of so many rows in sequence failed, though nothing was missing in them: then the version is failing."""
QUARANTINED_PER_MODEL_MAX = 8
"""Failed versions that are remembered, the newest: the same pair found again is not tried again."""
STAGES_MAX = 8
"""That one version goes through before it is live."""
STAGE_ROWS_MAX = 10**12
STAGE_MS_MAX = 90 * 24 * 3600 * 1000
"""What a stage may ask to be seen or waited for."""
STAGE_OUTPUTS_MAX = 8
"""Outputs of a staged version whose distribution is kept, the first; each takes a fixed 13 KiB."""
STAGE_LOOK_MS = 500
"""How often staged versions are judged."""
STAGES_REPORTED_MAX = 1024
"""Staged versions that one node tells the leader of."""
STAGE_HISTORY_MAX = 16
"""Changes of a model's versions that are remembered, the newest."""
STAGE_REASON_BYTES_MAX = 256
"""Of the reason that is remembered with each."""
SHADOW_ROWS_MAX = 8192
"""Of one shadow, given to its worker or waiting for the live version's answer; what comes beyond is not compared."""
FATAL_ROWS_MAX = 5
"""Rows that each took their worker along twice, within FATAL_ROWS_MS: then the version is failing, not the rows."""
FATAL_ROWS_MS = 600_000
QUANTUM_MS = 40
"""Model CPU time of a turn unless the config says otherwise. Ten backlogged tenants get 0.98 of what whole batches in a
queue would give them, 0.95 with 30 ms, and 0.94 with 20 ms (medians of seven, interleaved): calls of
those models cost about 2 ms beside their rows. Jain's index of shares over 10 s: 0.999 with 30 ms in one run; with
40 ms 0.999 in one and 0.994 in another; 0.998 with 60 ms in one."""
WORKER_NICENESS = 10
"""Added to the node's: its loop serves all tenants, and goes before any one tenant's model."""
BESIDE_LOSSES_MAX = 2
"""Workers that a shadow or canary may take along within FATAL_ROWS_MS: the live version is in the same worker."""
WORKER_THREADS_MAX = 1
"""A worker is one thread: what it uses is then at most a core, and only while a call that is charged for runs."""
WORKER_MEMORY_EXTRA_BYTES = 64 * MIB
"""Of a worker's control group, beyond the tenant's memory: pages of the warm server that it changes count there."""
WORKER_LOOK_MS = 5_000
"""How often workers are looked at: the memory of those that have done something, the CPU time of all."""
WORKER_LAST_LOOK_MS = 10
"""After a call's deadline, for an answer that came in time while the node did not look: then its worker is killed."""
WORKER_UNASKED_MS_MAX = 500
"""CPU time between two looks of a worker that nothing was asked of all the while; beyond it, it is killed."""
TENANT_LOG_BYTES_MAX = 128 * KIB
"""Of one tenant's printed lines, kept in memory; the oldest go first."""
TENANT_LOG_LINE_BYTES_MAX = 4 * KIB
"""A longer line is cut into several."""
TENANT_LOG_BYTES_PER_SECOND = 32 * KIB
"""Taken from one tenant's workers; what they print beyond it they lose."""
TENANT_LOG_BURST_BYTES = 128 * KIB
VERSIONS_PER_TENANT_MAX = 2 * MODELS_PER_TENANT_MAX
"""Twice the models: while versions are swapped, rows of the old ones still run."""
TENANT_FOLDER_ENTRIES_MAX = 4096
"""Directory entries looked at in one tenant's watched folder."""
TENANT_NAMES_IGNORED_MAX = 16
"""Of a tenant's folder, that its status file names, the first; once these are mended, the next."""
ISOLATION_CALLS_MAX = 256
"""Calls spent on finding the bad rows of one failed batch; rows not cleared by then get its error."""
PUBLISH_RETRY_MS_MIN = 200
PUBLISH_RETRY_MS_MAX = 10_000
"""What a node has found for the cluster's catalog, and the cluster did not take, is tried again after this."""
STATUS_FILE_BYTES_MAX = 64 * KIB
STATUS_FILES_UNWRITTEN_MAX = 4096
"""That a tenant's folder did not take, and that are written later; one more is written when it changes next."""
WORKER_MESSAGE_BYTES_MAX = MODEL_BYTES_MAX + MIB

TABLES_MAX = 256
TABLE_COLUMNS_MAX = 256
TABLE_ROWS_MAX = 200_000_000
TABLE_KEY_BYTES_MAX = 128
"""Of a text key; every key of a table takes as much room as its longest."""
TABLE_FILE_BYTES_MAX = 64 * 1024 * MIB
"""Of a built version; operators allow uploads of less."""
TABLE_SCHEMA_BYTES_MAX = 64 * KIB
TABLE_PROBLEMS_MAX = 20
"""Of a refused file; nobody reads more at once."""
TABLE_SAMPLE_ROWS = 10_000
"""Of a CSV or NDJSON file, from which types are inferred that nobody has declared."""
TABLE_BUILD_MS_MAX = 3600 * 1000
TABLE_BUILD_NICENESS = 19
"""Added to the node's: whoever waits for an answer of a model goes before whoever waits for a new version."""
TABLE_UPLOAD_MS_MAX = 2 * 3600 * 1000
"""Of one upload, its check and its build together."""
TABLE_STALL_MS_MAX = 30_000
"""An upload that brings nothing for so long is given up."""
TABLE_UPLOADS_MAX = 2
"""At once on one node; one more is refused."""
TABLE_FEED_PARTITIONS_MAX = 1024
TABLE_FEED_EVERY_MS_MIN = 1_000
TABLE_FEED_SHARE_MAX = 0.2
"""Of the time, that the node which feeds tables reads, checks and builds; it rests for the remainder."""
TABLE_FEED_GAP_MS_MAX = 12 * 3600 * 1000
"""A topic that was not followed for longer is read from its beginning: brokers keep deletions 24 hours by default."""
TABLE_FEED_PROBLEMS_MAX = 20
"""Records with a mistake that a table's status names, the newest; all are counted."""
TABLE_VERSIONS_RETIRED_MAX = 1
"""Of one table, kept for a rollback; older ones are dropped."""

BROKER_CALL_MS_MAX = 30_000
"""Around every call of the Kafka client: some of them hang when the broker is gone."""
BROKER_RETRY_MS_MIN = 100
BROKER_RETRY_MS_MAX = 10_000
FENCED_RETRY_MS = 30_000
"""A fenced partition tries again after this: at once, two nodes that own it by mistake would fence each other all
the time, and neither get on."""
STOP_MS_MAX = 30_000
"""A stopping node that has not finished its cycles by then gives up on them; the state stays right."""

HTTP_BODY_BYTES_MAX = 1 * MIB
HTTP_REQUESTS_MAX = 256
"""Requests in progress; one more is answered 503."""
HTTP_REQUEST_MS_MAX = 10_000
"""From a request's headers to the last byte of its answer; also how long headers may take, or a connection idle."""
HTTP_CONNECTIONS_MAX = 1024
"""One more is told 503 and closed."""
HTTP_LINE_BYTES_MAX = 8 * KIB
"""Of the request line: what the parser takes at all. Path and query have bounds of their own."""
HTTP_HEADER_BYTES_MAX = 16 * KIB
"""Of one header field."""
HTTP_PATH_BYTES_MAX = 2 * KIB
HTTP_QUERY_BYTES_MAX = 2 * KIB
HTTP_MODELS_MAX = 1000
"""Model versions in one answer; it says where to go on."""
MODEL_PAGES_MAX = 100
"""Of such answers, that the command line asks for."""
METRIC_SERIES_MAX = 1000
"""Of one metric; what is beyond is added up under the label `_other`."""

STANDBY_POLL_MS = 250
"""How long a standby's fetch waits at the broker for something new; what it holds up waits as long at worst."""
STANDBY_PROOF_MS_MAX = 1_500
"""A standby that was at the end this long ago counts as being there: an idle changelog proves it once a fetch."""
STANDBY_SILENT_MS_MAX = 10_000
"""A broker that has answered no fetch for so long is connected to anew."""
STANDBY_UNKNOWN_FRAMES = 1_000_000
"""The lag of a replica that does not know it yet."""
LEASE_LOOK_MS = 50
"""How often a node without a lease looks whether it is back; one that has a lease looks when that may have run out."""
RELEASE_MS_MAX = 5_000
"""A partition that moves and has not finished its cycle by then is closed all the same; the cycle is done again."""
UNUSED_MS_MAX = 600_000
"""State of a partition that this node is neither owner nor standby of is deleted after this."""

NODES_MAX = 32
PARTITIONS_MAX = 4096
STANDBYS_MAX = 8
"""Of one partition, spares that a move needs included."""
STANDBY_COUNT_MAX = 4
"""What an operator may ask for; the rest of STANDBYS_MAX is for moves."""
MOVES_MAX = 64
"""Planned moves at once in the whole cluster."""
LEASE_MS_MIN = 200
LEASE_MS_MAX = 60_000
NAME_BYTES_MAX = 128
"""Of a node, tenant or model, an address, a rack, an operator."""
REASON_BYTES_MAX = 512
VERSIONS_PER_MODEL_MAX = 16
"""Kept in the catalog; retired ones have to be forgotten before more can be put."""
VERSIONS_RETIRED_MAX = 4
"""Of one model; the leader has the oldest beyond forgotten. What is kept can go live again without a new trial."""
ROLLOUT_COMMANDS_MAX = 64
"""Of one look at what may go live; the rest follows at the next."""
REPORT_BYTES_MAX = 64 * KIB
"""Of what a model's trial found, as the catalog keeps it."""
LABELS_BYTES_MAX = REPORT_BYTES_MAX - 4 * KIB
"""Of all text classes of a model together, as JSON, which are in that report."""
BLOBS_MAX = 65_536
CATALOG_MANIFEST_BYTES_MAX = 64 * MIB
"""Of all manifests, reports and tenants' settings together: the catalog is held whole in memory and dumped whole."""
CATALOG_BYTES_MAX = 256 * MIB
COMMAND_BYTES_MAX = MANIFEST_BYTES_MAX + REPORT_BYTES_MAX + 16 * KIB
REFUSALS_KEPT_MAX = 64

CLUSTER_NODES_MAX = 15
CLUSTER_COMMAND_BYTES_MAX = 512 * KIB
"""Of one catalog command: a manifest and what goes with it."""
CLUSTER_COMMANDS_PER_SECOND_MAX = 2_000
"""Proposed by one node: the catalog says who and what, nothing that grows with traffic."""
CLUSTER_PROPOSALS_MAX = 256
"""Commands of one node waiting for their outcome; one more is refused."""
CLUSTER_SECRET_BYTES_MIN = 16
CLUSTER_SECRET_BYTES_MAX = 4 * KIB
CLUSTER_START_MS_MAX = 60_000
CLUSTER_STOP_MS_MAX = 10_000
CLUSTER_STRANGERS_MAX = 32
"""Connections to the Raft port that have not shown the secret yet; one more closes the oldest."""
CLUSTER_STRANGER_MS_MAX = 3_000
CLUSTER_STRANGER_BYTES_MAX = 4 * KIB
CLUSTER_PROBE_MS_MAX = 50
"""Of connecting, and then of waiting for an end: Raft stands still meanwhile on the node that asks whether another's
process is still there."""
CLUSTER_TICKS_FAILED_MAX = 100
"""In a row; then the node stops loudly."""

PEER_CLOCK_SKEW_MS_MAX = 30_000
"""How far two nodes' clocks may differ; a call between nodes is good for that long, and once."""
PEER_NONCES_MAX = 262_144
"""Calls remembered so that none is taken twice; some 4,000 a second."""
PEER_CONNECTIONS_MAX = 256
"""To the peer port; one more is closed."""
PEER_REQUESTS_MAX = 128
"""In progress, files being sent left aside; one more is answered 503."""
PEER_REQUEST_MS_MAX = 30_000
PEER_BODY_BYTES_MAX = 1 * MIB
PEER_REPLY_BYTES_MAX = 16 * MIB
"""Of a reply that is no file."""
PEER_ASKS_MAX = 256
"""Calls of one node to others in progress; one more is refused here."""
PEER_ASK_MS_MAX = 5_000
"""How long a caller waits unless it says otherwise."""
PEER_CONNECT_MS_MAX = 2_000
PEER_FILES_MAX = 32
"""Files being sent to peers at once, each by a thread; one more is answered 503."""
PEER_FETCHES_MAX = 8
"""Files being fetched at once, each by a thread; others wait."""
PEER_FETCHES_WAITING_MAX = 4096
PEER_FETCH_ATTEMPTS_MAX = 5
"""In a row, of one call, as long as each brought bytes."""
PEER_FILE_BYTES_MAX = 64 * 1024 * MIB
PEER_STALL_MS_MAX = 10_000
"""Without a byte, a transfer is cut; it can be resumed."""
PEER_BYTES_PER_SECOND_MIN = MIB
"""A transfer that is slower over all is cut too; it can be resumed."""
BLOB_FETCHES_MAX = 4
"""Model files being fetched at once; one that a worker waits for comes on top."""
BLOB_RETRY_MS_MIN = 200
BLOB_RETRY_MS_MAX = 30_000
"""Between two rounds of asking every holder of a model file."""
BLOB_LOOK_MS = 30_000
"""How often the folder of model files is looked at when nothing changed: one may be gone."""
BLOB_CHECK_MS = 24 * 3600 * 1000
"""How often each model file is read again and its hash compared."""
CLUSTER_RENEWALS_MAX = 32
"""Renewals of a node's own lease that have not come back; of more, the oldest is forgotten."""
CLUSTER_REPORT_BYTES_MAX = 1 * MIB
"""Of what a node tells the leader of its partitions."""
CLUSTER_REPORT_MS_MAX = 2_000
CLUSTER_PLAN_COMMANDS_MAX = 64
"""Of one plan, proposed at once; the next plan goes on."""

SNAPSHOTS_KEPT = 2
"""Of a partition on a node; one that a peer is fetching stays a little longer."""
SNAPSHOT_FILES_MAX = 20_000
SNAPSHOT_FILE_BYTES_MAX = PEER_FILE_BYTES_MAX
SNAPSHOT_MANIFEST_BYTES_MAX = 8 * MIB
SNAPSHOT_CHECKED_MS_MAX = 6 * 3600 * 1000
"""A file that was read and found right is not read again for that long while newer snapshots have it too."""
SNAPSHOT_FETCHES_MAX = 4
"""Files of one snapshot on their way at once."""
SNAPSHOT_THREADS_MAX = 4
SNAPSHOT_PIN_MS_MAX = 120_000
"""A snapshot whose manifest or file a peer asked for within it is not removed."""
SNAPSHOT_LOOK_MS = 1_000
"""How often it is looked which partitions are due for a snapshot."""
SNAPSHOT_RETRY_MS = 30_000
"""A snapshot that could not be taken or uploaded is tried again after this."""
SNAPSHOT_ATTEMPTS_MAX = 8
"""Snapshots tried in one restore: one may be damaged or removed, or its node go, while it is being fetched."""
SNAPSHOT_RESTORES_MAX = 8
"""Partitions of a node restored at once; others wait. Each asks every other node, at most PEER_ASKS_MAX in all."""
SNAPSHOT_STORE_CALLS_MAX = 8
"""Calls of the store by URL at once, each by a thread: of several restores, an upload, and what is asked of it."""
SNAPSHOT_STORE_ASK_MS_MAX = 60_000
"""How long the store by URL may take to say what it has; a driver may take longer to give up by itself."""
SNAPSHOT_UPLOAD_MS_MAX = 30 * 60 * 1000
"""Of one snapshot, then it is given up and tried again; what was uploaded meanwhile is found there."""
SNAPSHOT_STORE_KEPT_MS_MIN = 3 * SNAPSHOT_UPLOAD_MS_MAX
"""Manifests in the store stay so long, whatever comes after them."""
SNAPSHOT_INSPECT_MS_MAX = 30 * 60 * 1000
"""Of the process that goes through a copy of a store."""
CUT_INTERVAL_MS = 10_000
CUT_DELAY_MS = 600_000
"""A changelog is cut where it could have been so long ago: who restores a snapshot still finds what follows it."""
CUT_CANDIDATES_MAX = 64
"""Of one partition: places to cut that wait for the delay to pass; while there are so many, no newer is noted."""
CUT_STORE_MS_MIN = 60_000
"""How often the store by URL is asked for a partition's newest snapshot, where nodes have too few: asking costs."""
DIGEST_BUCKETS = 4096
DIGEST_BUCKET_ENTRIES_MAX = 65_536
DIGEST_DIFFERENCES_MAX = 10
"""Customers named of stores that differ."""
VERIFY_HOLD_MS_MAX = 60_000
"""A standby that is held for a comparison goes on after this, whatever became of it."""
VERIFY_ANSWER_MS = 20_000
"""A call of a comparison that takes longer is answered with nothing and made again."""
VERIFY_LOOK_MS = 20
VERIFY_WORKS_MAX = 16
"""Comparisons that other nodes have started here and not yet fetched the outcome of."""

OPERATOR_JOBS_MAX = 8
"""Snapshots and checks that operators have started on a node and that run; one more is refused."""
OPERATOR_JOBS_KEPT_MAX = 1024
"""Ended ones are told of until there are so many."""

BACKFILL_CHUNK_EVENTS = 2048
"""Of history, folded in one commit beside its own events."""
BACKFILL_CHUNK_SLOTS = 2 * MIB
"""Of their customers' rows, in wide ones fewer events."""
BACKFILL_REST_FACTOR = 3
"""Times as long as a chunk took to decode and fold, no more of history is taken: a fourth of a partition's time."""
BACKFILL_RETRY_MS = 1_000
"""After history could not be read."""
BACKFILL_TAIL_BEGINS = 20_000
"""Once a fill has no more records to read, the cycle's micro-batches are kept for it as well."""
BACKFILL_TAIL_EVENTS_MAX = 100_000
"""Of those; if history is not read by then they are dropped, and kept anew later."""
