"""Interpretability: the result of a model's `explain`, which `figures.interpretability` draws.

    explain(variables, intermediates, image_size) -> Explanation

is an optional method of models. It is traced and reduces `intermediates`, the sown arrays of a
batch of images, such as whole attention maps, to small arrays.
"""

from collections.abc import Mapping
from typing import Any

from flax import struct


@struct.dataclass
class Explanation:
  """Arrays to draw. Parts that a model does not have are None or empty.

  Attributes:
    looked_at: float32 [b gh gw], attention rollout from the head's input to each patch.
    heads: float32 [b l heads gh gw], attention of the head's token, by layer and head.
    distances: float32 [l heads], mean attention distance in pixels, over the batch.
    lambdas: layer name -> float32 [b h w], norms of the positions' lambdas.
    positions: float32 [gh*gw d], position embeddings of the patches.
    filters: [kh kw c n], the kernel of the first layer.
    viewer: name of the query in `looked_at` and `heads`.
    principal: draws the filters' principal components, as in the ViT paper.
    grid: height and width in patches; (0, 0) of models without patches.
  """

  looked_at: Any = None
  heads: Any = None
  distances: Any = None
  lambdas: Mapping[str, Any] = struct.field(default_factory=dict)
  positions: Any = None
  filters: Any = None
  viewer: str = struct.field(pytree_node=False, default="")
  principal: bool = struct.field(pytree_node=False, default=False)
  grid: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
