"""The static budget of the CUDA kernels: what can be known of them without a GPU, in a table that CI compares.

`make cuda-budget` compiles csrc/cuda for every architecture and reads registers, spills and static shared memory from
ptxas's report (compilation.py), the instructions from the SASS (sass.py), and threads and shared memory from what the
library launches (launches.cpp, launching.py); occupancy follows (devices.py), and so do operations and bytes at a few
sizes (counts.py). budget.json is the table, docs/cuda-budget.md its page (page.py).
"""
