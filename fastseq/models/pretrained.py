"""Folders of transformers: config.json and weights, read as data alone and checked before memory is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastseq._files import write

JSON_BYTES = 1 << 24  # no config or index is larger
INDEX = "model.safetensors.index.json"
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions of transformers saved

T = TypeVar("T")
Found = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON object; ValueError, naming the file, where it is missing or makes no sense."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"it is larger than {JSON_BYTES} bytes")
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it must be a JSON object; got {type(values).__name__}")
        return parse(values)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model that can be opened: {error}") from None


def load_weights(folder: Path, expected: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder by the names of `expected`, after their shapes were found to be the same."""
    with ExitStack() as opened:
        try:
            found = _canonical(_found(folder, opened), expected)
        except OSError as error:
            raise ValueError(f"cannot read the weights in {folder}: {error}") from None
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} is not a part of the model" for name in found if name not in expected]
        problems += [
            f"{name} must be {tuple(shape)}, and is {found[name][0]}"
            for name, shape in expected.items()
            if name in found and found[name][0] != tuple(shape)
        ]
        if problems:
            more = f", and {len(problems) - 3} problems more" if len(problems) > 3 else ""
            raise ValueError(f"the weights in {folder} do not fit config.json: {'; '.join(problems[:3])}{more}")
        return {name: get().to(dtype) for name, (_, get) in found.items()}


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """config.json and model.safetensors, each whole or not at all."""
    serialize = _safetensors().torch.save
    folder.mkdir(parents=True, exist_ok=True)
    data = serialize({name: t.contiguous() for name, t in weights.items()}, metadata={"format": "pt"})
    write(folder / "model.safetensors", data)
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _found(folder: Path, opened: ExitStack) -> Found:
    """The shape of every tensor in the files, and what reads it."""
    if (folder / "model.safetensors").exists():
        return _safetensors_found([folder / "model.safetensors"], opened)
    if (folder / INDEX).exists():
        return _safetensors_found([folder / name for name in read(folder / INDEX, _shards)], opened)
    path = folder / "pytorch_model.bin"
    if not path.exists():
        raise ValueError(f"{folder} has no weights: model.safetensors, {INDEX} or pytorch_model.bin")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: (tuple(t.shape), lambda t=t: t) for name, t in weights.items()}
    except Exception as error:  # of many types, as the file may be anything
        raise ValueError(f"{path} does not hold tensors alone: {str(error).splitlines()[0]:.200}") from None


def _safetensors_found(paths: list[Path], opened: ExitStack) -> Found:
    safetensors, found = _safetensors(), {}
    for path in paths:
        try:
            file = opened.enter_context(safetensors.safe_open(path, framework="pt"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a file of safetensors, or is damaged: {error}") from None
        for name in file.keys():
            found[name] = (
                tuple(file.get_slice(name).get_shape()),
                lambda file=file, name=name: file.get_tensor(name),
            )
    return found


def _shards(index: dict[str, Any]) -> list[str]:
    """The files of an index, in its own folder."""
    names = index.get("weight_map")
    names = sorted(set(names.values())) if isinstance(names, dict) and all(map(_is_name, names.values())) else []
    if not names:
        raise ValueError("weight_map must give each tensor the name of a file in the same folder")
    return names


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name


def _canonical(found: Found, expected: dict[str, torch.Size]) -> Found:
    """By the names of GPT2LMHeadModel, where the files may have those of GPT2Model; a tied head is the embedding."""
    names = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in found.items()
        if not name.endswith(BUFFERS)
    }
    return {name: tensor for name, tensor in names.items() if name in expected or name != "lm_head.weight"}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "fastseq.models reads and writes weights with safetensors: run `pip install safetensors`."
        ) from None
    return safetensors
