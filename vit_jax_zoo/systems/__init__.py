"""One folder a paper. The rest of the package finds them through `vit_jax_zoo.registry` alone."""
