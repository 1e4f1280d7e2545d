"""Rows kept as training data: nothing of them is lost or changed on the way into records and files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.backlog import Answer
from node.config import parse_config
from node.kernel.errors import ExportFailed, StateCorrupt
from node.kernel.limits import RECORD_BYTES_MAX
from node.kernel.types import EventNames, FeatureRows, ModelName, ModelOutputs, ModelVersion, Triggers
from node.training.fed_rows import Described, FedRows, decode, encode_rows
from node.training.files import TrainingFiles
from node.training.row_log import RowLog
from node.training.times import time_ms
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

CONFIG = parse_config('[events]\ntypes = ["buy", "see"]\n[events.fields]\namount = "number"\n', Path.cwd())
NAME = ModelName("ads", "bid")
STRANGE = np.array([np.nan, -np.nan, 0.0, -0.0, np.inf, 5e-324, 1 / 3, 1e308]).view(np.uint64)
BITS = st.one_of(st.sampled_from([int(one) for one in STRANGE]), st.integers(0, 2**64 - 1))
"""Of any float64: among them NaNs that carry something, and both zeros."""


def manifest(log_rows: float):
    text = f'on = ["buy"]\nlog_rows = {log_rows}\n[features]\na = "event.amount"\nb = "count(buy, \'1d\')"\n'
    return parse_manifest("bid.toml", "ads", "bid", text.encode(), CONFIG.schema())


def answer(count: int, log_rows: float = 1.0, bits=None, texts=None, errors=None, features: int = 2) -> Answer:
    version = manifest(log_rows).version("0" * 64) if features == 2 else ModelVersion(
        NAME, "f" * 64, "", (), tuple(f"f{n}" for n in range(features)), ("score",), "predict", 0, 0, log_rows=log_rows
    )  # fmt: skip
    places = np.arange(count)
    if bits is None:
        bits = np.arange(count * (features + 1)).reshape(count, features + 1).astype(np.float64).view(np.uint64)
    numbers = np.array(bits, np.uint64).view(np.float64).reshape(count, features + 1)
    triggers = Triggers(
        NAME, version.version, tuple(f"c{place}" for place in places), places % 2, places * 3, places % 2,
        places * 1000, FeatureRows(version.features, np.ascontiguousarray(numbers[:, :features]), texts or {}),
        inputs=("models.x.y.z",), fresh=places % 2, tables={"products": "0123456789ab"},
        event_names=EventNames.of(["t0", "t1"], ["buy", "see"]),
    )  # fmt: skip
    return Answer(version, triggers, ModelOutputs(np.ascontiguousarray(numbers[:, features:]), errors or {}))


def logged(answers, log=None, counters=None):
    log = log or RowLog()
    return [decode(value) for _, value in log.records(answers, plan(), counters or Counter(commits=7))]


def plan(log_rows: float = 1.0):
    found = manifest(log_rows)
    return compile_plan([(found.version("0" * 64), found)], CONFIG.schema())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(BITS, BITS, BITS), min_size=1, max_size=20), st.data())
def test_all_bits_come_back_from_records_and_files(tmp_path_factory, values, data) -> None:
    words = [data.draw(st.one_of(st.none(), st.text(max_size=5))) for _ in values]
    errors = {row: "why" for row in range(len(values)) if data.draw(st.booleans())}
    given_rows = answer(len(values), bits=values, texts={"b": words}, errors=errors)
    described, rows = logged([given_rows])
    assert described == Described(NAME, given_rows.version.version, plan().source(given_rows.version.version))
    assert rows.commit == 7
    assert rows.triggers.customers == given_rows.triggers.customers
    assert rows.triggers.rows.numbers.tobytes() == given_rows.triggers.rows.numbers.tobytes()
    assert rows.outputs.values.tobytes() == given_rows.outputs.values.tobytes()
    assert rows.outputs.errors == errors
    assert rows.triggers.rows.texts == {"b": words}

    folder = tmp_path_factory.mktemp("export") / "out"
    with TrainingFiles(folder) as files:
        files.add(rows, 3)
        assert files.finish() == {f"{given_rows.version.short_version}.parquet": len(values)}
    (path,) = folder.iterdir()
    table = pq.read_table(path)
    fed = table.column("features.a").combine_chunks().to_numpy(zero_copy_only=False)
    assert fed.tobytes() == given_rows.triggers.rows.numbers[:, 0].tobytes()
    assert table.column("features.b").to_pylist() == words
    gave = table.column("outputs.score").combine_chunks().to_numpy(zero_copy_only=False)
    assert gave.tobytes() == given_rows.outputs.values.tobytes()
    assert table.column("key.inference").to_pylist() == [
        f"ads/bid/t{place % 2}/3/{place * 3}" for place in range(len(values))
    ]
    assert table.column("inputs.models.x.y.z").to_pylist() == [bool(place % 2) for place in range(len(values))]
    assert table.column("error").to_pylist() == [errors.get(row) for row in range(len(values))]
    assert set(table.column("tables.products").to_pylist()) == {"0123456789ab"}


def test_a_share_keeps_the_same_customers_and_nothing_is_written_when_off() -> None:
    counters = Counter(commits=1)
    assert logged([answer(1000, log_rows=0.0)], counters=counters) == []
    assert counters == {"commits": 1}
    fewer, more = (
        {one for rows in logged([answer(1000, log_rows=share)]) for one in rows.triggers.customers}
        for share in (0.1, 0.4)
    )
    assert fewer < more
    assert 60 < len(fewer) < 140
    assert 350 < len(more) < 450


def test_what_is_too_large_for_a_record_is_split_and_a_row_that_is_alone_so_is_counted() -> None:
    counters = Counter(commits=1)
    rows = logged([answer(4096, features=512)], counters=counters)
    assert sum(map(len, rows)) == counters["logged ads/bid"] == 4096
    assert np.concatenate([one.triggers.offsets for one in rows]).tolist() == [3 * place for place in range(4096)]
    assert all(len(encode_rows(one)) <= RECORD_BYTES_MAX for one in rows)
    huge = {f"f{number}": ["x" * 4000, "y"] for number in range(300)}
    rows = logged([answer(2, features=512, texts=huge)], counters=counters)
    assert [one.triggers.customers for one in rows] == [("c1",)]
    assert counters["unlogged ads/bid"] == 1


def test_what_a_version_means_is_said_again_when_it_may_have_changed() -> None:
    log, counters = RowLog(), Counter(commits=1)
    same = plan()
    kinds = []
    for commit, used in ((1, same), (2, same), (3, plan()), (4, same), (5 + 1024, same)):
        counters["commits"] = commit
        found = [decode(value) for _, value in log.records([answer(1)], used, counters)]
        kinds.append([type(one) for one in found])
    said = [Described, FedRows]
    assert kinds == [said, [FedRows], said, said, said]


def test_damaged_records_and_folders_that_are_there_are_refused(tmp_path: Path) -> None:
    _, rows = logged([answer(3)])
    with pytest.raises(StateCorrupt, match="can't be read"):
        decode(encode_rows(rows)[:-3])
    with pytest.raises(ExportFailed, match="is there already"), TrainingFiles(tmp_path):
        pass
    folder = tmp_path / "out"
    with TrainingFiles(folder) as files:
        files.add(rows, 0)  # and it is not finished
    assert list(tmp_path.iterdir()) == []
    with TrainingFiles(folder) as files:
        assert files.finish() == {}
    assert list(tmp_path.iterdir()) == [], "or the same command would be refused once there are rows"


@pytest.mark.parametrize("place", [".", "..", "/", "none/.."])
def test_a_folder_without_a_name_of_its_own_is_there_already(place: str) -> None:
    with pytest.raises(ExportFailed, match="is there already"), TrainingFiles(Path(place)):
        pass


def test_times_are_said_in_three_ways() -> None:
    assert [time_ms(text, 9) for text in ("", "17", "1970-01-02", "1970-01-01T01:00+01:00")] == [9, 17, 86_400_000, 0]
    with pytest.raises(ExportFailed, match="is no time"):
        time_ms("yesterday", 0)
