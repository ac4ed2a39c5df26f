"""The baselines: n-grams with interpolated Kneser-Ney smoothing.

Each symbol is predicted from the order - 1 before it. Of order 3, with c(abc) the training counts, D the absolute
discount of an order and N1+ the number of distinct symbols seen in a place,

    p(c | ab) = max(c(abc) - D, 0) / c(ab.)  +  D N1+(ab.) / c(ab.)  p(c | b)

and p(c | b), p(c) have the same form over continuation counts (in how many different contexts was this seen?) down to
the uniform distribution. D = n1 / (n1 + 2 n2) from the numbers of n-grams seen once and twice.
Kneser and Ney, "Improved backing-off for m-gram language modeling", 1995; Chen and Goodman, "An empirical study of
smoothing techniques for language modeling", 1999.
"""

from __future__ import annotations

import numpy as np


class KneserNey:
    """The probabilities of an n-gram of any order, from the n-grams that were seen alone.

    Args:
        train: (length,) ids below `vocabulary`, order or more of them.
        vocabulary, order: vocabulary ** order < 2**63.
    """

    def __init__(self, train: np.ndarray, vocabulary: int, order: int) -> None:
        self.vocabulary, self.order = vocabulary, order
        codes, counts = np.unique(_codes(train, vocabulary, order), return_counts=True)
        self._levels = []
        for shorter in range(order - 1, -1, -1):
            self._levels.append(_Level(codes, counts, vocabulary))
            # Continuation counts: after how many different first symbols was the rest seen?
            codes, counts = np.unique(codes % vocabulary**shorter, return_counts=True)
        self._levels.reverse()

    def probabilities(self, text: np.ndarray) -> np.ndarray:
        """Of text[..., order - 1 :], each symbol given those before it: (..., length - order + 1)."""
        codes = _codes(text, self.vocabulary, self.order)
        p = np.full(codes.shape, 1.0 / self.vocabulary)
        for length, level in enumerate(self._levels, start=1):
            p = level.interpolate(codes % self.vocabulary**length, p)
        return p

    def bits(self, text: np.ndarray) -> float:
        """The mean of -log2 p over those symbols."""
        return float(-np.log2(self.probabilities(text)).mean())


class _Level:
    """N-grams of one length: their codes in order, and what stays of their counts after discounting."""

    def __init__(self, codes: np.ndarray, counts: np.ndarray, vocabulary: int) -> None:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once and twice else 0.5  # the formula fails on very small texts
        self.codes, self.vocabulary = codes, vocabulary
        self.contexts, begin, followers = np.unique(codes // vocabulary, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, begin)
        self.kept = (counts - discount) / np.repeat(totals, followers)
        self.left = discount * followers / totals

    def interpolate(self, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p of these n-grams, the mass taken away given to `lower`; after an unseen context it is `lower` itself."""
        kept = _look_up(self.codes, self.kept, codes, missing=0.0)
        return kept + _look_up(self.contexts, self.left, codes // self.vocabulary, missing=1.0) * lower


def _codes(ids: np.ndarray, vocabulary: int, order: int) -> np.ndarray:
    """Each run of `order` ids as one number, the first id the most significant."""
    length = ids.shape[-1] - order + 1
    codes = np.zeros((*ids.shape[:-1], length), dtype=np.int64)
    for place in range(order):
        codes = codes * vocabulary + ids[..., place : place + length]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
