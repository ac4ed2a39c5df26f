"""The benchmark's points of attention: the grid, floors, bars and plots."""

import itertools

import pytest
from test_bench import MACHINE, add, document

from fastseq.bench import bars, grid, page, report, results, roofline
from fastseq.bench.grid import AttentionPoint


def test_the_grid_is_the_product_it_should_be():
    points = grid.full()
    wanted = itertools.product((1, 12, 96), (1, 64, 512, 2048), (32, 64, 128), ("full", "causal", "mask", "bias"))
    for (heads, L, D, form), dtype, mode in itertools.product(wanted, grid.DTYPES, grid.MODES):
        fits = [p for p in points if isinstance(p, AttentionPoint) and p.B * p.N == heads and p.L == p.S == L]
        assert any((p.D, p.form, p.dtype, p.mode) == (D, form, dtype, mode) for p in fits)
    for dtype, form, size, *_ in bars.ATTENTION_BARS:
        assert {AttentionPoint(form, mode, dtype, *size) for mode in grid.MODES} <= set(points)


def test_points_are_written_down_and_chosen():
    for point in (AttentionPoint("full", "inference", "float32", 1, 2, 3, 4, 5, rotating=True), grid.full()[0]):
        assert grid.point_of(point.as_dict()) == point
    chosen = grid.choose(grid.full(), cells=["attention"], forms=["causal"], sizes=["L>=512", "D=64"])
    assert chosen and all(isinstance(p, AttentionPoint) and p.form == "causal" and p.L >= 512 for p in chosen)
    assert not any(isinstance(p, AttentionPoint) for p in grid.choose(grid.full(), sizes=["T>=1"]))


@pytest.mark.parametrize(("form", "L", "S"), [(f, L, S) for f in grid.ATTENTION_FORMS for L, S in ((300, 300), (5, 9))])
def test_pairs_are_those_that_are_seen(form, L, S):
    seen = sum(
        (form not in ("causal", "window") or j <= i) and (form != "window" or i - j <= grid.WINDOW)
        for i in range(L)
        for j in range(S)
    )
    assert AttentionPoint(form, "inference", "float32", 2, 3, L, S, 8).pairs == seen


def test_floor_of_one_point_by_hand():
    # 2 heads, 10 queries of 100 keys of 64: 128,000 operations a product and head at 1e11 a second; 51,200 bytes a
    # head and product, from L2 at 2e11.
    point = AttentionPoint("full", "inference", "float32", 1, 2, 10, 100, 64)
    assert roofline.floor(point, MACHINE) == pytest.approx(2 * max(2 * 128_000 / 1e11, 2 * 25_600 / 2e11))
    training = AttentionPoint("full", "training", "float32", 1, 2, 10, 100, 64)
    assert roofline.floor(training, MACHINE) == pytest.approx(7 / 2 * roofline.floor(point, MACHINE))
    cold = AttentionPoint("full", "inference", "float32", 1, 2, 1, 100, 64, rotating=True)
    assert roofline.floor(cold, MACHINE) == pytest.approx(2 * 2 * 25_600 / MACHINE["bandwidth"]["memory"])


def test_bars_of_attention():
    doc = document()
    causal = AttentionPoint("causal", "inference", "float32", 1, 12, 512, 512, 64)
    add(doc, causal, 0.010, torch_nn=0.025, jax=0.009)
    for L in (512, 1024, 2048):
        add(
            doc, AttentionPoint("full", "inference", "float32", 1, 4, L, L, 64), L * L * 1e-9 * (1.5 if L > 1500 else 1)
        )
    found = {outcome.bar.what: outcome for outcome in bars.outcomes(doc)}
    named = found["attention, causal (1, 12, 512, 512, 64), float32 inference, against torch"]
    assert named.met and named.reached == pytest.approx(2.5)
    assert found["attention, float32, all points, against jax, ONNX Runtime and OpenVINO"].met is False
    assert found["attention's time against its pairs, distance from a line"].met is False
    # A recurrent bar does not see these rows.
    assert found["inference, T ≥ 16, against the best library"].reached is None


def test_the_report_has_rows_and_plots_of_attention():
    pytest.importorskip("matplotlib", reason="the page's plots need the demo extra")
    doc = document()
    doc["machine"] = MACHINE
    for L in (512, 1024, 2048):
        add(doc, AttentionPoint("window", "training", "float32", 1, 4, L, L, 64), L * 1e-6, torch_nn=L * L * 1e-8)
    assert "attention training float32 B1 N4 L512 S512 D64 window" in report.rows_table(doc).lines[0]
    text = page.render(doc)
    assert "Time against L" in text and "attention, window, training, B=1 N=4 D=64" in text
    assert next(results.rows(doc)).fraction > 0
