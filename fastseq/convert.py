"""`fastseq.convert` and `fastseq.to_torch`: swap the recurrent layers and the attention of a built model, in place."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import torch
from torch.nn.utils import parametrize

from fastseq import multihead_attention, rnn

__all__ = ["ConversionReport", "convert", "to_torch"]

_Model = TypeVar("_Model", bound=torch.nn.Module)
_Class = type[torch.nn.Module]

TORCH_TO_FASTSEQ: dict[_Class, _Class] = {
    torch.nn.RNN: rnn.RNN,
    torch.nn.LSTM: rnn.LSTM,
    torch.nn.GRU: rnn.GRU,
    torch.nn.RNNCell: rnn.RNNCell,
    torch.nn.LSTMCell: rnn.LSTMCell,
    torch.nn.GRUCell: rnn.GRUCell,
    torch.nn.MultiheadAttention: multihead_attention.MultiheadAttention,
}
_FASTSEQ_TO_TORCH: dict[_Class, _Class] = {ours: theirs for theirs, ours in TORCH_TO_FASTSEQ.items()}


@dataclass
class ConversionReport:
    """What `convert` or `to_torch` did with each recurrent module and attention of a model.

    Attributes:
        swapped: module name -> "old class -> new class".
        left: module name -> why it was left as it is.

    The name of the model itself is "". A module in several places is listed once, under the first of its names.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


@overload
def convert(model: _Model, *, report: Literal[False] = False) -> _Model: ...
@overload
def convert(model: _Model, *, report: Literal[True]) -> tuple[_Model, ConversionReport]: ...
def convert(model: Any, *, report: bool = False) -> Any:
    """Makes every torch.nn.RNN, LSTM, GRU, cell and MultiheadAttention in `model`, or `model` itself, fastseq's.

    Each module stays the very object that it was, in place, and only its class changes. So everything that refers to
    it or hangs on it remains: parameters (an optimizer goes on working) and buffers, forward, backward and state-dict
    hooks, parametrizations, weight norm and pruning, training mode, attributes of your own, names, and a module's
    several places in the model. For a copy: ``fastseq.convert(copy.deepcopy(model))``.

    torch.nn.Transformer and its layers keep their class, and call fastseq's attention in training and eval mode: see
    `MultiheadAttention`.

    Left as they are: subclasses (whose code may rely on torch's), a module whose `forward` was replaced on the object,
    and modules of quantization and TorchScript. Modules that only a plain list or dict of Python holds are not seen.
    Code of the model that asks ``isinstance(m, torch.nn.LSTM)`` gets False afterwards: let it ask for
    ``torch.nn.RNNBase``. For ``torch.nn.MultiheadAttention`` it stays True.

    Args:
        model: a module; changed in place. Convert before torch.compile.
        report: also return a `ConversionReport` of what was swapped, what was not and why. Without it, modules that
            were left are named in a warning.

    Returns:
        `model`, or (`model`, report).

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    return _swap(model, TORCH_TO_FASTSEQ, report)


@overload
def to_torch(model: _Model, *, report: Literal[False] = False) -> _Model: ...
@overload
def to_torch(model: _Model, *, report: Literal[True]) -> tuple[_Model, ConversionReport]: ...
def to_torch(model: Any, *, report: bool = False) -> Any:
    """Undoes `convert`: makes every fastseq layer and cell the torch.nn one, in place, in the same way.

    Calls with ``lengths=``, which torch.nn does not have, fail afterwards.

    Args, Returns, Raises: as `convert`.
    """
    return _swap(model, _FASTSEQ_TO_TORCH, report)


def _swap(model: Any, classes: dict[_Class, _Class], return_report: bool) -> Any:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    report = ConversionReport()
    for name, module in model.named_modules():
        old = _class_of(module)
        if old in classes and "forward" not in vars(module):
            _change_class(module, classes[old])
            report.swapped[name] = f"{qualified_name(old)} -> {qualified_name(classes[old])}"
        elif (why := _why_left(module, classes)) is not None:
            report.left[name] = why
    if return_report:
        return model, report
    if report.left:
        warnings.warn(f"fastseq left modules as they are: {report}", stacklevel=3)
    return model


def _class_of(module: torch.nn.Module) -> _Class:
    """The module's class, without the one that parametrize puts before it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _change_class(module: torch.nn.Module, new: _Class) -> None:
    if parametrize.is_parametrized(module):
        # parametrize made a class for this module that has the computed parameters as properties: one such on `new`.
        own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
        new = type(f"Parametrized{new.__name__}", (new,), own)
    module.__class__ = new
    if isinstance(module, torch.nn.RNNBase):
        # torch.nn's layers keep their weights in this list too; in fastseq's it is computed.
        vars(module).pop("_flat_weights", None)
        vars(module).pop("_prepacked", None)
        module._init_flat_weights()
    elif issubclass(new, multihead_attention.MultiheadAttention):
        module.register_forward_pre_hook(multihead_attention.refuse_fast_path)
    elif isinstance(module, torch.nn.MultiheadAttention):
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is multihead_attention.refuse_fast_path]:
            del hooks[key]


def _why_left(module: torch.nn.Module, classes: dict[_Class, _Class]) -> str | None:
    """Why a module is not swapped; None for one of another kind, or of the kind wanted."""
    cls = _class_of(module)
    if cls in classes:
        return "as its forward was replaced on the object, by other code that may rely on it"
    names = {base.__name__ for base in classes}
    if cls.__name__ in names and cls.__module__.startswith("torch.ao."):
        return f"as {qualified_name(cls)} is for quantization"
    for base in cls.__mro__:  # the nearest first: fastseq's attention is a subclass of torch's
        if base in classes.values():
            return None
        if base in classes:
            return (
                f"as {qualified_name(cls)} is a subclass of {qualified_name(base)}, whose code may rely on it: "
                f"derive it from {qualified_name(classes[base])}"
            )
    if isinstance(module, torch.jit.ScriptModule) and module.original_name in names:
        return f"as it is TorchScript of {module.original_name}"
    return None


def qualified_name(cls: type) -> str:
    """The name under which users know a class: fastseq.GRU, torch.nn.GRU, their.module.Model."""
    for module, package in ((torch.nn, "torch.nn"), (rnn, "fastseq"), (multihead_attention, "fastseq")):
        if getattr(module, cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
