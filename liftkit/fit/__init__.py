"""Fitting a lift: what is fitted, streaming second moments of (latent, pixel) token pairs, and what can be read from them.

It imports from models and below, and knows nothing of report beside it. Read ``procrustes.py`` first, then ``engine.py``.
"""
