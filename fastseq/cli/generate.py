"""`python -m fastseq generate`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastseq.models import GPT2, ByteTokenizer, generate_text, load_tokenizer


@click.command()
@click.option("--prompt", required=True, help="What the text begins with.")
@click.option(
    "--weights",
    default="fastseq-gpt2",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder with a GPT-2 in transformers' format: config.json, model.safetensors and the tokenizer's files.",
)
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(min=1), help="At most so many.")
@click.option("--greedy", is_flag=True, help="Take the most probable token; else draw one.")
@click.option("--temperature", default=1.0, show_default=True, help="Below 1: the probable becomes more so.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k most probable tokens.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens that have this probability together.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: what was there comes less often.")
@click.option("--beams", default=1, show_default=True, type=click.IntRange(min=1), help="Search with so many beams.")
@click.option("--stop", multiple=True, help="End before this text; may be repeated.")
@click.option("--seed", type=int, help="The same seed draws the same text again.")
def generate(
    prompt: str,
    weights: Path,
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    beams: int,
    stop: tuple[str, ...],
    seed: int | None,
) -> None:
    """Continues a text with a GPT-2, token by token as they come.

    The weights are a folder as transformers' save_pretrained writes it; nothing in it is executed. Where it has no
    tokenizer, tokens are bytes.

    \b
    python -m fastseq generate --prompt "def "                 by the model that train-gpt2 made
    python -m fastseq generate --weights gpt2/ --prompt "Once upon a time"
    python -m fastseq generate --weights gpt2/ --prompt "def " --temperature 0.7 --top-p 0.9 --seed 1 --stop return
    python -m fastseq generate --weights gpt2/ --prompt "The answer" --beams 4 --max-new-tokens 20
    """
    if not weights.exists():
        raise click.UsageError(
            f"{weights} does not exist: `python -m fastseq train-gpt2` makes a model in fastseq-gpt2."
        )
    if seed is not None:
        torch.manual_seed(seed)
    drawn = not greedy and beams == 1
    options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p} if drawn else {}
    if not drawn and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise click.UsageError("--temperature, --top-k and --top-p are for tokens that are drawn: leave out --greedy "
                               "and --beams, or them.")  # fmt: skip
    try:
        model = GPT2.from_pretrained(weights)
        tokenizer = load_tokenizer(weights) or ByteTokenizer()
        if model.config.self_trained:
            click.echo("This model is self-trained: its weights are no published ones.", err=True)
        pieces = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens,
            stop=stop,
            num_beams=beams,
            repetition_penalty=repetition_penalty,
            **options,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
