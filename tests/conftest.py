"""What tests share: one real Kafka for the whole run, brokers of one test's own, topics with unique names."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

KAFKA = Path(__file__).resolve().parent.parent / "scripts" / "kafka"
ADDRESS_VARIABLE = "HEADRACE_TEST_KAFKA"
"""HOST:PORT of a broker to use instead of one of our own."""
RUN_FOLDER_VARIABLE = "HEADRACE_TEST_RUN_FOLDER"
"""Set by the process that controls the run, so that the workers of pytest-xdist share one folder and broker."""
KAFKA_JAVA = "-XX:TieredStopAtLevel=1"
"""A broker of tests lives for minutes: Java's optimising compiler would cost them more time than its code saves. The
environment may say otherwise."""
FIRST_START_S_MAX = 400
"""The first start of all fetches the broker, and perhaps Java and Maven."""
START_S_MAX = 90
STOP_S_MAX = 60
ADMIN_S_MAX = 20


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[RUN_FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="headrace-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The workers are gone by now: end their broker, by its folder, and remove what it left."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(os.environ.pop(RUN_FOLDER_VARIABLE))
    if (folder / "kafka").exists():
        call_kafka("stop", "--dir", str(folder / "kafka"), wait_s_max=STOP_S_MAX)
    shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"kafka", "own_kafka"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kafka)


def run_kafka(*arguments: str, wait_s_max: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(KAFKA), *arguments],
        env={"HEADRACE_KAFKA_JAVA": KAFKA_JAVA, **os.environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=wait_s_max,
    )


def call_kafka(*arguments: str, wait_s_max: float) -> str:
    """The last line that scripts/kafka printed. A broker that could be had and does not work is a failure."""
    done = run_kafka(*arguments, wait_s_max=wait_s_max)
    if done.returncode:
        raise AssertionError(f"scripts/kafka {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip().rpartition("\n")[2]


def need_kafka() -> None:
    """Skip the test, or in CI fail it, where the broker's programs can't be had; for no other reason."""
    done = run_kafka("prepare", wait_s_max=FIRST_START_S_MAX)
    if done.returncode:
        reason = f"NO KAFKA, SO THIS IS NOT TESTED: {done.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kafka() -> str:
    """HOST:PORT of a real Apache Kafka that all tests of the run share; it lives until the run ends."""
    given = os.environ.get(ADDRESS_VARIABLE)
    if given:
        return given
    need_kafka()
    folder = Path(os.environ[RUN_FOLDER_VARIABLE])
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        address = folder / "address"
        if not address.exists():
            started = call_kafka("start", "--dir", str(folder / "kafka"), wait_s_max=START_S_MAX)
            address.write_text(started)
        return address.read_text()


class OwnBroker:
    """A broker that one test may kill, pause and start again at the same address, with the same data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = call_kafka("start", "--dir", str(folder), wait_s_max=START_S_MAX)

    @property
    def pid(self) -> int:
        return int((self._folder / "pid").read_text())

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        call_kafka("start", "--dir", str(self._folder), "--port", port, wait_s_max=START_S_MAX)

    def stop(self) -> None:
        call_kafka("stop", "--dir", str(self._folder), wait_s_max=STOP_S_MAX)

    def kill(self) -> None:
        """SIGKILL, and wait until the process and so its port are gone."""
        ended = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            readable, _, _ = select.select([ended], [], [], STOP_S_MAX)
        finally:
            os.close(ended)
        assert readable, f"the broker on {self._folder} outlived SIGKILL"

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def own_kafka() -> Iterator[OwnBroker]:
    """A broker of this test's own, already started. Costs about two seconds: share `kafka` where that will do."""
    need_kafka()
    with tempfile.TemporaryDirectory(prefix="headrace-broker-") as folder:
        broker = OwnBroker(Path(folder))
        try:
            yield broker
        finally:
            if (Path(folder) / "pid").exists():
                with contextlib.suppress(ProcessLookupError):
                    broker.resume()
                broker.stop()


@pytest.fixture
def topic_names() -> Callable[[str], str]:
    """Gives `<stem>-<random>`: names that no other test on the same broker has."""
    return unique_name


def unique_name(stem: str) -> str:
    return f"{stem}-{secrets.token_hex(6)}"


class Topics:
    """Makes topics with unique names on one broker."""

    def __init__(self, admin: AIOKafkaAdminClient) -> None:
        self._admin = admin

    async def create(self, stem: str, partitions: int = 1, settings: Mapping[str, str] | None = None) -> str:
        """The name of the new topic, once its creation was acknowledged."""
        name = unique_name(stem)
        topic = NewTopic(name, partitions, 1, topic_configs=dict(settings or {}))
        async with asyncio.timeout(ADMIN_S_MAX):
            answer = await self._admin.create_topics([topic])
        for _, code, message in answer.topic_errors:
            assert code == 0, message
        return name

    async def delete(self, *names: str) -> None:
        async with asyncio.timeout(ADMIN_S_MAX):
            await self._admin.delete_topics(list(names))


@pytest.fixture
async def topics(kafka: str) -> AsyncIterator[Topics]:
    """`await topics.create("events", 4, {"cleanup.policy": "compact"})` on the shared broker."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka, request_timeout_ms=ADMIN_S_MAX * 1000)
    async with asyncio.timeout(ADMIN_S_MAX):
        await admin.start()
    try:
        yield Topics(admin)
    finally:
        async with asyncio.timeout(ADMIN_S_MAX):
            await admin.close()


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a file system of so many MiB at a folder, until the test is over: a disk can be full without the machine's
    being so. Only root may, or who is root in a container that lets it; skips the test for others."""
    mounted: list[Path] = []

    def mount(place: Path, size_mb: int) -> None:
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, timeout=30).returncode:
            pytest.skip("NO FULL DISK, SO THIS IS NOT TESTED: this user may not mount a file system")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)
