"""Data: pictures, captions, shards, their caches and their order, and the embedded demonstration data.

It imports from checkpoint and the ground; it knows no model. Read ``images.py`` first, then ``training.py``.
"""
