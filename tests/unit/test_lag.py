"""How far behind models are, added up over partitions."""

from __future__ import annotations

from node.lag import Lags
from node.serving.view import Waiting


def figures(rows: int, waiting_ms: int) -> dict[str, int]:
    return {"rows": rows, "bytes": 10 * rows, "waiting_ms": waiting_ms}


def test_rows_add_up_and_the_oldest_counts() -> None:
    first = {"ads/bid": figures(5, 3000), "ads/rank": figures(1, 9000), "risk/score": figures(2, 100)}
    counters = {"events": 7, "shed overload ads/bid": 4, "shed superseded ads/bid": 1, "inferences ads/bid": 3}
    lags = Lags(
        [(first, counters), ({"ads/bid": figures(2, 1000)}, {"shed overload ads/bid": 6, "shed age ads/rank": 2})]
    )
    assert lags.model("ads/bid") == Waiting(rows=7, seconds=3.0, bytes=70, shed={"overload": 10, "superseded": 1})
    assert lags.model("ads/rank") == Waiting(rows=1, seconds=9.0, bytes=10, shed={"age": 2})
    assert lags.tenant("ads") == Waiting(
        rows=8, seconds=9.0, bytes=80, shed={"overload": 10, "superseded": 1, "age": 2}
    )
    assert lags.tenant("new") == lags.model("new/one") == Waiting()
