"""Conversion: plan what would happen, rewrite the two projections, write the folder, prove the result, and verify folders.

It imports from fit, report, models and below, and knows nothing of evaluate beside it. Read ``execute.py`` first, then ``plan.py``.
"""
