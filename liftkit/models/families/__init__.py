"""The architectures that liftkit knows, one file for each family: a docstring that says what is special, and its entries.

Every :class:`liftkit.models.spec.Architecture` that a module here holds is registered; no list has to be kept. Modules import
neither diffusers nor each other's private names.
"""
