"""Kafka Streams instances as subprocesses: the peer that failover and restore compare with.

The Java program in `streams/` does the standard workload's job: one RocksDB store of rows as large as Headrace's, one
record for each model that an event triggers, exactly once. It is compiled for each run (a second).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import harness

SOURCES = Path(__file__).resolve().parent / "streams"
JARS_S_MAX = 400.0
COMPILE_S_MAX = 120.0
POLL_S = 0.05
STORE = "customers"
LOG_SETTINGS = """\
Configuration:
  status: error
  Appenders:
    Console:
      name: err
      target: SYSTEM_ERR
      PatternLayout:
        pattern: "%d %p %c: %m%n"
  Loggers:
    Root:
      level: warn
      AppenderRef:
        ref: err
"""


@dataclass(frozen=True, slots=True)
class Program:
    """The compiled peer: what `java` needs to run it."""

    class_path: str
    log_settings: Path


def compiled(folder: Path) -> Program:
    """Fetch the jars if need be and compile the sources into `folder`."""
    command = [sys.executable, str(harness.KAFKA), "jars"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=JARS_S_MAX)
    if done.returncode:
        raise RuntimeError("the jars of Kafka Streams could not be fetched; scripts/kafka says why above")
    jars = done.stdout.strip().rpartition("\n")[2]
    classes = folder / "classes"
    classes.mkdir(parents=True)
    sources = [str(path) for path in sorted(SOURCES.glob("*.java"))]
    subprocess.run(
        ["javac", "-cp", f"{jars}/*", "-d", str(classes), *sources],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        check=True,
        timeout=COMPILE_S_MAX,
    )
    log_settings = folder / "log4j2.yaml"
    log_settings.write_text(LOG_SETTINGS)
    return Program(f"{classes}:{jars}/*", log_settings)


@dataclass(frozen=True, slots=True)
class Report:
    """What an instance last said of itself."""

    state: str = ""
    active: frozenset[int] = frozenset()
    standby: frozenset[int] = frozenset()
    lag: int = -1
    """Changelog records that its stores lack; -1: not known."""
    restored: int = 0
    running_s: float = -1.0
    """From its start to its first RUNNING; -1 before."""


def parsed(lines: Iterable[str]) -> Report:
    """The last whole report among an instance's output lines."""
    for line in reversed(list(lines)):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        return Report(
            found["state"],
            frozenset(found["active"]),
            frozenset(found["standby"]),
            found["lag"],
            found["restored"],
            found["running_s"],
        )
    return Report()


class Instance:
    """One JVM; its settings, state, reports and log are in `folder`."""

    def __init__(self, program: Program, folder: Path, settings: Mapping[str, object], heap: str = "512m") -> None:
        self.folder = folder
        self.name = folder.name
        self._program = program
        self._heap = heap
        self._process: subprocess.Popen[bytes] | None = None
        self._said = 0
        folder.mkdir(parents=True)
        own: dict[str, object] = {
            **settings,
            "state.dir": folder / "state",
            "client.id": self.name,
            "peer.instance": self.name,
        }
        (folder / "settings.properties").write_text("".join(f"{name}={value}\n" for name, value in own.items()))

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"instance {self.name} was not started")
        return self._process.pid

    def start(self) -> None:
        self._said = self._output.stat().st_size if self._output.exists() else 0
        command = ["java", f"-Xmx{self._heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=4"]
        command += [f"-Dlog4j2.configurationFile={self._program.log_settings}", "-cp", self._program.class_path]
        with self._output.open("ab") as output, (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "Peer", str(self.folder / "settings.properties")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )

    @property
    def _output(self) -> Path:
        return self.folder / "reports"

    def report(self) -> Report:
        """The last since it was started; an empty one while there is none."""
        with self._output.open("rb") as output:
            end = output.seek(0, os.SEEK_END)
            output.seek(max(self._said, end - 4096))
            return parsed(output.read().decode().splitlines())

    def check(self) -> None:
        """Raises RuntimeError when it ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"Kafka Streams instance {self.name} ended by itself; its log:\n{self.log_tail()}")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(harness.STOP_S_MAX)
            self._process = None

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-lines:])


def wait_for_all(
    instances: Iterable[Instance], partitions: int, standbys: int, lag_max: int, wait_s_max: float
) -> None:
    """Until each partition is active once, stood by for often enough, and all stores lack at most `lag_max`."""
    instances = list(instances)
    deadline = time.monotonic() + wait_s_max
    while not settled([instance.report() for instance in instances], partitions, standbys, lag_max):
        for instance in instances:
            instance.check()
        if time.monotonic() > deadline:
            said = "\n".join(f"{instance.name}: {instance.report()}" for instance in instances)
            raise RuntimeError(f"Kafka Streams did not settle within {wait_s_max} s:\n{said}")
        time.sleep(POLL_S)


def settled(reports: Iterable[Report], partitions: int, standbys: int, lag_max: int) -> bool:
    """Whether every instance runs and every partition is active once and stood by for `standbys` times or more.

    More, as a warm-up replica looks like a standby here and lasts until the next probing rebalance (10 minutes).
    """
    reports = list(reports)
    active = sorted(number for report in reports for number in report.active)
    standing_by = Counter(number for report in reports for number in report.standby)
    return (
        all(report.state == "RUNNING" and 0 <= report.lag <= lag_max for report in reports)
        and active == list(range(partitions))
        and all(standing_by[number] >= standbys for number in range(partitions))
    )
