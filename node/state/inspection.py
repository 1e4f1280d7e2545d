"""Looking into a copy of a store in a process of its own: going through millions of rows holds the interpreter.

The copy is not touched: what is opened are links to its tables, in a hidden folder beside it. Going through them is
as fast as one core reads them, at the lowest priority.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from node.kernel.child import in_child
from node.kernel.digest import BucketEntry, StoreDigest, bucket_entries, digest_store
from node.kernel.errors import HeadraceError, StateCorrupt, StoreUnavailable
from node.kernel.limits import MIB, SNAPSHOT_INSPECT_MS_MAX
from node.state.rocksdb import RocksEnvironment, RocksStore

_LOWEST_PRIORITY = 19
_CORRUPT_STATUS = 3
_FAILED_STATUS = 4
_CACHE_BYTES = 8 * MIB


async def changelog_offset_of(folder: Path) -> int:
    """Open a copy of a store, which checks that its files are whole and belong together.

    This and the others raise StateCorrupt for a damaged copy, StoreUnavailable when it can't be looked at.
    """
    return msgspec.json.decode(await _inspect("offset", folder), type=int)


async def digest_of(folder: Path) -> StoreDigest:
    return msgspec.json.decode(await _inspect("digest", folder), type=StoreDigest)


async def bucket_of(folder: Path, bucket: int) -> list[BucketEntry]:
    return msgspec.json.decode(await _inspect("bucket", folder, str(bucket)), type=list[BucketEntry])


async def _inspect(subject: str, folder: Path, *arguments: str) -> bytes:
    what = f"the copy of a store in {folder}"
    links = folder.with_name(f".look-{folder.name.lstrip('.')}-{secrets.token_hex(8)}")
    try:
        async with asyncio.timeout(SNAPSHOT_INSPECT_MS_MAX / 1000):
            code, output, errors = await in_child(
                ("-m", "node.state.inspection", subject, str(folder), str(links), *arguments), _said, subprocess.PIPE
            )
    except TimeoutError:
        raise StoreUnavailable(f"{what} took longer than SNAPSHOT_INSPECT_MS_MAX; it is tried again") from None
    finally:  # here, as who looks may have been killed
        await asyncio.to_thread(shutil.rmtree, links, ignore_errors=True)
    if code == 0:
        return output
    reason = errors.decode(errors="replace").strip()[-1000:]
    if code == _CORRUPT_STATUS:
        raise StateCorrupt(f"{what} is damaged: {reason}; it is not used")
    raise StoreUnavailable(f"{what} could not be looked at: {reason or code}; it is tried again")


def _said(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    output, errors = process.communicate()
    return process.returncode, output, errors


def main(arguments: Sequence[str]) -> int:
    what, folder, links = arguments[0], Path(arguments[1]), Path(arguments[2])
    os.nice(_LOWEST_PRIORITY)
    try:
        with contextlib.closing(_opened(folder, links)) as store:
            found: object = store.changelog_offset()
            if what == "digest":
                found = digest_store(store)
            elif what == "bucket":
                found = bucket_entries(store, int(arguments[3]))
        sys.stdout.buffer.write(msgspec.json.encode(found))
    except (HeadraceError, OSError) as failure:
        sys.stderr.write(str(failure))
        return _CORRUPT_STATUS if isinstance(failure, StateCorrupt) else _FAILED_STATUS
    return 0


def _opened(folder: Path, links: Path) -> RocksStore:
    links.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".sst":
            os.link(path, links / path.name)
        else:
            shutil.copyfile(path, links / path.name)
    return RocksStore(links, RocksEnvironment.of(_CACHE_BYTES, _CACHE_BYTES, compacting=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
