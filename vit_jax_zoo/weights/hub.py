"""From a name to a file: what is already on this machine, and what is to be downloaded."""

from etils import epath

from vit_jax_zoo.weights import tf_bundle


def resolve(name: str) -> str:
  """Returns the local path, or `gs://` path, that `name` stands for.

  Raises:
    ValueError: there is nothing of that name.
  """
  if epath.Path(name).exists() or tf_bundle.find_prefix(name):
    return name
  raise ValueError(f"there is no checkpoint at {name}")
