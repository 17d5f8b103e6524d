"""What a model's features are worth on other data: the suites of the transfer papers.

`python -m vit_jax_zoo.transfer --help` says which there are; `__main__.py` is the command.
"""
