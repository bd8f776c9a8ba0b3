"""A profile told: what its kernels did at one time."""

import json

from infra.cluster.report.profile import profile_chapter


def test_what_was_hidden_is_told(tmp_path):
    def kernel(name: str, start: float, micros: float) -> dict:
        args = {"stream": 7, "device": 0}
        return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "ts": start, "dur": micros, "args": args}

    events = [kernel("my_gemm", 0, 1000), kernel("ncclSend", 500, 1000), kernel("flash_fwd", 2000, 500)]
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"traceEvents": events}))
    rows = {row.name: row.ours for row in profile_chapter(path).rows}
    assert rows["from the first kernel to the last"] == 2.5
    assert rows["computing"] == 1.5
    assert rows["communicating"] == 1.0
    assert rows["communication hidden behind computation"] == 50.0
    assert rows["neither"] == 0.5
