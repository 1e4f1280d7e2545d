"""What the tests of workers share: model files, versions and a warm server."""

from __future__ import annotations

import asyncio
import io
import select
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import joblib
import numpy as np

from node.kernel.clock import SystemClock
from node.kernel.limits import MIB
from node.kernel.types import FeatureRows, ModelName, ModelOutputs, ModelVersion
from tenants.sandbox import SandboxSettings
from tenants.workers import WarmServer, WorkerProcess

MEMORY_BYTES = 512 * MIB
COMPRESSIONS: tuple[Any, ...] = (0, ("zlib", 3), ("gzip", 3), ("bz2", 3), ("xz", 1), ("lzma", 1), ("lz4", 1))


def stored(model: Any, compress: Any = 0, protocol: int | None = None) -> bytes:
    file = io.BytesIO()
    joblib.dump(model, file, compress=compress, protocol=protocol)
    return file.getvalue()


def version_of(
    features: tuple[str, ...], outputs: tuple[str, ...] = ("score",), method: str = "predict_proba", number: int = 0
) -> ModelVersion:
    return ModelVersion(
        name=ModelName("grocery", "coupons"),
        version=f"{number:064x}",
        blob="b" * 64,
        events=("transaction",),
        features=features,
        outputs=outputs,
        method=method,
        ttl_ms=0,
        deadline_ms=5000,
    )


def rows_of(names: tuple[str, ...], numbers: Any, texts: dict[str, list[str | None]] | None = None) -> FeatureRows:
    return FeatureRows(names, np.ascontiguousarray(numbers, dtype=np.float64), texts or {})


@asynccontextmanager
async def warm_server(settings: SandboxSettings | None = None) -> AsyncIterator[WarmServer]:
    server = WarmServer(settings or SandboxSettings(), SystemClock())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def called_while_the_loop_stands_still(worker: WorkerProcess, version: str, rows: FeatureRows) -> ModelOutputs:
    """The outputs of a call whose answer came in time, to a loop that looks for it after the deadline."""
    deadline_seconds = 0.05
    call = asyncio.ensure_future(worker.call(version, rows, deadline_seconds))
    await asyncio.sleep(0)  # the request is written
    over = time.monotonic() + deadline_seconds
    assert select.select([worker._transport.get_extra_info("socket")], [], [], 20)[0], "it has answered"
    while time.monotonic() <= over:
        pass
    return await call
