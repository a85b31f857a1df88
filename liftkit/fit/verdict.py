"""A verdict in words, from stated bounds. docs/report.md says which runs they were derived from."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

Level = Literal["good", "usable", "poor"]


@dataclass(frozen=True)
class Threshold:
    """One figure's bounds: from ``good`` on it is good, below ``poor`` it is poor, between the two usable.

    Args:
        figure: its name in the report; the more, the better.
        good, poor: the bounds.
        meaning: what the figure is, a few words.
        weak: a sentence for a figure that is not good, in the named values of :func:`_values`.
        bound: the good values in words.
    """

    figure: str
    good: float
    poor: float
    meaning: str
    weak: str
    bound: str

    def level(self, value: float) -> Level:
        """Where a value stands; one that is not finite is poor."""
        if not isfinite(value) or value < self.poor:
            return "poor"
        return "good" if value >= self.good else "usable"


KEPT = Threshold(
    "alignment_kept",
    0.97,
    0.85,
    "alignment that a fit on half of the images keeps on the other half",
    "{few}: two halves keep {kept} of each other's alignment",
    "above 0.97",
)
THRESHOLDS = (
    Threshold(
        "r2_pixels_linear", 0.70, 0.40, "pixel variance that any linear map of the latents explains",
        "The latents say little about their pixels: a linear map explains {linear} of the pixel variance", "above 70%",
    ),
    Threshold(
        "cosine", 0.50, 0.20, "mean cosine of A^T x and z",
        "One rotation fits the latents loosely: projected pixels and latents have a cosine of {cosine:.2f}, "
        "chance gives {cosine_chance:.2f}", "above 0.5",
    ),
    KEPT,
    Threshold(
        "vae_psnr", 22.0, 17.0, "dB between images and their way through the VAE",
        "The VAE renders these images poorly: {vae_psnr:.1f} dB", "above 22 dB",
    ),
    Threshold(
        "pixel_detail", 0.05, 0.005, "share of pixel variance inside patches",
        "The images are flat: {pixel_detail:.1%} of their variance is inside patches", "above 5%",
    ),
    Threshold(
        "latent_size", 0.75, 0.40, "root mean square of the latents, or its inverse: 1 is what flow models expect",
        "The latents are {sized} than models expect: their root mean square is {rms:.2f}", "0.75 to 1.33",
    ),
    Threshold(
        "channel_balance", 0.25, 0.05, "standard deviation of the oddest latent channel over the median, or its inverse",
        "Latent channel {channel} {varies}: its standard deviation is {channel_std:.3g}, the median {median_std:.3g}",
        "within a factor of 4",
    ),
)  # fmt: skip
PATCH_BORDERS = 1.25
LIFT_EXPLAINS = 0.90


def verdict(report: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What to expect of a lift.

    Args:
        report: with ``figures``, ``channels``, ``images`` and ``pictures`` as
            :func:`liftkit.fit.alignment.alignment` and the gallery give them.
        without: figures that say nothing about this kind of fit.

    Returns:
        ``level`` (good, usable or poor: the worst of its reasons), ``text`` in full sentences with every bound beside
        its figure, ``reasons`` (figure, value, level, bounds and meaning of each threshold), ``mend`` (what finetuning
        will have to mend) and ``advice`` (each cause that fits and what to do about it).
    """
    values = _values(report)
    levels = {
        each.figure: each.level(values[each.figure])
        for each in THRESHOLDS
        if each.figure in values and each.figure not in without
    }
    level: Level = "poor" if "poor" in levels.values() else "usable" if "usable" in levels.values() else "good"
    reasons = [
        {
            "figure": each.figure,
            "good": each.good,
            "poor": each.poor,
            "meaning": each.meaning,
            # JSON has no NaN.
            "value": values[each.figure] if isfinite(values[each.figure]) else None,
            "level": levels[each.figure],
        }
        for each in THRESHOLDS
        if each.figure in levels
    ]
    # Where latents and pixels do not belong together, halves of the images do not agree, however many they are.
    chance = any(
        levels[figure] == "poor" and not _only_held_out(report, figure) for figure in ("r2_pixels_linear", "cosine")
    )
    values["few"] = "The fit is chance" if chance else "Too few images, or too much alike"
    weak = [each for each in THRESHOLDS if levels.get(each.figure, "good") != "good"]
    mend = _mend(report, values)
    sentences = [_sentence(each, values) for each in weak] or ["The latents fit well"]
    if mend and level != "poor":
        sentences.append(f"Finetuning has to mend {'; '.join(mend)}")
    return {
        "level": level,
        "text": " ".join(f"{each}." for each in (level.capitalize(), *sentences)),
        "reasons": reasons,
        "mend": mend,
        "advice": _advice({each.figure for each in weak}, chance, levels, report),
    }


def share(r2: float) -> str:
    """A share of variance in words: an R^2 below 0 explains none of it."""
    return f"{r2:.0%}" if r2 > 0 else "none"


def _values(report: dict[str, Any]) -> dict[str, Any]:
    """What bounds and sentences speak of, by name."""
    values: dict[str, Any] = {name: entry["value"] for name, entry in report["figures"].items()}
    if report.get("pictures"):
        values["vae_psnr"] = report["pictures"]["psnr"]["vae"]
    spreads = report["channels"]["latents_std"]
    median = sorted(spreads)[len(spreads) // 2]
    balances = [_balance(each, median) for each in spreads]
    odd = balances.index(min(balances))
    return values | {
        "linear": share(values["r2_pixels_linear"]),
        "kept": f"{values['alignment_kept']:.2f}" if values["alignment_kept"] > 0 else "nothing",
        "rms": values["latent_rms"],
        "sized": "larger" if values["latent_rms"] > 1 else "smaller",
        "latent_size": _balance(values["latent_rms"], 1.0),
        "channel_balance": balances[odd],
        "channel": odd,
        "channel_std": spreads[odd],
        "median_std": median,
        "varies": "hardly varies" if spreads[odd] < median else "varies far more than the others",
    }


def _balance(value: float, expected: float) -> float:
    """How near two sizes are, in [0, 1]: 1 where they are equal, 0 where one of them is nothing; NaN stays NaN."""
    low, high = (value, expected) if value < expected else (expected, value)
    return low / high if high else 1.0


def _sentence(threshold: Threshold, values: dict[str, Any]) -> str:
    if not isfinite(values[threshold.figure]):
        return f"Not a finite number: {threshold.meaning}"
    return f"{threshold.weak.format(**values)} (good: {threshold.bound})"


def _only_held_out(report: dict[str, Any], figure: str) -> bool:
    """Whether a figure is weak only on images that the fit did not see: more images are the remedy, nothing else."""
    threshold = next(each for each in THRESHOLDS if each.figure == figure)
    entry = report["figures"].get(figure)
    return figure != KEPT.figure and entry is not None and threshold.level(entry["fitted"]) == "good"


def _advice(weak: set[str], chance: bool, levels: dict[str, Level], report: dict[str, Any]) -> list[str]:
    """Each cause that fits the figures that are not good, with what to do, once."""
    few = {figure for figure in weak if _only_held_out(report, figure)} | weak & {"alignment_kept"}
    weak = weak - few
    broken = "r2_pixels_linear" in weak
    result = []
    if broken:
        result += [
            "The VAE may not be the one that the model was trained with, or its weights are damaged: compare vae/ with "
            "the model's original.",
            "Latents of this kind may be far from pixels, as those of representation autoencoders are: a linear lift "
            "will not carry them.",
        ]
    if "latent_size" in weak and not broken:
        result.append(
            "The normalization of the latents may not be the model's own: compare vae/ with the model's original. "
            "Images without contrast have small latents, too."
        )
    if "pixel_detail" in weak:
        result.append("Fit on images with detail, such as photographs.")
    if "vae_psnr" in weak and not broken:
        result.append(
            "Your images may be unlike what this VAE was trained on: fit on images like those that the model paints. "
            "If they are alike, the VAE is not the model's own, or its weights are damaged."
        )
    if "cosine" in weak and not broken:
        result.append(
            "The latents may mix pixels in a way that no rotation undoes; those of FLUX.2 (cosine 0.33) do, and "
            "finetuning makes up for it."
            if levels["cosine"] == "usable"
            else "The basis is not that of these pairs of images and latents: fit it again, or try another --kind."
        )
    if few and not chance:
        result.append(f"Use more images, or more varied ones, than these {report['images']}.")
    if "channel_balance" in weak:
        result.append(
            "A latent channel far from the others comes of images without color or contrast, or of VAE weights that "
            "are damaged: try varied photographs first."
        )
    return result


def _mend(report: dict[str, Any], values: dict[str, Any]) -> list[str]:
    result = []
    if values["r2_pixels"] < LIFT_EXPLAINS:
        lift = share(values["r2_pixels"])
        result.append(
            f"color and contrast: the lift alone explains {lift} of pixel variance, a linear map {values['linear']}"
        )
    ratios = report["pictures"]["patch_grid"] if report.get("pictures") else None
    if ratios and ratios["lift"] > PATCH_BORDERS:
        result.append(
            f"patch borders: the lift's are {ratios['lift']:.1f} x as strong as inside patches, the VAE's {ratios['vae']:.1f} x"
        )
    return result
