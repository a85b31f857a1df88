"""Files: safetensors streamed from file to file, folders that appear whole or not at all, records, locks, the Hub's cache.

It imports the small modules on the ground (errors, tally, text and figures) alone. Read ``model.py`` first, then ``folder.py``.
"""
