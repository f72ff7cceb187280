"""The loss plot: bounded, smooth, still while it grows."""

from __future__ import annotations

import math
import re

import pytest

from lowvram_tuner.ui.plot import LIMIT, Curve, Series, plot_html, smoothed


def curve(count: int, start: int = 1) -> Curve:
    c = Curve()
    for step in range(start, start + count):
        c.add(step, 3 * math.exp(-step / 300) + 0.5)
    return c


@pytest.mark.parametrize("count", [1, 2, LIMIT - 1, LIMIT, LIMIT + 1, 10_000, 50_001])
def test_a_curve_stays_small_and_keeps_its_ends(count):
    points = curve(count).all()
    assert 1 <= len(points) <= LIMIT
    assert points[-1][0] == count
    assert [p[0] for p in points] == sorted({p[0] for p in points})


def test_thinning_keeps_the_mean():
    c = Curve()
    for step in range(1, 4097):
        c.add(step, float(step % 7))
    weights = c.stride
    total = sum(v for _, v in c.points) * weights
    assert total / (len(c.points) * weights) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_is_left_out(value):
    c = Curve()
    c.add(1, 2.0)
    c.add(2, value)
    assert c.all() == [(1, 2.0)]


def test_a_resume_replaces_the_steps_it_repeats():
    c = curve(100)
    c.add(51, 9.0)
    assert [s for s, _ in c.all()] == [*range(1, 51), 51]
    assert c.all()[-1] == (51, 9.0)


def test_smoothing_keeps_the_ends_does_not_lag_and_quiets_noise():
    falling = [(float(s), 10.0 - 9.0 * s / 1000) for s in range(1, 1001)]
    assert [v for _, v in smoothed(falling)] == pytest.approx([v for _, v in falling], abs=1e-9)
    noisy = [(float(s), 2.0 + (-1) ** s) for s in range(1, 201)]
    line = smoothed(noisy)
    assert line[0] == noisy[0] and line[-1] == noisy[-1]
    assert max(abs(v - 2.0) for _, v in line[20:-20]) < 0.1
    assert smoothed([]) == []


def test_the_x_axis_spans_the_whole_run_from_its_first_step():
    early = plot_html([Series("loss", "train", curve(5).all())], last_step=600)
    xs = [float(x) for x, _ in re.findall(r"([\d.]+),([\d.]+)", re.search(r'points="([^"]+)"', early).group(1))]
    assert max(xs) == pytest.approx(1000 * 5 / 600, abs=0.1)
    assert "<span>600</span>" in early


def test_the_y_axis_does_not_move_for_a_little_noise():
    base = [(float(s), 2.0 + 0.01 * (s % 3)) for s in range(1, 50)]
    axis = [re.findall(r'bottom:[\d.]+%">([\d.]+)', plot_html([Series("loss", "train", [*base, (50.0, 2.0 + d)])])) for d in (0.0, 0.01, 0.02)]
    assert axis[0] == axis[1] == axis[2]


@pytest.mark.parametrize(("loss", "said"), [(2.0, "2.00"), (4.8, "4.80"), (0.338, "0.338"), (99.97, "100"), (3.9e5, "390,000")])
def test_the_loss_in_the_legend_keeps_its_width(loss, said):
    assert f"<b>{said}</b>" in plot_html([Series("loss", "train", [(1.0, loss)])])


def test_ten_thousand_steps_are_a_small_drawing():
    assert len(plot_html([Series("loss", "train", curve(10_000).all(), smooth=True)], 10_000)) < 30_000


def test_no_points_is_a_sentence():
    assert "once training starts" in plot_html([])
    assert "polyline" in plot_html([Series("loss", "train", [(1.0, 2.0)])])


def test_labels_are_inert():
    html = plot_html([Series("<script>alert(1)</script>", "train", [(1.0, 2.0)])])
    assert "<script" not in html
