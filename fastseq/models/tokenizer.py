"""Text to token ids and back: bytes, or GPT-2's byte-level BPE from its vocabulary files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # transformers' names, and OpenAI's


class Tokenizer(Protocol):
    """What `generate_text` needs: any text as ids, any ids as the bytes of UTF-8."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> bytes: ...


class ByteTokenizer:
    """The bytes of UTF-8 are the ids."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


class BPETokenizer:
    """Byte-level byte-pair encoding as in GPT-2 (Radford et al., 2019), by the library tokenizers.

    Args:
        tokenizer: tokenizers.Tokenizer, byte-level.

    Raises:
        ValueError: a tokenizer whose tokens are not bytes in GPT-2's alphabet.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        alphabet = _alphabet()
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(tokens.values(), default=-1)
        self._bytes = [b""] * self.vocab_size
        try:
            for token, i in tokens.items():
                self._bytes[i] = bytes(alphabet[character] for character in token)
        except KeyError:
            raise ValueError(f"the tokenizer is not byte-level, as GPT-2's is: its token {i} is {token!r}") from None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids)


def load_tokenizer(folder: str | Path) -> BPETokenizer | None:
    """The folder's BPE: tokenizer.json, vocab.json with merges.txt, or encoder.json with vocab.bpe; None without.

    Raises:
        ValueError: files that are damaged, or of another kind of tokenizer.
        ModuleNotFoundError: there are files, and the library tokenizers is not installed.
    """
    folder = Path(folder)
    whole = folder / "tokenizer.json"
    pairs = [(folder / vocab, folder / merges) for vocab, merges in VOCABULARIES]
    pair = next(((vocab, merges) for vocab, merges in pairs if vocab.exists() and merges.exists()), None)
    if not (whole.exists() or pair):
        return None
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"the BPE in {folder} needs tokenizers: run `pip install tokenizers`.") from None
    try:
        if whole.exists():
            return BPETokenizer(tokenizers.Tokenizer.from_file(str(whole)))
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, pair)))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return BPETokenizer(tokenizer)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from None


def _alphabet() -> dict[str, int]:
    """The byte of each character in GPT-2's tokens: printable ones stand for themselves, others for 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
