"""Pickles of numpy arrays by name, as Detectron published Caffe's ResNets: `R-50.pkl`.

A pickle may hold code. Here nothing but numpy's own parts of an array is built; a file that asks
for more is refused, and nothing of it runs.
"""

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax_zoo.weights.table import Flat, WeightsError

_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_NAMES = ("ndarray", "dtype", "_reconstruct")
_WRAPPERS = ("blobs", "model", "state_dict")
"""Where the arrays stand, if they do not stand alone."""


class _Reader(pickle.Unpickler):
  """Builds arrays, numbers, texts and containers."""

  def find_class(self, module_name: str, global_name: str) -> Any:
    """Returns one of numpy's parts of an array."""
    if module_name in _MODULES and global_name in _NAMES:
      owner = np if module_name == "numpy" else np._core.multiarray
      return getattr(owner, global_name)
    if (module_name, global_name) == ("_codecs", "encode"):  # bytes, as Python 3 wrote protocol 2
      return _encode
    raise WeightsError(f"{module_name}.{global_name}")


def _encode(text: str, encoding: str) -> bytes:
  return text.encode(encoding)


def read_pickle(path: str) -> Flat:
  """Returns the arrays of a pickle by name; what is no array is left out.

  Raises:
    WeightsError: one line: the file is truncated, or no pickle; it holds code; or no arrays.
  """
  try:
    with epath.Path(path).open("rb") as stream:
      found = _Reader(stream, encoding="latin1").load()
  except WeightsError as error:
    raise WeightsError(
      f"{path} is a pickle with code in it: it asks for {error}, which is no array; nothing of it "
      "was run"
    ) from None
  except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
    raise WeightsError(f"{path} cannot be read: it is truncated, or no pickle ({error})") from None
  candidates = [found, *(found.get(key) for key in _WRAPPERS if isinstance(found, Mapping))]
  for candidate in candidates:
    if isinstance(candidate, Mapping):
      arrays = {str(k): v for k, v in candidate.items() if isinstance(v, np.ndarray)}
      if arrays:
        return arrays
  raise WeightsError(f"{path} is a pickle without arrays by name")
