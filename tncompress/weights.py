"""Weights of a model in a file: safetensors, or a checkpoint that holds tensors only."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tncompress.storage import new_file
from tncompress.textfiles import one_line

__all__ = ["Unfilled", "fill_weights", "load_weights", "refuse_pickle", "save_weights"]


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What safetensors calls them."""
FILLING = {
    *("uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "fill_", "zero_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_"),
    *("erfinv_", "mul_", "div_", "add_", "sub_", "clamp_", "clip_", "copy_"),
}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in the file ``path`` into ``model``, every one of them or none.

    Reads ``.safetensors``, and what ``torch.save`` wrote of tensors only: a state dict, alone or under
    ``state_dict``, ``model_state_dict`` or ``model``. The prefixes of DDP and ``torch.compile`` (``module.``,
    ``_orig_mod.``) are taken off. Raises ``FileNotFoundError``, and ``ValueError`` for a damaged file, for
    pickled objects, and for weights of another architecture.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}" + (": it is a folder" if path.is_dir() else ""))
    read = _read_safetensors if path.suffix == ".safetensors" else _read_checkpoint
    own = model.state_dict(keep_vars=True)
    state = _without_prefix(_state_dict_in(read(path), path), own)
    _fill_tied(state, own)
    before = {key: value.detach().clone() for key, value in own.items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        with torch.no_grad():
            for key, value in before.items():
                own[key].copy_(value)
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {one_line(_misfit(state, before, error))}"
        ) from error


def fill_weights(model: nn.Module, path: Path) -> None:
    """Copy the weights in a safetensors file into a fresh ``model``, which a failure may leave half filled.

    As :func:`load_weights`, but each tensor is read straight into its place: that takes no memory beside the
    model's own, where the other holds the file and a copy of the model, too.
    """
    own = model.state_dict(keep_vars=True)
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # says whether the header is sound
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            fits = {key: (tuple(p.get_shape()), DTYPES.get(p.get_dtype())) for key, p in parts.items()}
    except safetensors.SafetensorError:
        return load_weights(model, path)  # which says what is wrong
    places = {id(own[key]) for key in fits if key in own}
    whole = places == {id(tensor) for tensor in own.values()} <= held and len(places) == len(fits)
    if not whole or not all(_is_plain(own[key], *fit) for key, fit in fits.items()):
        return load_weights(model, path)
    with path.open("rb") as file, torch.no_grad():
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key in fits:
            begin, end = header[key]["data_offsets"]
            file.seek(8 + length + begin)
            bytes_of = own[key].detach().reshape(-1).view(torch.uint8).numpy()
            if end > begin and file.readinto(memoryview(bytes_of)) != end - begin:
                raise ValueError(f"{path} was cut short while it was read: load it again")
    return None


def _is_plain(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> bool:
    """Say whether ``tensor`` lies in memory just as one of this shape and dtype does in a file."""
    usual = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
    return usual and tensor.dtype == dtype and tuple(tensor.shape) == shape


class Unfilled(TorchFunctionMode):
    """Within it parameters are made, but not filled with random numbers: for a model to be loaded.

    Memory that nothing is written to takes no room, so that layers which are replaced before they are ever
    used cost nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass over what fills a parameter, or changes the numbers in it; call everything else."""
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter) and getattr(func, "__name__", "") in FILLING:
            return first
        return func(*args, **kwargs)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the model's state dict to ``path``, a ``.safetensors`` file, at once or not at all.

    Tensors that modules share are written once; ``load_weights`` gives them back to all.

    >>> import tempfile
    >>> from tncompress.zoo import cnn4
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(cnn4(), f"{folder}/cnn4.safetensors")
    ...     load_weights(cnn4(), f"{folder}/cnn4.safetensors")
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(
            f"weights are saved as safetensors: want a path that ends in .safetensors, got {path}"
        )
    with new_file(path) as fresh:
        safetensors.torch.save_model(model, str(fresh))


def refuse_pickle(path: Path) -> None:
    """Raise ``ValueError`` where a file that should be safetensors is a pickle, or a file of ``torch.save``.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
    ...     torch.save({}, file.name)
    ...     refuse_pickle(Path(file.name))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ValueError: /tmp/....safetensors is in truth a file of torch.save, ...
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":  # the length of a safetensors header may begin like a pickle; what follows may not
        return
    kind = "a file of torch.save" if head.startswith(b"PK\x03\x04") else "a pickle"
    if kind == "a pickle" and not re.match(rb"\x80[\x00-\x05]|c[\w.]+\n[\w.]+\n|[(\]}]", head):
        return
    raise ValueError(
        f"{path} is in truth {kind}, which could run any code and is not loaded: want a safetensors file, as "
        "save_weights and tnc.save write it"
    )


def _read_safetensors(path: Path) -> Any:
    refuse_pickle(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({one_line(error)}): fetch or save it again"
        ) from error


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is open-ended
        if isinstance(error, PermissionError | MemoryError):
            raise
        refused = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        if refused and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds a pickled {refused[1]}, which could run any code and is not loaded: save "
                "model.state_dict() instead, or use save_weights"
            ) from error
        raise ValueError(f"{path} is damaged, or no file of torch.save: fetch or save it again") from error


def _state_dict_in(content: Any, path: Path) -> dict[str, Any]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a state dict (name -> tensor)")
    return dict(content)


def _without_prefix(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` without the wrappers' prefixes that all its keys have and not all of the model's."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fill_tied(state: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Add the names left out of ``state`` for tensors that it holds under another of the model's names."""
    names: dict[int, list[str]] = {}
    for key, value in own.items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(key)
    for same in names.values():
        if present := [key for key in same if key in state]:
            state.update({key: state[present[0]] for key in same if key not in state})


def _misfit(state: Mapping[str, Any], own: Mapping[str, Tensor], error: RuntimeError) -> str:
    def some(keys: list[str]) -> str:
        return ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")

    found, parts = {key: getattr(value, "shape", None) for key, value in state.items()}, []
    if missing := [key for key in own if key not in state]:
        parts.append(f"{len(missing)} keys missing ({some(missing)})")
    if unexpected := [key for key in state if key not in own]:
        parts.append(f"{len(unexpected)} unexpected ({some(unexpected)})")
    shapes = [
        f"{key} {tuple(found[key] or ())} for {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and found[key] != value.shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({some(shapes)})")
    return "; ".join(parts) or " ".join(str(error).split())
