"""timm's LambdaResNet keys beside ours, as a table that is read row by row."""

import re

import numpy as np

_NORM = (("weight", "scale"), ("bias", "bias"))
_STATS = (("running_mean", "mean"), ("running_var", "var"))
_CONV_NORMS = {
  r"stem\.conv(\d)": r"stem/conv\1",
  r"stages\.(\d)\.(\d+)\.conv1_1x1": r"c{\1}_block\2/conv1",
  r"stages\.(\d)\.(\d+)\.conv2_kxk": r"c{\1}_block\2/conv2",
  r"stages\.(\d)\.(\d+)\.conv3_1x1": r"c{\1}_block\2/conv3",
  r"stages\.(\d)\.(\d+)\.shortcut": r"c{\1}_block\2/shortcut",
}
_NORMS = {
  **{rf"{theirs}\.bn": f"{ours}/norm" for theirs, ours in _CONV_NORMS.items()},
  r"stages\.(\d)\.(\d+)\.post_attn": r"c{\1}_block\2/lambda_norm",
  r"stages\.(\d)\.(\d+)\.self_attn\.norm_q": r"c{\1}_block\2/lambda_layer/query_norm",
  r"stages\.(\d)\.(\d+)\.self_attn\.norm_v": r"c{\1}_block\2/lambda_layer/value_norm",
}
_LAYER = r"stages\.(\d)\.(\d+)\.self_attn\."
_OURS = r"params/c{\1}_block\2/lambda_layer/"

# Published key, our path (`{n}` is n + 2: stage 0 is c2), transform.
ROWS = (
  *(
    (rf"{t}\.conv\.weight", f"params/{o}/conv/kernel", "convolution")
    for t, o in _CONV_NORMS.items()
  ),
  *((rf"{t}\.{a}", f"params/{o}/{b}", "same") for t, o in _NORMS.items() for a, b in _NORM),
  *((rf"{t}\.{a}", f"batch_stats/{o}/{b}", "same") for t, o in _NORMS.items() for a, b in _STATS),
  (_LAYER + r"qkv\.weight", _OURS + "qkv/kernel", "pointwise"),
  (_LAYER + r"qkv\.bias", _OURS + "qkv/bias", "same"),
  (_LAYER + r"conv_lambda\.weight", _OURS + "position_embedding", "scope"),
  (_LAYER + r"conv_lambda\.bias", _OURS + "position_bias", "same"),
  (_LAYER + r"pos_emb", _OURS + "position_embedding", "table"),
  (r"head\.fc\.weight", "params/head/kernel", "dense"),
  (r"head\.fc\.bias", "params/head/bias", "same"),
)
IGNORED = r".*\.num_batches_tracked"

# Name: published -> ours, ours -> published.
TRANSFORMS = {
  "same": (lambda x: x, lambda x: x),
  "dense": (lambda x: x.T, lambda x: x.T),
  "convolution": (lambda x: np.transpose(x, (2, 3, 1, 0)), lambda x: np.transpose(x, (3, 2, 0, 1))),
  "pointwise": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
  "scope": (
    lambda x: np.transpose(x[..., 0], (2, 3, 1, 0)),
    lambda x: np.transpose(x, (3, 2, 0, 1))[..., None],
  ),
  "table": (lambda x: x[:, :, None], lambda x: x[:, :, 0]),
}


def translate(key):
  """Returns our path and the transform's name for a published key; None for an ignored one."""
  if re.fullmatch(IGNORED, key):
    return None
  for pattern, ours, transform in ROWS:
    match = re.fullmatch(pattern, key)
    if match:
      path = match.expand(ours)
      return re.sub(r"\{(\d)\}", lambda m: str(int(m[1]) + 2), path), transform
  raise KeyError(f"no row for {key}")


def from_timm(weights):
  """Returns our variables for a timm state dict."""
  variables = {}
  for key, value in weights.items():
    row = translate(key)
    if row is None:
      continue
    *parents, leaf = row[0].split("/")
    node = variables
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = np.ascontiguousarray(TRANSFORMS[row[1]][0](value))
  return variables


def lookup(variables, key):
  """Returns the array that a published key names, in the published layout."""
  path, transform = translate(key)
  for part in path.split("/"):
    variables = variables[part]
  return TRANSFORMS[transform][1](np.asarray(variables))
