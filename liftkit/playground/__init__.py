"""A page on this machine to try models on: side by side from the same noise, step by step, down to the pixel.

``abilities`` says what a model's pipeline can do, ``shelf`` keeps models in memory while they are used, ``run`` paints with
``estimates`` of every step, ``page`` lays it out and ``serve`` serves it. Only the last two need Gradio.
"""
