"""What the demo concludes from its numbers."""

import numpy as np

from fastseq.demo.race import Race, Settings
from fastseq.demo.report import CellReport


def test_the_demo_allows_what_rounding_alone_does_and_no_more():
    report = CellReport("LSTM", {"fastseq": [1.0]}, {"fastseq": 1.0, "torch.nn": 1.0}, 4e-3, 0.0, 50)
    assert [passed for _, passed in report.verdicts()] == [True, False]
    report.float32_drift = 1e-3
    sentence, passed = report.verdicts()[1]
    assert passed and "5 times how far torch.nn drifts" in sentence
    report.float32_difference = 6e-3
    assert not report.verdicts()[1][1]
    report.float32_drift, report.float32_difference = 1e-7, 0.9e-3  # the bound is never below what it was
    assert report.verdicts()[1][1]


def test_drift_is_a_rounding_error_after_a_few_steps():
    text = np.random.default_rng(0).integers(1, 20, 4000)
    race = Race("GRU", text, 20, Settings(hidden=16, steps=8, batch=4, seq=16))
    for _ in race.run():
        pass
    assert 0 < race.drift() < 1e-5
