"""Timing of fastseq's layers next to torch.nn's.

Ratios within one run only: the two sides take turns in short bursts, the medians are compared, and the results are
checked to be equal before anything is timed.
"""

from fastseq.bench.compare import MODES, Point, Row, compare, full_grid, quick_grid
from fastseq.bench.table import markdown, ratio_table

__all__ = ["MODES", "Point", "Row", "compare", "full_grid", "markdown", "quick_grid", "ratio_table"]
