"""The benchmark: fastseq next to its peers, and next to what the machine can do at all.

Ratios within one run only. Every contender computes in a process of its own (`worker`), gets the same numbers
(`problem`) and must give the same results before anything is timed (`session`); all take turns in short bursts
(`harness`). `grid` says what is measured, `peers` who is there, `roofline` what cannot be beaten, `scenarios` and
`memory` what is no single call; `results` is the document of a run, which `report` and `page` show, `bars` judges and
`compare` holds against another.
"""
