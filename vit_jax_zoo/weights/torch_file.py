"""Reads and writes PyTorch files (.pth, .pt, .bin); the only module that imports PyTorch.

They are pickles, which may contain code. PyTorch's `weights_only` reader builds tensors and plain
containers only: other files are refused, and no code is executed.
"""

import argparse
import contextlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vit_jax_zoo.weights.key_map import Flat, WeightsError

EMA_WRAPPERS = ("state_dict_ema", "model_ema")
WRAPPERS = (*EMA_WRAPPERS, "model", "state_dict", "model_state_dict", "net", "params")
"""Keys of the state dict in training checkpoints, in timm's order of preference."""


def read_torch(path: str) -> Flat:
  """Returns the state dict of a PyTorch file, as numpy arrays by key.

  16-bit floats become float32. Of a training checkpoint only the model is read: its moving average
  if there is one, as timm does.

  Args:
    path: of the file; local or `gs://bucket/...`.

  Raises:
    ImportError: PyTorch is not installed.
    WeightsError: one line: the file is missing, truncated or no PyTorch file, contains code, or has
      no state dict.
  """
  try:
    import torch  # pyrefly: ignore[missing-import]
  except ImportError:
    raise ImportError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install -e '.[torch]' "
      "(the CPU version suffices), or convert the file to safetensors"
    ) from None
  with _local(path) as file:
    found = _load(torch, file, path)
  return {key: _as_numpy(torch, tensor) for key, tensor in _state_dict(torch, found, path).items()}


def _load(torch: Any, file: str, path: str) -> Any:
  try:
    # Namespace: the command line stored in training checkpoints; it holds plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
      return torch.load(file, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
      raise WeightsError(
        f"{path} is a pickle with code in it: it requests {wanted[1]}, which is no tensor; "
        "nothing was executed"
      ) from None
    raise WeightsError(f"{path} cannot be read: it is truncated, or no PyTorch file") from None
  except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WeightsError(
      f"{path} cannot be read: it is truncated, or no PyTorch file ({reason})"
    ) from None


def _state_dict(torch: Any, found: Any, path: str) -> Mapping[str, Any]:
  candidates = {"": found}
  if isinstance(found, Mapping):
    candidates |= {key: found[key] for key in WRAPPERS if key in found}
  for name, candidate in candidates.items():
    is_mapping = isinstance(candidate, Mapping) and candidate
    if is_mapping and all(isinstance(value, torch.Tensor) for value in candidate.values()):
      if name in EMA_WRAPPERS and len(candidates) > 2:
        logging.info("%s: reads the moving average of the weights, %r, as timm does", path, name)
      return {str(key): value for key, value in candidate.items()}
  inside = (
    ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
  )
  raise WeightsError(f"{path} holds no state dict; in it there is: {inside}")


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
  tensor = tensor.detach()
  if tensor.dtype in (torch.float16, torch.bfloat16):
    tensor = tensor.float()
  return tensor.numpy()


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
  """Yields a local copy of `path`, or the path itself if it is local."""
  if "://" not in path:
    if not epath.Path(path).exists():
      raise WeightsError(f"there is no file {path}")
    yield path
    return
  with epath.Path(path).open("rb") as remote, tempfile.NamedTemporaryFile() as copy:
    shutil.copyfileobj(remote, copy)
    copy.flush()
    yield copy.name


def write_torch(path: str, arrays: Mapping[str, np.ndarray], *, wrapper: str | None = None) -> None:
  """Writes a state dict as `torch.save` does.

  Args:
    path: of the file, local.
    arrays: by key.
    wrapper: key under which the state dict is stored, such as "model"; None: no wrapper.

  Raises:
    ImportError: PyTorch is not installed.
  """
  try:
    import torch  # pyrefly: ignore[missing-import]
  except ImportError:
    raise ImportError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install -e '.[torch]' "
      "(the CPU version suffices), or write a .safetensors file"
    ) from None
  state = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
  torch.save(state if wrapper is None else {wrapper: state}, path)
