"""Evaluation: samples of models from the same noise, figures without downloads, controls and the page that compares.

It imports from fit, report, models and below, and knows nothing of conversion beside it.
Read ``compare.py`` first, then ``figures.py``.
"""
