"""One folder per paper, which the rest of the package reads only through `vit_jax_zoo.registry`."""
