"""Arrays of a pretrained net from a safetensors file."""

from pathlib import Path

import numpy as np

from jaxpapers.data import files

CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('x.pth', weights_only=True), 'x.safetensors')\""
)


def arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file; for a checkpoint of torch the message has the
        command that converts it.
    """
    from safetensors.numpy import load_file

    path, _ = files.check(path)
    with files.parsing(
        path, f"not a safetensors file; one of torch becomes one by\n  {CONVERT}\n"
    ):
        return load_file(path)
