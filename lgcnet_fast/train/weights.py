"""Network weights as safetensors files: what one stage hands to the next."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from lgcnet_fast.files import replacing


def save_weights(network: nn.Module, path: Path) -> None:
    """The state dictionary of `network`, as contiguous CPU tensors; atomic."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
