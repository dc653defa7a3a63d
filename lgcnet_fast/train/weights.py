"""Network weights as safetensors files: what one stage hands to the next."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lgcnet_fast.errors import RunError
from lgcnet_fast.files import replacing
from lgcnet_fast.train.run import rerun


def save_weights(network: nn.Module, path: Path) -> None:
    """The state dictionary of `network`, as contiguous CPU tensors; atomic."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_weights(network: nn.Module, path: Path) -> None:
    """Raises `RunError` if the file is missing, damaged or of another network."""
    if not path.exists():
        raise RunError(f"{path}: missing; {rerun(path.parent)}")
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}); {rerun(path.parent)}") from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first_fault = str(error).splitlines()[1].strip()
        raise RunError(
            f"{path}: belongs to another network ({first_fault}); {rerun(path.parent)}"
        ) from None
