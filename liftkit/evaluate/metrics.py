"""Figures as papers print them, by pretrained networks: ``liftkit compare --metrics``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.evaluate.batches import batches
from liftkit.evaluate.cache import remembered, tensor_digest
from liftkit.evaluate.distances import SUBSET, SUBSETS, clip_discrepancy, kernel_distance
from liftkit.evaluate.eyes import EYES, Look, read_texts
from liftkit.evaluate.figures import ENOUGH
from liftkit.evaluate.patches import frechet, gaussian
from liftkit.progress import Observer

DEFINITIONS = 1
"""Raised when a definition changes, so that no kept value of an older one is taken."""
NUMBERS = 2**22
"""Of images in one batch."""


@dataclass(frozen=True)
class Metric:
    """A published figure.

    Args:
        eye: the network's name in :data:`liftkit.evaluate.eyes.EYES`.
        definition: what it is, for people.
        value: from the features of images (n, d) and of what they are compared with.
        against: the reference images (m, d), or the prompts' embeddings (n, d).
        least: images below which it is not given.
    """

    eye: str
    definition: str
    value: Callable[[Tensor, Tensor], float]
    against: str = "reference"
    least: int = 2


def _frechet(features: Tensor, reference: Tensor) -> float:
    return frechet(gaussian(features), gaussian(reference))


def _kid(features: Tensor, reference: Tensor) -> float:
    return 1000.0 * kernel_distance(features, reference)


def _score(features: Tensor, texts: Tensor) -> float:
    return 100.0 * max((features * texts).sum(dim=1).mean().item(), 0.0)


FRECHET = "Frechet distance of normal distributions, covariances over n - 1, biased up for few images"
METRICS = {
    "fid": Metric("inception", FRECHET, _frechet, least=ENOUGH),
    "fid-tf": Metric(
        "inception-tensorflow", f"{FRECHET}; as torch-fidelity and ADM's evaluation resize", _frechet, least=ENOUGH
    ),
    "kid": Metric(
        "inception",
        f"unbiased squared MMD of the kernel (x y / d + 1)^3, mean of {SUBSETS} subsets of {SUBSET} images, or as many as "
        "there are, x 1000",
        _kid,
    ),
    "fd-dinov2": Metric("dinov2", FRECHET, _frechet, least=ENOUGH),
    "cmmd": Metric("clip-336", "squared MMD of a Gaussian kernel, sigma 10, x 1000", clip_discrepancy),
    "clip": Metric(
        "clip", "CLIP score: 100 times the mean cosine of image and prompt, not below 0", _score, "prompts", least=1
    ),
}
"""By name, which is that of its row in :data:`liftkit.evaluate.figures.FIGURES` too."""


@dataclass(frozen=True)
class Value:
    """One figure of a set of images."""

    value: float


@dataclass(frozen=True)
class Chosen:
    """The metrics that were asked for.

    Args:
        weights: file or folder of the network of each that can be given, by name.
        missing: one line for each that cannot.
    """

    weights: Mapping[str, Path]
    missing: Mapping[str, str]


def choose(names: Sequence[str], count: int) -> Chosen:
    """Find the networks of some metrics.

    Args:
        names: in any order; each counts once.
        count: images of each row.

    Raises:
        UsageError: if a metric is not known, or the weights of one are not those of its network.
    """
    weights, missing = {}, {}
    for name in dict.fromkeys(names):
        metric = METRICS.get(name)
        if metric is None:
            near = difflib.get_close_matches(name.lower(), METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
            raise UsageError(f"--metrics {name}: no such metric; {hint}")
        eye = EYES[metric.eye]
        path = eye.find()
        if path is None:
            missing[name] = f"{name}: left out: {eye.missing()}"
        elif count < metric.least:
            missing[name] = f"{name}: left out: {count} samples, {metric.least} are needed"
        else:
            eye.check(path)
            weights[name] = path
    return Chosen(weights, missing)


def measure(
    chosen: Chosen,
    rows: Mapping[str, Tensor],
    reference: Tensor,
    prompts: Sequence[str],
    folder: Path,
    device: str,
    observer: Observer,
) -> dict[str, dict[str, float]]:
    """The metrics of sets of images, one network at a time.

    Args:
        chosen: see :func:`choose`.
        rows: images of each row, uint8 (n, 3, S, S), by key.
        reference: real images, uint8 (m, 3, S, S).
        prompts: n, one for each image of every row.
        folder: keeps values that were taken.
        device: to compute on.
        observer: shows the progress.

    Returns:
        By row, values by metric.
    """
    found: dict[str, dict[str, float]] = {key: {} for key in rows}
    digests = {key: tensor_digest(images) for key, images in rows.items()}
    for eye in dict.fromkeys(METRICS[name].eye for name in chosen.weights):
        names = [name for name in chosen.weights if METRICS[name].eye == eye]
        path = chosen.weights[names[0]]
        look = cache(partial(EYES[eye].open, path, device))
        against = {
            "reference": cache(partial(_seen, look, reference, device)),
            "prompts": cache(partial(read_texts, path, prompts, device)),
        }
        origin = {"eye": eye, "weights": EYES[eye].digest(path), "definitions": DEFINITIONS}
        origin |= {"reference": tensor_digest(reference), "prompts": list(prompts)}
        with observer.stage(f"figures by {', '.join(names)}", len(rows), "rows") as advance:
            for key, images in rows.items():
                features = cache(partial(_seen, look, images, device))
                for name in names:
                    metric = METRICS[name]
                    make = partial(_valued, metric, features, against[metric.against])
                    kept = {**origin, "metric": name, "images": digests[key]}
                    found[key][name] = remembered(folder, kept, Value, make).value
                advance(1)
    return found


def described(chosen: Chosen, count: int, reference: int) -> dict[str, dict[str, Any]]:
    """What the metrics are, as plain data: definition, network, weights and numbers of images, or why one is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name, path in chosen.weights.items():
        metric, eye = METRICS[name], EYES[METRICS[name].eye]
        found[name] = {
            "definition": metric.definition,
            "network": eye.title,
            "weights": path.name if not eye.files else eye.place,
            "sha256": eye.digest(path),
            "images": count,
            "against": f"{reference} real images" if metric.against == "reference" else "their prompts",
        }
    return found | {name: {"left_out": line} for name, line in chosen.missing.items()}


def words(about: Mapping[str, Any]) -> str:
    """A metric that :func:`described` describes, on one line."""
    return f"{about['definition']}; {about['network']}; {about['images']} images against {about['against']}"


def _valued(metric: Metric, features: Callable[[], Tensor], against: Callable[[], Tensor]) -> Value:
    return Value(metric.value(features(), against()))


@torch.no_grad()
def _seen(look: Callable[[], Look], images: Tensor, device: str) -> Tensor:
    """Features of images (n, 3, S, S), float32 (n, d), on the CPU."""
    return torch.cat([look()(part.to(device)).float().cpu() for part in batches(images, NUMBERS)])
