"""Files that a command writes: refused before the work if they cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click


def probe(folder: Path) -> None:
    """Raises click.UsageError, before anything is computed, where nothing can be written to the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.UsageError(f"cannot write to {folder} ({error.strerror}): choose another place.") from None


def output_file(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A click callback: the path of a file to be written, its folder probed."""
    if value is None:
        return None
    path = Path(value)
    if path.is_dir():
        raise click.UsageError(f"{path} is a folder: name a file.")
    probe(path.parent)
    return path
