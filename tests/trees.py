"""Trees of arrays as flat dicts."""

import jax


def flatten_paths(tree):
  """Returns the leaves of any tree by "/"-joined path, in the order of `jax.tree.leaves`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
