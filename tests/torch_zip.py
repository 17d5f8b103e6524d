"""Reads a `.pth` fixture without PyTorch: a zip of raw storages and a pickle that names them.

For the fixtures of this repository's tests alone; the package reads users' files with PyTorch.
"""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np

TYPES = {"FloatStorage": np.float32, "LongStorage": np.int64, "DoubleStorage": np.float64}


def _tensor(storage, offset, size, stride, *_):
  stride = tuple(step * storage.itemsize for step in stride)
  return np.lib.stride_tricks.as_strided(storage[offset:], size, stride).copy()


class _Reader(pickle.Unpickler):
  def __init__(self, archive, root):
    super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
    self.archive, self.root = archive, root

  def find_class(self, module, name):
    if name == "_rebuild_tensor_v2":
      return _tensor
    if name == "OrderedDict":
      return OrderedDict
    if module == "torch":
      return TYPES[name]
    raise pickle.UnpicklingError(f"{module}.{name} is no part of a state dict")

  def persistent_load(self, saved):
    _, dtype, key, _, _ = saved
    return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), dtype)


def read_pth(path):
  """Returns the state dict as numpy arrays by key."""
  with zipfile.ZipFile(path) as archive:
    root = archive.namelist()[0].split("/")[0]
    return dict(_Reader(archive, root).load())
