"""Everyone else's formats, and adapters of ours: the authors' adapters, latent LoRAs, single files, merging and export.

It imports from conversion and below; finetune and cli import it. Read ``adapters.py`` first, then ``lora.py``.
"""
