"""Figures for Prometheus, made from one `NodeStatus` a scrape: nothing is counted twice, or kept here.

Label values are the operator's and tenants' names, never a customer's. A metric gives at most METRIC_SERIES_MAX
series; what is beyond is added up under `_other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from node.kernel.limits import METRIC_SERIES_MAX
from node.kernel.types import OTHER
from node.serving.view import HttpStatus, NodeStatus, PartitionStatus, StageStatus, TenantStatus

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Series = Mapping[tuple[str, ...], float]
"""Label values -> value."""


class NodeMetrics:
    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_StatusCollector(status))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _StatusCollector(Collector):
    def __init__(self, status: Callable[[], NodeStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: else registering would ask the node for its status before it has started."""
        return ()

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield _gauge("ready", "1 while the node does all of its work.", (), {(): float(status.ready)})
        yield from _partition_metrics(status.partitions)
        yield from _counted_metrics(status.counters)
        steps: Series = {(step,): seconds for step, seconds in status.step_seconds.items()}
        yield _counter("step_seconds", "Time of the cycle, by step, all partitions.", ("step",), steps)
        yield from _model_metrics(status.partitions)
        yield from _tenant_metrics(status)
        yield from _stage_metrics(status.tenants)
        yield from _training_metrics(status.tenants)
        if status.http is not None:
            yield from _http_metrics(status.http)
        parts = status.cluster_parts.items()
        figures: Series = {(part, name): value for part, found in parts for name, value in _flat(found)}
        yield _gauge("cluster", "What /v1/status says under cluster_parts.", ("part", "figure"), figures)


def _partition_metrics(partitions: list[PartitionStatus]) -> Iterator[Metric]:
    def by_partition(value: Callable[[PartitionStatus], float | None]) -> Series:
        values = {(str(partition.number),): value(partition) for partition in partitions}
        return {labels: found for labels, found in values.items() if found is not None}

    label = ("partition",)
    yield _gauge("partition_running", "1 while it runs.", label, by_partition(lambda one: one.phase == "running"))
    yield _counter("partition_failures", "Times it was opened again.", label, by_partition(lambda one: one.failures))
    yield _gauge("lag_events", "Events between progress and source end.", label, by_partition(lambda one: one.lag))
    yield _counter("events", "Events taken in.", label, by_partition(_total("events")))
    yield _counter("ignored", "Events of types that are not configured.", label, by_partition(_total("ignored")))
    yield _counter("late", "Events too late for a window they belong to.", label, by_partition(_total("late")))
    ahead = by_partition(_total("ahead"))
    yield _counter("ahead", "Events over a minute ahead of the node's clock.", label, ahead)
    yield _gauge(
        "row_bytes", "Of a customer's row, of 32768 that there may be.", label, by_partition(lambda one: one.row_bytes)
    )
    yield _counter("cache_hits", "Rows found in the cache.", label, by_partition(lambda one: one.cache.hits))
    yield _counter("cache_misses", "Rows read from the store.", label, by_partition(lambda one: one.cache.misses))
    yield _gauge("cache_rows", "Rows in the cache.", label, by_partition(lambda one: one.cache.rows))
    yield _gauge("cache_bytes", "Bytes of the cache.", label, by_partition(lambda one: one.cache.bytes))


def _total(name: str) -> Callable[[PartitionStatus], float | None]:
    """None where a partition has told no totals, as while it starts: after a 0, all since its changelog began would
    seem to have come at once."""
    return lambda partition: partition.counters.get(name, 0) if partition.counters else None


def _counted_metrics(counters: Mapping[str, int]) -> Iterator[Metric]:
    """Counters are named `<what> <of which>`."""
    counted: dict[str, Counter[tuple[str, ...]]] = {"dead_letters": Counter(), "inferences": Counter()}
    counted |= {"failed": Counter(), "shed": Counter(), "logged": Counter(), "unlogged": Counter()}
    counted |= {"intervals": Counter(), "intervals_late": Counter(), "intervals_skipped": Counter()}
    for name, value in counters.items():
        what, _, which = name.partition(" ")
        if what in counted and which:
            counted[what][_labels(what, which)] += value
    model = ("tenant", "model")
    yield _counter("dead_letters", "Records that could not be used.", ("reason",), counted["dead_letters"])
    yield _counter("inferences", "Inferences committed.", model, counted["inferences"])
    yield _counter("model_failures", "Triggers a model failed on.", model, counted["failed"])
    yield _counter("training_rows", "Rows kept as training data.", model, counted["logged"])
    yield _counter("training_rows_too_large", "Rows that no record can hold.", model, counted["unlogged"])
    yield _counter("sheds", "Triggers given up.", ("reason", *model), counted["shed"])
    yield _counter("intervals", "Interval runs finished.", model, counted["intervals"])
    yield _counter("intervals_late", "Interval runs that outlasted it.", model, counted["intervals_late"])
    yield _counter("intervals_skipped", "Intervals without a run.", model, counted["intervals_skipped"])


def _model_metrics(partitions: list[PartitionStatus]) -> Iterator[Metric]:
    model = ("tenant", "model")
    yield from _backfill_metrics(partitions, model)
    rows: Counter[tuple[str, ...]] = Counter()
    size: Counter[tuple[str, ...]] = Counter()
    oldest: dict[tuple[str, ...], float] = {}
    waited: dict[tuple[str, ...], float] = {}
    for partition in partitions:
        for name, waiting in partition.backlog.items():
            labels = _labels("backlog", name)
            rows[labels] += waiting.rows
            size[labels] += waiting.bytes
            waited[labels] = max(waited.get(labels, 0.0), waiting.waiting_ms / 1000)
            oldest[labels] = max(oldest.get(labels, 0.0), waiting.oldest_ms / 1000)
    yield _gauge("backlog_rows", "Triggers in the sequence log.", model, rows)
    yield _gauge("backlog_bytes", "What they take, uncompressed.", model, size)
    yield _gauge("backlog_waiting_seconds", "Since the oldest of them was queued.", model, waited, max)
    yield _gauge("backlog_oldest_seconds", "Age of the oldest of them, by event time.", model, oldest, max)


def _backfill_metrics(partitions: list[PartitionStatus], model: tuple[str, ...]) -> Iterator[Metric]:
    warming: Counter[tuple[str, ...]] = Counter()
    events: Counter[tuple[str, ...]] = Counter()
    percent: dict[tuple[str, ...], float] = {}
    for partition in partitions:
        for name, status in partition.backfills.items():
            labels = _labels("backfill", name)
            warming[labels] += status.warming
            events[labels] += status.events
            percent[labels] = min(percent.get(labels, 100.0), status.percent)
    yield _gauge("backfill_warming_partitions", "Partitions whose windows are not filled yet.", model, warming)
    yield _gauge("backfill_events", "Events of history that went into its windows.", model, events)
    yield _gauge("backfill_percent", "Of the history to read; the partition with the least.", model, percent, min)


def _labels(what: str, which: str) -> tuple[str, ...]:
    if what == "dead_letters":
        return (which,)
    reason, _, name = which.rpartition(" ")
    tenant, _, model = name.partition("/")
    return (reason, tenant, model) if what == "shed" else (tenant, model)


def _tenant_metrics(status: NodeStatus) -> Iterator[Metric]:
    def by_tenant(value: Callable[[TenantStatus], float]) -> Series:
        return {(tenant.tenant,): value(tenant) for tenant in status.tenants}

    label = ("tenant",)
    yield _counter("worker_cpu_seconds", "CPU time of workers.", label, by_tenant(lambda one: one.cpu_seconds))
    yield _counter("worker_calls", "Batches run.", label, by_tenant(lambda one: one.calls))
    yield _counter("worker_restarts", "Workers started again.", label, by_tenant(lambda one: one.restarts))
    measured = {(tenant.tenant,): tenant.memory for tenant in status.tenants if tenant.memory is not None}
    own: Series = {labels: float(memory.own_bytes) for labels, memory in measured.items()}
    shared: Series = {labels: float(memory.shared_bytes) for labels, memory in measured.items()}
    yield _gauge("worker_memory_bytes", "Memory of the worker's own.", label, own)
    yield _gauge("worker_memory_shared_bytes", "Memory it has in common with other processes.", label, shared, max)
    refused: Series = {
        (tenant.tenant, limit): count for tenant in status.tenants for limit, count in tenant.refused.items()
    }
    yield _counter("quota_refusals", "Models refused because of a quota.", ("tenant", "quota"), refused)
    yield _gauge("rows_queued", "Rows that wait for a worker.", label, by_tenant(lambda one: one.rows_queued))


def _stage_metrics(tenants: list[TenantStatus]) -> Iterator[Metric]:
    """Of versions that run beside live ones, as this node has seen them in their present stage."""
    stages = {(tenant.tenant, one.model, one.stage): one for tenant in tenants for one in tenant.stages}

    def by_stage(value: Callable[[StageStatus], float | None]) -> Series:
        found = {labels: value(one) for labels, one in stages.items()}
        return {labels: figure for labels, figure in found.items() if figure is not None}

    label = ("tenant", "model", "stage")
    yield _gauge("stage_rows", "Rows a staged version was called with.", label, by_stage(lambda one: one.rows))
    yield _gauge("stage_errors", "Of these, rows it failed on.", label, by_stage(lambda one: one.errors))
    yield _gauge("stage_dropped_rows", "Rows not shown to a shadow.", label, by_stage(lambda one: one.dropped))
    agreement = by_stage(lambda one: one.agreement)
    yield _gauge("stage_agreement", "Share of rows on which it agrees with the live version.", label, agreement)
    drift = by_stage(lambda one: one.drift)
    yield _gauge("stage_drift", "Distance of its outputs' distribution from the live version's.", label, drift, max)
    yield _gauge("stage_p99_ms", "99th percentile of its calls.", label, by_stage(lambda one: one.p99_ms), max)
    ratio = by_stage(lambda one: one.cost_ratio)
    yield _gauge("stage_cost_ratio", "CPU time a row, in the live version's.", label, ratio, max)


def _training_metrics(tenants: list[TenantStatus]) -> Iterator[Metric]:
    """Of models whose training data was checked on this node."""
    checks = {(one.tenant, one.model): one for tenant in tenants for one in tenant.consistency}
    label = ("tenant", "model")
    compared: Series = {labels: one.compared for labels, one in checks.items()}
    different: Series = {labels: one.different for labels, one in checks.items()}
    state: Series = {labels: one.state_different for labels, one in checks.items()}
    yield _gauge("training_rows_compared", "Rows computed anew by the last check.", label, compared)
    yield _gauge("training_rows_different", "Of these, rows that differ from those fed.", label, different)
    yield _gauge("training_state_different", "Rows of state that differ from the changelog's.", label, state)


def _http_metrics(http: HttpStatus) -> Iterator[Metric]:
    answered: dict[tuple[str, ...], float] = {}
    for name, value in http.answered.items():
        route, _, status = name.rpartition(" ")
        answered[route, status] = value
    yield _counter("http_requests", "Requests answered.", ("route", "status"), answered)
    refused: Series = {(reason,): value for reason, value in http.refused.items()}
    yield _counter("http_refused", "Requests and connections over a bound.", ("reason",), refused)
    yield _counter("http_seconds", "Time spent answering.", (), {(): http.seconds})
    yield _gauge("http_requests_in_progress", "Requests in progress.", (), {(): http.in_progress})
    yield _gauge("http_connections", "Open connections.", (), {(): http.connections})


def _flat(found: object, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested objects, each by the names on the way to it, joined by dots."""
    if isinstance(found, dict):
        for name, inner in found.items():
            yield from _flat(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(found, int | float):
        yield path, float(found)


def _counter(name: str, text: str, labels: tuple[str, ...], series: Series) -> Metric:
    family = CounterMetricFamily(f"headrace_{name}", text, labels=labels)
    for values, value in bounded(series).items():
        family.add_metric(values, value)
    return family


def _gauge(
    name: str, text: str, labels: tuple[str, ...], series: Series, combine: Callable[[Iterable[float]], float] = sum
) -> Metric:
    family = GaugeMetricFamily(f"headrace_{name}", text, labels=labels)
    for values, value in bounded(series, combine).items():
        family.add_metric(values, value)
    return family


def bounded(series: Series, combine: Callable[[Iterable[float]], float] = sum) -> Series:
    """At most METRIC_SERIES_MAX series, first by label values; the last combines all that are beyond.

    By name, not by value: a series must not change from scrape to scrape.
    """
    if len(series) <= METRIC_SERIES_MAX:
        return series
    names = sorted(series)
    kept = {name: series[name] for name in names[: METRIC_SERIES_MAX - 1]}
    beyond = combine([series[name] for name in names[METRIC_SERIES_MAX - 1 :]])
    return kept | {(OTHER,) * len(names[0]): beyond}
