"""Symbols of the pages: what they mean, and how they are set, the same way everywhere."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "x, x_0": "a pixel token, D numbers in a color space; without noise",
    "z, z_0": "a latent token, r numbers, normalized as the transformer was trained on them",
    "eps": "standard normal noise",
    "sigma": "noise level of the pixel model, 0 (clean) to 1 (pure noise)",
    "tau": "noise level that the network is given, `k sigma`",
    "k": "gain of the input, `1 / (s + (1 - s) sigma)`",
    "A": "basis of the subspace, D x r, orthonormal columns",
    "s": "scale of the lift: pixels are `s A z`",
    "lift": "A and s together, with the color space",
    "token, patch": "one patch of the image, as a row of numbers; its pixels",
    "tied noise": "noise eps for the pixel model and `A^T eps` for the latent model, so that both start alike",
    "guidance": "sampling with `u + g (c - u)` from a conditional and an unconditional prediction",
}
"""Symbols and words of the pages, as the glossary in docs/how-it-works.md has them."""
_MEANINGS = {name: meaning for names, meaning in GLOSSARY.items() for name in names.split(", ")}


def symbols(text: str) -> Markup:
    """A text as markup: expressions between backticks are set as formulas, and a tap on one says what its symbols mean."""
    parts = text.split("`")
    return Markup("").join(_formula(part) if index % 2 else escape(part) for index, part in enumerate(parts))


def _formula(expression: str) -> Markup:
    names = dict.fromkeys(re.findall(r"[A-Za-z]\w*", expression))
    meanings = [
        Markup("<b>{}</b>: {}").format(formula(name), formula(_MEANINGS[name])) for name in names if name in _MEANINGS
    ]
    if not meanings:
        return formula(expression)
    about = Markup("<br>").join(meanings)
    box = '<label class="term"><input type="checkbox"><dfn>{}</dfn><span>{}</span></label>'
    return Markup(box).format(formula(expression), about)


def formula(text: str) -> Markup:
    """A text with powers raised and indices lowered; backticks go."""
    raised = re.sub(r"\^(\w+)", r"<sup>\1</sup>", str(escape(text.replace("`", ""))))
    return Markup(re.sub(r"_(\w+)", r"<sub>\1</sub>", raised))
