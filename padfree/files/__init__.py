"""Weights, checkpoints and the sources of networks; files appear whole or not at all."""
