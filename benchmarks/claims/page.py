"""Writes docs/evidence/claims.md and its plots from the results files, without training."""

from benchmarks.claims import common

if __name__ == "__main__":
  common.write_page(common.ROOT)
