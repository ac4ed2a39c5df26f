"""Models whose layers run on fastseq's kernels, and what generates text with them."""

from fastseq.models.generation import generate_text, process_logits
from fastseq.models.gpt2 import GPT2, GPT2Config
from fastseq.models.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

__all__ = [
    "GPT2",
    "BPETokenizer",
    "ByteTokenizer",
    "GPT2Config",
    "generate_text",
    "load_tokenizer",
    "process_logits",
]
