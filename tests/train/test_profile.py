"""The summary of a recorded step: what overlaps counts once, copies are no kernels, and the table says the same."""

from __future__ import annotations

import pytest

from lowvram_tuner.train.profile import SHOWN, Kernel, covered, summary, table


def test_time_that_two_kernels_share_counts_once():
    assert covered([]) == 0
    assert covered([(5, 9), (0, 2), (1, 4), (8, 8)]) == 8  # 0 to 4 and 5 to 9
    assert covered([(0, 10), (2, 3), (9, 12)]) == 12


def test_the_summary_of_a_step():
    recorded = [
        Kernel("mm", 0, 3000), Kernel("norm", 3000, 500), Kernel("mm", 3200, 1000), Kernel("Memcpy HtoD", 0, 9000), Kernel("Memset", 9500, 100),
    ]  # fmt: skip
    found = summary(recorded, step_ms=5.0)
    assert found["kernels"] == 3 and found["gpu_ms"] == pytest.approx(4.5) and found["busy_ms"] == pytest.approx(4.2)
    assert found["busy_share"] == pytest.approx(0.84) and found["copy_ms"] == pytest.approx(9.1)
    assert [(k["name"], k["calls"]) for k in found["top"]] == [("mm", 2), ("norm", 1)]
    assert sum(k["share"] for k in found["top"]) == pytest.approx(1)
    lines = table(found).splitlines()
    assert "84% of a step" in lines[0] and "3 kernels" in lines[0] and lines[2].split() == ["4.00", "88.9%", "2", "mm"]


def test_a_step_without_kernels_and_one_with_many():
    empty = summary([], step_ms=3.0)
    assert empty["kernels"] == 0 and empty["busy_share"] == 0 and empty["top"] == [] and table(empty)
    many = summary([Kernel(f"k{n}", n, 1 + n) for n in range(100)], step_ms=0.01)
    assert len(many["top"]) == SHOWN and many["top"][0]["name"] == "k99" and many["busy_share"] == 1.0


@pytest.mark.gpu
def test_a_recording_sees_the_kernels_of_a_graph():
    import torch

    from lowvram_tuner.train.profile import record

    x = torch.randn(256, 256, device="cuda")
    (x @ x).add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (x @ x).add_(1)
    for run in (lambda: (x @ x).add_(1), graph.replay):
        found = summary(record(run), step_ms=1.0)
        assert found["kernels"] >= 2 and 0 < found["busy_ms"] <= found["gpu_ms"] * 1.001
