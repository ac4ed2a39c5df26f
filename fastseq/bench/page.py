"""A document as one HTML page: the tables, and plots as pictures inside the page. It asks for nothing from outside."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

from fastseq.bench import report, results
from fastseq.bench.grid import ATTENTION, ATTENTION_FORMS, CELLS, MODES, AnyPoint, AttentionPoint
from fastseq.bench.peers import OURS, PEERS
from fastseq.bench.results import Document, Row

COLOURS = dict(zip(PEERS, ("#6c757d", "#b5a27f", "#444444", "#2a7fba", "#7a4fa3", "#2f9e6d", "#e08e1b"), strict=True))
COLOURS[OURS] = "#d1495b"
MARKERS = dict(zip(PEERS, "osXD^vP", strict=True))

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1500px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 6px; border-bottom: 1px solid #eee; white-space: nowrap; vertical-align: top; }
td.long { white-space: normal; min-width: 18rem; }
th { background: #f6f6f6; position: sticky; top: 0; }
tr.marked td { background: #fdecee; }
.incomplete { background: #fdecee; border-left: 4px solid #d1495b; padding: .5rem 1rem; }
.note { color: #666; font-size: 13px; max-width: 60rem; }
svg { max-width: 1180px; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 13px; } dt { color: #666; }
dd { margin: 0; }
"""


def render(document: Document) -> str:
    """The page."""
    incomplete = [line for line in report.headline(document) if line.startswith("INCOMPLETE")]
    others = [line for line in report.headline(document) if not line.startswith("INCOMPLETE")]
    rows, bars, *rest = report.tables(document) if document["rows"] else [None, None, *report.tables(document)]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>fastseq: benchmark</title>",
        f"<style>{STYLE}</style></head><body><h1>fastseq next to its peers</h1>",
        f"<p class='note'>{_escape(document['host'].get('processor', ''))}, threads tried: "
        f"{', '.join(map(str, document['threads']))}</p>",
    ]
    if incomplete:
        lines = [line.removeprefix("INCOMPLETE: ") for line in incomplete]
        parts.append(f"<div class='incomplete'><b>This report is incomplete.</b>{_list(lines)}</div>")
    parts.append(_list(others))
    parts += [_table(table) for table in (rows,) if table]
    parts += [f"<h2>{_escape(title)}</h2>{picture}" for title, picture in _pictures(document)]
    parts += [_table(table) for table in (bars, *rest) if table]
    facts = "".join(f"<dt>{_escape(k)}</dt><dd>{_escape(v)}</dd>" for k, v in document["host"].items())
    return "".join([*parts, f"<h2>Host</h2><dl>{facts}</dl></body></html>"])


def _escape(text: object) -> str:
    return html.escape(str(text))


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_escape(line)}</li>" for line in lines) + "</ul>"


def _table(table: report.Table) -> str:
    head = "".join(f"<th>{_escape(column)}</th>" for column in table.columns)
    body = "".join(
        f"<tr{' class=marked' if number in table.marked else ''}>"
        + "".join(f"<td{' class=long' if len(cell) > 60 else ''}>{_escape(cell)}</td>" for cell in line)
        + "</tr>"
        for number, line in enumerate(table.lines)
    )
    note = f"<p class='note'>{_escape(table.note)}</p>" if table.note else ""
    return f"<h2>{_escape(table.title)}</h2><div class='table'><table><tr>{head}</tr>{body}</table></div>{note}"


# ---- Plots ----------------------------------------------------------------------------------------------------------


def _pictures(document: Document) -> list[tuple[str, str]]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "svg.hashsalt": "fastseq"})
    rows = [row for row in results.rows(document) if row.ours]
    pictures = []
    kinds = dict.fromkeys((row.point.mode, row.point.dtype) for row in rows)
    for mode, dtype in kinds:
        of_kind = [row for row in rows if (row.point.mode, row.point.dtype) == (mode, dtype)]
        pictures.append((f"{mode}, {dtype}: ratio to each peer, and fraction of the floor", _ratios(of_kind)))
    for letter in "TBHL":
        if picture := _growth(rows, letter):
            pictures.append((f"Time against {letter}", picture))
    return pictures


def _ratios(rows: Sequence[Row]) -> str:
    """A line for each row: the peers' times over ours on the left, the fraction of the floor on the right."""
    from matplotlib import pyplot as plt

    height = 1.3 + 0.23 * len(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, gridspec_kw={"width_ratios": (3, 1), "wspace": 0.04}
    )
    labels = [row.point.label for row in rows]
    for peer in PEERS:
        places = [(ratio, y) for y, row in enumerate(rows) if (ratio := row.ratio(peer))]
        if places:
            x, y = zip(*places, strict=True)
            left.plot(x, y, MARKERS[peer], color=COLOURS[peer], markersize=5, label=peer, linestyle="none")
    for y, row in enumerate(rows):
        if row.lost_to:
            left.axhspan(y - 0.5, y + 0.5, color="#fdecee", zorder=0)
    left.axvline(1, color="#d1495b", linewidth=1)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(_plain)
    left.xaxis.set_minor_formatter(_plain if _narrow(left.get_xlim()) else "")
    left.set_yticks(range(len(rows)), labels)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("the peer's time over ours: right of 1, we are faster")
    left.grid(axis="x", alpha=0.25)
    fractions = [row.fraction or 0.0 for row in rows]
    right.barh(range(len(rows)), fractions, color=COLOURS[OURS], alpha=0.75, height=0.6)
    right.set_xlim(0, max(1.0, *fractions) * 1.02)
    right.axvline(1, color="#999", linewidth=1, linestyle=":")
    right.tick_params(axis="y", length=0)
    right.set_xlabel("floor / our time")
    figure.legend(loc="upper center", ncols=len(PEERS), frameon=False, bbox_to_anchor=(0.5, 1.0))
    figure.subplots_adjust(left=0.24, right=0.99, top=1 - 0.4 / height, bottom=0.55 / height)
    return _svg(figure)


def _growth(rows: Sequence[Row], letter: str) -> str | None:
    """Time against one size, all others the same: a panel for each kind of row and mode that has such a series."""
    from matplotlib import pyplot as plt

    kinds = [(cell, "layer") for cell in CELLS] if letter in "TBH" else [(ATTENTION, form) for form in ATTENTION_FORMS]
    series = {(kind, mode): _series(rows, *kind, mode, letter) for kind, mode in itertools.product(kinds, MODES)}
    modes = [mode for mode in MODES if any(series[kind, mode] for kind in kinds)]
    kinds = [kind for kind in kinds if any(series[kind, mode] for mode in modes)]
    if not modes:
        return None
    figure, axes = plt.subplots(len(modes), len(kinds), figsize=(11, 3.1 * len(modes) + 0.4), squeeze=False)
    for (i, mode), (j, (cell, form)) in itertools.product(enumerate(modes), enumerate(kinds)):
        axis, taken = axes[i][j], series[(cell, form), mode]
        if not taken:
            axis.set_axis_off()
            continue
        sizes = [getattr(row.point, letter) for row in taken]
        for peer in PEERS:
            times = [
                (n, row.peers[peer].median * 1e3) for n, row in zip(sizes, taken, strict=True) if peer in row.peers
            ]
            if times:
                x, y = zip(*times, strict=True)
                axis.plot(x, y, color=COLOURS[peer], marker=MARKERS[peer], markersize=3, linewidth=1, label=peer)
        ours = [row.ours.median * 1e3 for row in taken if row.ours]
        axis.plot(sizes, ours, color=COLOURS[OURS], marker="o", markersize=4, linewidth=2, label=OURS)
        power, label = (1, "in proportion") if letter in "TB" or form == "window" else (2, f"as {letter}²")
        axis.plot(sizes, [ours[-1] * (n / sizes[-1]) ** power for n in sizes], color="#999", linestyle=":", label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(_plain)
        kind = cell if form == "layer" else f"{cell}, {form},"
        axis.set_title(f"{kind} {mode}, {_fixed(taken[0].point, letter)}", fontsize=9)
        axis.set_xlabel(letter)
        axis.grid(alpha=0.25)
        if j == 0:
            axis.set_ylabel("ms")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    top = figure.get_size_inches()[1]
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / top))
    return _svg(figure)


def _series(rows: Sequence[Row], cell: str, form: str, mode: str, letter: str) -> list[Row]:
    """The longest series of that size with all others the same (I follows H, S follows L), at least three rows; in its
    order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        p = row.point
        if (p.cell, p.form, p.mode, p.dtype) == (cell, form, mode, "float32"):
            square = p.L == p.S if isinstance(p, AttentionPoint) else p.I == p.H
            rest = "" if isinstance(p, AttentionPoint) else f"{p.layers} {p.directions}"
            if square:
                groups.setdefault(f"{_fixed(p, letter)} {rest}", []).append(row)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=lambda row: getattr(row.point, letter)) if len(longest) >= 3 else []


def _fixed(point: AnyPoint, letter: str) -> str:
    letters = "BNLD" if isinstance(point, AttentionPoint) else "TBH"
    return " ".join(f"{name}={getattr(point, name)}" for name in letters if name != letter)


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _narrow(limits: tuple[float, float]) -> bool:
    return limits[1] / limits[0] < 12


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    # Only the picture, without the prologue of a file of its own; identifiers are unique in the whole page.
    text = text[text.index("<svg") :]
    prefix = f"p{abs(hash(text)) % 10**8}"
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{prefix}", text)
