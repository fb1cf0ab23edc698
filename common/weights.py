"""Weights in and out, safely: checkpoints of a run, files of others, and the hub of timm.

Nothing is ever unpickled but tensors and plain values. A checkpoint of either half is a dict with `model`, the weights,
and, where they are averaged, `average`; `trainer` holds what a resumed run needs beside them.
"""

import contextlib
import pickle
import urllib.error
import urllib.request
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, first_line
from common.files import write_atomically, wrong_download

LOCAL_WEIGHTS = Path("weights")
"""Where files are looked for before a hub is asked, under the names that they have on the hub.

timm's files, which all have the same name on the hub, are named after the model instead.
"""


def local_place(url: str) -> Path:
    """Where in `weights/` a local copy of the file at a hub's address is looked for."""
    return LOCAL_WEIGHTS / url.rpartition("/")[2]


def local_file(url: str) -> Path | None:
    """The local copy in `weights/` of the file at a hub's address; None if there is none."""
    path = local_place(url)
    return path if path.is_file() else None


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint aside and renames it: `path` is always a whole file."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.pth` or `.safetensors` file to the CPU; which of them it is, its first bytes say.

    Returns:
        What was saved; a bare state dict is wrapped as `{"model": state dict}`.

    Raises:
        UserError: the file is missing, a pickle, or not readable as tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; expected a .pth or .safetensors file")
    if reason := wrong_download(path):
        raise UserError(f"{path}: {reason}")
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(f"{path}: is a pickle, which can run code when read; expected .pth or .safetensors: convert it")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if int.from_bytes(head[:8], "little") < path.stat().st_size and head[8:] == b"{":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        with path.open("rb") as file:  # by its name torch would take one for another
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: is no whole file of weights, or holds more than tensors and plain values, which is never run; "
            "expected .pth or .safetensors"
        ) from error
    except Exception as error:  # torch raises a dozen kinds for broken archives
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); expected a whole .pth or .safetensors file"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}; expected a dict of tensors")
    if "model" not in checkpoint:
        checkpoint = {"model": checkpoint.get("state_dict", checkpoint)}
    state = checkpoint["model"]
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path}: holds no weights; expected names with tensors, by themselves or under 'model'")
    return checkpoint


def read_last(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run folder, to go on from; None where there is none yet."""
    path = run / "model_last.pth"
    return read_checkpoint(path) if path.is_file() else None


def resume_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over what an optimizer remembers of its steps; its settings stay those that it was built with.

    Raises:
        UserError: with these settings the parameters are grouped differently, so that they cannot be matched.
    """
    settings = optimizer.state_dict()["param_groups"]
    if [len(own["params"]) for own in settings] != [len(saved["params"]) for saved in state["param_groups"]]:
        raise UserError(
            "the optimizer has other groups of parameters than the run began with; expected the same ones: leave the "
            "weight decay as it was, or start a new run without RESUME=1"
        )
    # A saved group also holds what the optimizer has added to it since it was built, such as its step count.
    groups = [saved | own for saved, own in zip(state["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to use of a checkpoint: the average where there is one; without a distributed wrapper's prefix."""
    state = checkpoint.get("average") or checkpoint["model"]
    return {name.removeprefix("module."): value for name, value in state.items()}


def is_finite(model: nn.Module) -> bool:
    """Whether no weight has become infinite or nan."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def load_state(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, prefix: str = "", replaceable: Collection[str] = ()
) -> list[str]:
    """Loads weights into a model, every tensor accounted for.

    BatchNorm's step counters may be absent: a frozen BatchNorm has none, nor have files of old.

    Args:
        model: filled in place.
        state: must hold every tensor of `model` below `prefix`, and no other.
        source: what the weights are called in an error.
        prefix: the part of the model that is loaded.
        replaceable: tensors, such as those of a head, that keep the model's own values where the file's are missing or
            of another shape.

    Returns:
        Names of the replaceable tensors that kept their values.

    Raises:
        UserError: tensors are missing, left over, or of another shape.
    """
    own = model.state_dict()
    kept = [name for name in replaceable if name not in state or state[name].shape != own[name].shape]
    state = {name: value for name, value in state.items() if name not in kept}
    wanted = {name for name in own if name.startswith(prefix) and not name.endswith("num_batches_tracked")}
    wrong = {
        "missing": sorted(wanted - state.keys() - set(kept)),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ),
    }
    if faults := [f"{len(names)} tensors {kind} ({names[0]}, ...)" for kind, names in wrong.items() if names]:
        raise UserError(
            f"{source}: does not fit the model: {'; '.join(faults)}; expected weights of the same network and classes"
        )
    model.load_state_dict(state, strict=False)
    return kept


def locate_weights(name: str) -> dict[str, str] | None:
    """What `timm.create_model(name, pretrained=True, pretrained_cfg_overlay=...)` needs to look in the right place.

    The hub is asked once whether it answers: without network its client would go on trying for most of a minute.

    Args:
        name: a timm model, with or without a weights tag.

    Returns:
        The file, `weights/NAME.safetensors` or `.pth` or one in the hub's cache, or None where timm should ask the hub.

    Raises:
        LookupError: timm has no ImageNet weights of this model.
        UserError: the file in `weights/` is broken.
        OSError: they are not in the cache, and the hub does not answer.
    """
    import huggingface_hub
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise LookupError(f"timm has no ImageNet weights of {name}")
    names = (LOCAL_WEIGHTS / f"{name}{suffix}" for suffix in (".safetensors", ".pth"))
    if local := next((path for path in names if path.is_file()), None):
        read_checkpoint(local)  # timm would tell of a broken one in other words
        return {"file": str(local)}
    cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, "model.safetensors") if config.hf_hub_id else None
    if isinstance(cached, str):
        return {"file": cached}
    with contextlib.suppress(urllib.error.HTTPError):  # an answer too
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    return None
