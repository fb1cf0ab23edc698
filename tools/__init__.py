"""Thin command lines in front of the two halves, and the leaf modules that both halves share: see README.md."""
