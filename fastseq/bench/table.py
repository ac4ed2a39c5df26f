"""The benchmark's rows as a Markdown table."""

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
