"""Reports: data in, pictures and pages out that open offline.

It imports from models and below, and knows nothing of fit beside it. Read ``data.py`` first, then ``pages.py``.
"""
