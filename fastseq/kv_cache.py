"""`fastseq.KVCache`: keys and values of the tokens so far, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.attention import attention_in_kernel_type, attention_options

__all__ = ["KVCache"]


class KVCache:
    r"""The keys and values of one attention layer's tokens so far, and attention of new tokens to them.

    ::

        cache = fastseq.KVCache(batch_size=1, num_kv_heads=12, head_dim=64)
        cache.append(key, value)      # (B, N_kv, L, D): the L tokens of a prompt, or one
        out = cache.attend(query)     # (B, N, L, D): each of those tokens sees itself and what is before it

    For inference: it keeps no graph. Memory is allocated ahead and doubled when it is full. Rows of the batch may be of
    different lengths. Without a window, a row's result is the same to the last bit whatever the other rows are.

    Args:
        batch_size: B. num_kv_heads: N_kv. head_dim: D.
        value_dim: Dv; None means D.
        capacity: for how many tokens memory is allocated at first.
        max_length: the most tokens that a row may have; more is an error. None: no limit.
        window: a token sees no more than this many tokens before it, and what is further back is forgotten: memory
            stays the same however many tokens come.
        dtype, device: of keys and values; None means torch's defaults.

    Attributes:
        lengths: (B,) int64, on the CPU: how many tokens each row has had, those that the window forgot among them.
        keys, values: (B, N_kv, S, D) and (B, N_kv, S, Dv), what is held: views of S tokens, as many as the row that
            holds most; what a shorter row has in the rest is not defined.

    Raises:
        ValueError: a size or number that is not possible.
        RuntimeError: tensors that do not fit the cache; more tokens than `max_length`; keys that require a gradient.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        capacity: int = 256,
        max_length: int | None = None,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, size, least in (
            ("batch_size", batch_size, 0),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("value_dim", value_dim, 1),
            ("capacity", capacity, 1),
            ("max_length", max_length, 1),
            ("window", window, 0),
        ):
            if size is not None and size < least:
                raise ValueError(f"{name} must be at least {least}; got {size}")
        self.max_length, self.window = max_length, window
        capacity = capacity if max_length is None else min(capacity, max_length)
        self._keys = torch.empty(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = self._keys.new_empty(batch_size, num_kv_heads, capacity, value_dim)
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens; memory stays."""
        # Numbers of tokens: of all rows alike, or (B,). Those that came, those in memory, those of the last append.
        self._lengths: Tensor | int = 0
        self._held: Tensor | int = 0
        self._new: Tensor | int = 0

    def __repr__(self) -> str:
        B, N, S, D = self._keys.shape
        return (
            f"KVCache({B}, {N}, {D}, lengths={self.lengths.tolist()}, capacity={S}, "
            f"max_length={self.max_length}, window={self.window}, dtype={self._keys.dtype})"
        )

    @property
    def lengths(self) -> Tensor:
        return self._of_rows(self._lengths)

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : _most(self._held)]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : _most(self._held)]

    def append(self, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> None:
        """Adds L tokens to each row, or, with lengths (B,), the first lengths[b] of them to row b.

        Args:
            key: (B, N_kv, L, D). value: (B, N_kv, L, Dv). Of the cache's dtype and device.
            lengths: 0..L: prompts that are padded on the right.
        """
        B, N, _, _D = self._keys.shape
        L = key.shape[2] if key.dim() == 4 else 0
        for name, t, buffer in (("key", key, self._keys), ("value", value, self._values)):
            expected = (B, N, L, buffer.shape[3])
            if t.shape != expected or key.dim() != 4 or t.dtype != buffer.dtype or t.device != buffer.device:
                raise RuntimeError(
                    f"{name} must be ({B}, {N}, L, {buffer.shape[3]}) {buffer.dtype} on {buffer.device}, the same L of "
                    f"both; got {tuple(t.shape)} {t.dtype} on {t.device}"
                )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("a KVCache keeps no graph, and key or value requires a gradient: use torch.no_grad()")
        new = L if lengths is None else _checked_lengths(lengths, B, L)
        if self.max_length is not None and _most(self._lengths + new) > self.max_length:
            raise RuntimeError(
                f"the cache takes {self.max_length} tokens (max_length) in a row; got {L} more where it has "
                f"{_most(self._lengths)}"
            )
        self._make_room(L)
        if isinstance(self._held, int) and isinstance(new, int):
            self._keys[:, :, self._held : self._held + L] = key
            self._values[:, :, self._held : self._held + L] = value
        else:
            row, token = (torch.arange(L) < self._of_rows(new)[:, None]).nonzero(as_tuple=True)
            at = self._of_rows(self._held)[row] + token
            self._keys[row, :, at] = key[row, :, token]
            self._values[row, :, at] = value[row, :, token]
        self._held, self._lengths, self._new = self._held + new, self._lengths + new, new

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of the tokens of the last `append`: each sees itself and the tokens before it, within the window.

        Args:
            query: (B, N, L, D), N a multiple of N_kv: of the tokens that were appended last.
            scale, alibi_slopes, softcap: as in `fastseq.scaled_dot_product_attention`.

        Returns:
            (B, N, L, Dv); zeros for what was padding in `append`.
        """
        new = self._new
        if query.dim() != 4 or (query.shape[2] != new if isinstance(new, int) else query.shape[2] < _most(new)):
            raise RuntimeError(
                f"query must be (B, N, L, D) of the {_most(new)} tokens that were appended last; "
                f"got {tuple(query.shape)}"
            )
        options = attention_options(
            query,
            None,
            0.0,
            True,
            scale,
            None if self.window is None else (self.window, 0),
            alibi_slopes,
            softcap,
            "bottom_right",
            query_lengths=None if isinstance(new, int) else new,
            key_lengths=None if isinstance(self._held, int) else self._held,
        )
        return attention_in_kernel_type(query, self.keys, self.values, options)[0]

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was, as beam search does; rows may repeat, and be more or fewer than before.

        Args:
            rows: (new B,) int64.
        """
        B = self._keys.shape[0]
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"rows must be one-dimensional, int64; got {tuple(rows.shape)} {rows.dtype}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < B:
            raise RuntimeError(f"rows must be within 0..{B - 1}, the rows of the cache; got {rows.tolist()}")
        for name in ("_keys", "_values"):
            buffer = getattr(self, name)
            most = _most(self._held)
            held = buffer[:, :, :most].index_select(0, rows.to(buffer.device))
            if len(rows) != B:
                buffer = buffer.new_empty(len(rows), *buffer.shape[1:])
                setattr(self, name, buffer)
            buffer[:, :, :most] = held
        for name in ("_lengths", "_held", "_new"):
            if isinstance(numbers := getattr(self, name), Tensor):
                setattr(self, name, numbers[rows.cpu()])

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets what came after the first `lengths` tokens, of all rows or (B,): tokens that were only tried.

        What the window already forgot does not come back: a row that it would need tokens of is an error.
        """
        B, had = self._keys.shape[0], self._lengths
        wanted = lengths if isinstance(lengths, int) else lengths.to("cpu", torch.int64)
        fits = isinstance(wanted, int) or wanted.shape == (B,)
        if not fits or _least(wanted) < 0 or _least(had - wanted) < 0:
            raise RuntimeError(f"lengths must be within what the rows have, {self.lengths.tolist()}; got {lengths}")
        forgotten = had - self._held
        held = wanted - forgotten
        if self.window is not None and bool(
            (self._of_rows(forgotten) > 0).logical_and(self._of_rows(held) < self.window).any()
        ):
            raise RuntimeError(
                f"the window forgot tokens that the next ones would see: of {lengths} tokens it holds only the last "
                f"{self._of_rows(held).tolist()} of the {self.window} before them"
            )
        self._held, self._lengths, self._new = held, wanted, 0

    def _make_room(self, tokens: int) -> None:
        """For so many more in each row: by forgetting what is beyond the window, then by more memory."""
        capacity = self._keys.shape[2]
        if _most(self._held) + tokens <= capacity:
            return
        if self.window is not None:
            self._forget(self.window)
        most = _most(self._held)
        if most + tokens <= capacity:
            return
        capacity = max(most + tokens, 2 * capacity if self.max_length is None else min(2 * capacity, self.max_length))
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :most] = old[:, :, :most]
            setattr(self, name, new)

    def _forget(self, window: int) -> None:
        """What is not among the last `window` tokens; those move to the beginning."""
        held = self._held
        kept = min(held, window) if isinstance(held, int) else held.clamp(max=window)
        for buffer in (self._keys, self._values):
            if isinstance(held, int):
                buffer[:, :, :kept] = buffer[:, :, held - kept : held].clone()
            else:
                for b, (end, keep) in enumerate(zip(held.tolist(), kept.tolist(), strict=True)):
                    buffer[b, :, :keep] = buffer[b, :, end - keep : end].clone()
        self._held = kept

    def _of_rows(self, numbers: Tensor | int) -> Tensor:
        return torch.full((self._keys.shape[0],), numbers) if isinstance(numbers, int) else numbers


def _most(numbers: Tensor | int) -> int:
    return numbers if isinstance(numbers, int) else int(numbers.max()) if numbers.numel() else 0


def _least(numbers: Tensor | int) -> int:
    return numbers if isinstance(numbers, int) else int(numbers.min()) if numbers.numel() else 0


def _checked_lengths(lengths: Tensor, B: int, L: int) -> Tensor:
    numbers = lengths.to("cpu", torch.int64)
    if numbers.shape != (B,) or bool(((numbers < 0) | (numbers > L)).any()):
        raise RuntimeError(
            f"lengths must be ({B},) with values in 0..{L}; got {tuple(lengths.shape)}: {lengths.tolist()}"
        )
    return numbers
