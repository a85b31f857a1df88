"""Pixel twins of diffusers' flow transformers: what an architecture is, and the classes made from it."""
