"""The benchmark's rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from fastseq.bench.compare import Row


def markdown(rows: Sequence[Row]) -> str:
    """A table in the order of the rows: milliseconds of each side, the ratio, and its quartiles."""
    lines = [
        "| class | T | B | H | mode | torch.nn ms | fastseq ms | ratio | quartiles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        p = row.point
        lines.append(
            f"| {p.name} | {p.T} | {p.B} | {p.H} | {p.mode} | {row.torch_ms:.3f} | {row.fastseq_ms:.3f} "
            f"| {row.ratio:.2f} | {row.ratio_low:.2f}-{row.ratio_high:.2f} |"
        )
    return "\n".join(lines)


def ratio_table(rows: Sequence[Row]) -> str:
    """The ratios alone: a line for each size, a column for each class and mode."""
    columns = list(dict.fromkeys((row.point.name, row.point.mode) for row in rows))
    sizes = list(dict.fromkeys((row.point.T, row.point.B, row.point.H) for row in rows))
    ratios = {((p := row.point).T, p.B, p.H, p.name, p.mode): f"{row.ratio:.2f}" for row in rows}
    lines = [
        "| T, B, H | " + " | ".join(f"{name} {mode}" for name, mode in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for size in sizes:
        cells = [ratios.get((*size, *column), "") for column in columns]
        lines.append(f"| {', '.join(map(str, size))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
