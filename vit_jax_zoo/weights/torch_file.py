"""Reads and writes PyTorch files (.pth, .pt, .bin); the only module that imports PyTorch.

They are pickles, which may contain code. PyTorch's `weights_only` reader builds tensors and plain
containers only: other files are refused, and no code is executed.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from vit_jax_zoo.weights.key_map import Flat, WeightsError
from vit_jax_zoo.weights.torch_layouts import local_copy, write_safetensors

EMA_WRAPPERS = ("state_dict_ema", "model_ema")
WRAPPERS = (*EMA_WRAPPERS, "model", "state_dict", "model_state_dict", "net", "params")
"""Keys of the state dict in training checkpoints, in timm's order of preference."""


def read_torch(path: str) -> Flat:
  """Returns the state dict of a local or `gs://` PyTorch file, as numpy arrays by key.

  16-bit floats become float32. Of a training checkpoint only the model is read: its moving average
  if there is one, as timm does. Raises WeightsError for other files, and for those with code.
  """
  torch = _import_torch(path, "convert the file to safetensors")
  with local_copy(path) as file:
    found = _load(torch, file, path)
  half, arrays = (torch.float16, torch.bfloat16), {}
  for key, tensor in _state_dict(torch, found, path).items():
    try:
      arrays[key] = (tensor.float() if tensor.dtype in half else tensor).detach().numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, 8 bits, without data
      raise WeightsError(f"{path}: {key} is not a dense array of numbers ({error})") from None
  return arrays


def _import_torch(path: str, otherwise: str) -> Any:
  try:
    import torch  # pyrefly: ignore[missing-import]
  except ImportError:
    raise ImportError(
      f"{path} is a PyTorch file, and PyTorch is not installed; pip install -e '.[torch]' "
      f"(the CPU version suffices), or {otherwise}"
    ) from None
  return torch


def _load(torch: Any, file: str, path: str) -> Any:
  try:
    # Namespace: the command line stored in training checkpoints; it holds plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
      return torch.load(file, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    # Only the message names the code in files of PyTorch's legacy format, before version 1.6.
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
      wrong = f"{path}: a pickle with code ({code[1]}), which was not executed"
      raise WeightsError(f"{wrong}; expected tensors only") from None
    raise WeightsError(f"{path}: truncated; expected a PyTorch file") from None
  except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WeightsError(f"{path}: truncated ({reason}); expected a PyTorch file") from None


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
  keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else ""
  raise WeightsError(f"{path}: {type(found).__name__} of {keys}; expected a state dict")


def write_state_dict(path: str, arrays: Flat, *, wrapper: str | None = None) -> None:
  """Writes `.safetensors`, else a local PyTorch file, with its arrays under the key `wrapper`."""
  if path.endswith(".safetensors"):
    write_safetensors(path, arrays)
    return
  torch = _import_torch(path, "write a .safetensors file")
  state = {key: torch.from_numpy(np.array(array, order="C")) for key, array in arrays.items()}
  torch.save(state if wrapper is None else {wrapper: state}, path)
