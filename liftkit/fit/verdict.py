"""A verdict in words, from stated thresholds. docs/report.md says which runs they were derived from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["good", "usable", "poor"]


@dataclass(frozen=True)
class Threshold:
    """One figure's bounds: at least ``good`` (or at most, where smaller is better) is good, beyond ``poor`` is poor.

    Args:
        figure: its name in the report.
        good, poor: the bounds.
        meaning: what the figure says.
        advice: what to try when it is not good.
    """

    figure: str
    good: float
    poor: float
    meaning: str
    advice: str

    def level(self, value: float) -> Level:
        """Where a value stands."""
        sign = 1.0 if self.good > self.poor else -1.0
        if sign * value >= sign * self.good:
            return "good"
        return "poor" if sign * value < sign * self.poor else "usable"


THRESHOLDS = (
    Threshold(
        "r2_pixels_linear", 0.70, 0.40, "pixel variance that any linear map of the latents explains",
        "these latents are far from pixels: check that the VAE is the model's own; a linear lift may not do for it",
    ),
    Threshold(
        "r2_latents", 0.50, 0.25, "latent variance that pixels explain linearly",
        "check that the VAE is the model's own and that its normalisation is the pipeline's",
    ),
    Threshold(
        "cosine", 0.60, 0.35, "mean alignment of A^T x and z",
        "try another --color or --kind",
    ),
    Threshold(
        "energy_captured", 0.90, 0.70, "pixel energy inside the subspace",
        "fit on images like those to be painted; try --kind pca",
    ),
    Threshold(
        "halves_lift", 10.0, 30.0, "degrees between fits on two halves of the images",
        "use more images, or more varied ones",
    ),
    Threshold(
        "vae_psnr", 22.0, 17.0, "dB between images and their way through the VAE",
        "check that the VAE is the model's own, with its own normalisation",
    ),
)  # fmt: skip
MENDS = (
    (
        "r2_pixels",
        0.90,
        "colour and contrast: the lift explains {value:.0%} of pixel variance, a linear map {ceiling:.0%}",
    ),
    (
        "patch_grid",
        1.25,
        "patch borders: the lift's are {value:.1f} x as strong as inside patches, the VAE's {vae:.1f} x",
    ),
)


def verdict(report: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What to expect of a lift.

    Args:
        report: with ``figures``, ``angles`` and ``pictures`` as :func:`liftkit.fit.alignment.alignment` and the gallery
            give them.
        without: figures that say nothing about this kind of fit.

    Returns:
        ``level`` (good, usable or poor: the worst of its reasons), ``text`` in one sentence, ``reasons`` (figure, value,
        level and meaning of each threshold), ``mend`` (what finetuning will have to mend) and ``advice``.
    """
    values = {name: entry["value"] for name, entry in report["figures"].items()}
    values["halves_lift"] = report["angles"]["halves_lift"]
    if report.get("pictures"):
        values["vae_psnr"] = report["pictures"]["psnr"]["vae"]
    reasons = []
    for threshold in THRESHOLDS:
        if threshold.figure not in values or threshold.figure in without:
            continue
        value = values[threshold.figure]
        reasons.append({**asdict(threshold), "value": value, "level": threshold.level(value)})
    levels = [reason["level"] for reason in reasons]
    level: Level = "poor" if "poor" in levels else "usable" if "usable" in levels else "good"
    weak = [reason for reason in reasons if reason["level"] != "good"]
    mend = _mend(report, values)
    return {
        "level": level,
        "text": _text(level, weak, mend),
        "reasons": reasons,
        "mend": mend,
        "advice": list(dict.fromkeys(reason["advice"] for reason in weak if not _for_want_of_images(reason, report))),
    }


def _for_want_of_images(reason: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether a figure is weak only on images that the fit did not see: more images are the remedy, nothing else."""
    threshold = next(each for each in THRESHOLDS if each.figure == reason["figure"])
    entry = report["figures"].get(threshold.figure)
    return entry is not None and threshold.level(entry["fitted"]) == "good"


def _mend(report: dict[str, Any], values: dict[str, float]) -> list[str]:
    result = []
    name, bound, sentence = MENDS[0]
    if values[name] < bound:
        result.append(sentence.format(value=max(values[name], 0.0), ceiling=values["r2_pixels_linear"]))
    if report.get("pictures"):
        name, bound, sentence = MENDS[1]
        ratios = report["pictures"][name]
        if ratios["lift"] > bound:
            result.append(sentence.format(value=ratios["lift"], vae=ratios["vae"]))
    return result


def _text(level: Level, weak: list[dict[str, Any]], mend: list[str]) -> str:
    because = "; ".join(f"{reason['meaning']}: {reason['value']:.2f}" for reason in weak)
    mended = f"finetuning has to mend {'; '.join(mend)}" if mend else "little is left to mend"
    if level == "good":
        return f"good: the latents sit in pixels as a lift needs; {mended}"
    if level == "usable":
        return f"usable ({because}); {mended}"
    return f"poor: {because}"
