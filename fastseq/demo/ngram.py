"""The baseline: an order-3 n-gram with interpolated Kneser-Ney smoothing.

Each character is predicted from the two before it. With c(abc) the training counts, D the absolute discount of an order
and N1+ the number of distinct characters seen in a place,

    p(c | ab) = max(c(abc) - D, 0) / c(ab.)  +  D N1+(ab.) / c(ab.)  p(c | b)

and p(c | b), p(c) have the same form over continuation counts (in how many different contexts was this seen?) down to
the uniform distribution. D = n1 / (n1 + 2 n2) from the numbers of n-grams seen once and twice.
Kneser and Ney, "Improved backing-off for m-gram language modeling", 1995; Chen and Goodman, "An empirical study of
smoothing techniques for language modeling", 1999.
"""

from __future__ import annotations

import numpy as np


def kneser_ney(train: np.ndarray, vocabulary: int) -> np.ndarray:
    """The table p[a, b, c] of the probability of character c after a, b; every row sums to one.

    `train` (number of characters,) holds ids below `vocabulary`; the table takes 8 vocabulary**3 bytes.
    """
    codes = (train[:-2] * vocabulary + train[1:-1]) * vocabulary + train[2:]
    trigrams = np.bincount(codes, minlength=vocabulary**3).reshape((vocabulary,) * 3)
    bigrams = (trigrams > 0).sum(axis=0)  # continuation counts: after how many different a was each b, c seen?
    unigrams = (bigrams > 0).sum(axis=0)
    table = np.full(vocabulary, 1.0 / vocabulary)
    for counts in (unigrams, bigrams, trigrams):
        table = _interpolate(counts, table)
    return table


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Discounted counts over the last axis, the mass taken away given to `lower`; unseen rows are `lower` itself."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once and twice else 0.5  # the formula fails on very small texts
    kept = np.maximum(counts - discount, 0.0) / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    # The mass left is counted from what was kept, so that a row sums to one also where it was never seen.
    return kept + (1.0 - kept.sum(axis=-1, keepdims=True)) * lower


def bits_per_character(table: np.ndarray, text: np.ndarray) -> float:
    """The mean of -log2 p over text[:, 2:], each character given the two before it; text (streams, length)."""
    return float(-np.log2(table[text[:, :-2], text[:, 1:-1], text[:, 2:]]).mean())
