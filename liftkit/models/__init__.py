"""Models: pixel twins of diffusers' flow transformers, their autoencoders and schedulers, the surgery and the loading.

It imports from data, lift, checkpoint and the ground. Read ``spec.py`` first, then ``mixin.py`` and ``surgery.py``.
"""

GROUP = "liftkit.architectures"
"""The group of entry points by which packages add architectures."""
