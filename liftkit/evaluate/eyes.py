"""The pretrained networks that published figures look at images with: where their weights belong, and what they see.

Nothing is fetched and nothing unpickled. A network's weights are a safetensors file in the folder of :func:`home`, or in the
Hub's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.checkpoint.folder import sha256
from liftkit.checkpoint.weights import read_weights
from liftkit.evaluate.inception import SIDE, check_inception, load_inception
from liftkit.models.load import load_transformers

Look = Callable[[Tensor], Tensor]
"""From images (n, 3, H, W) in [-1, 1] to features (n, d), float32."""
WEIGHTS = "model.safetensors"
TOKENS = 77
"""Of a prompt that CLIP reads; more are cut off."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Eye:
    """A pretrained network together with how an image is made ready for it.

    Args:
        title: network, layer and resizing, for people.
        place: its file in :func:`home`, or its folder there.
        hub: its Hub id, whose cache is looked into too; empty where the Hub's files are no safetensors.
        files: that a folder has to have.
        how: what to do where it is not there, after "get it once:".
        open: makes it, on a device.
    """

    title: str
    place: str
    hub: str
    files: tuple[str, ...]
    how: str
    open: Callable[[Path, str], Look]

    def find(self) -> Path | None:
        """The file or the folder; None where it is not there, or not all of it."""
        own = home() / self.place
        if not self.files:
            return own if own.is_file() else None
        return next((path for path in (own, _cached(self.hub)) if path is not None and self._whole(path)), None)

    def _whole(self, path: Path) -> bool:
        return all((path / name).is_file() for name in self.files)

    def missing(self) -> str:
        """What to say where it is not there."""
        where = f"{home() / self.place} or the Hub's cache" if self.hub else str(home() / self.place)
        return f"{self.title}: no weights in {where}; get them once: {self.how}"

    def check(self, path: Path) -> None:
        """Raise unless the weights that were found are whole, and those of Inception its own.

        Raises:
            UsageError: naming the file, and the tensor where one is wrong.
        """
        if self.files:
            read_weights(path, "transformers")
        else:
            check_inception(path)

    def digest(self, path: Path) -> str:
        """SHA-256 of the weights."""
        return sha256(path / WEIGHTS if self.files else path)


def home() -> Path:
    """Where weights for figures belong: ``liftkit/metrics`` in the assets of Hugging Face's cache (``HF_ASSETS_CACHE``)."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "liftkit" / "metrics"


def read_texts(path: Path, texts: Sequence[str], device: str) -> Tensor:
    """CLIP's embeddings of texts, (n, d), of unit length."""
    tokenizer = load_transformers(path, "CLIPTokenizer")
    network = load_transformers(path, "CLIPTextModelWithProjection").to(device)
    found = []
    for start in range(0, len(texts), 64):
        part = list(texts[start : start + 64])
        tokens = tokenizer(part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").to(device)
        with torch.no_grad():
            found.append(network(**tokens).text_embeds.float().cpu())
    return F.normalize(torch.cat(found), dim=1)


def resized(images: Tensor, side: int) -> Tensor:
    """Square images by PIL's bicubic filter, antialiased, in floating point: clean-fid's way.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        side: of the result.

    Returns:
        (n, 3, side, side) in [-1, 1].
    """
    found = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return found.clamp(-1.0, 1.0)


def resized_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """By TensorFlow 1's bilinear filter, which does not antialias and begins at the corner; arguments as :func:`resized`."""
    for axis in (2, 3):
        length = images.shape[axis]
        places = torch.arange(side, dtype=images.dtype, device=images.device) * (length / side)
        low = places.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).view(-1, 1) if axis == 2 else places - low
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * share
    return images


def _cached(hub: str) -> Path | None:
    """The folder of a model in the Hub's cache."""
    if not hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _open_inception(resize: Callable[[Tensor, int], Tensor]) -> Callable[[Path, str], Look]:
    def open_it(path: Path, device: str) -> Look:
        network = load_inception(path).to(device)
        # (gray level - 128) / 128, of 0 to 255.
        return lambda images: network((resize(images, SIDE) * 127.5 - 0.5) / 128.0)

    return open_it


def _open_clip(path: Path, device: str) -> Look:
    network = load_transformers(path, "CLIPVisionModelWithProjection").to(device)
    prepare = _normalized(CLIP_MEAN, CLIP_STD, network.config.image_size, device)
    return lambda images: F.normalize(network(pixel_values=prepare(images)).image_embeds, dim=1)


def _open_dinov2(path: Path, device: str) -> Look:
    network = load_transformers(path, "Dinov2Model").to(device)
    prepare = _normalized(IMAGENET_MEAN, IMAGENET_STD, 224, device)
    return lambda images: network(pixel_values=prepare(images)).pooler_output


def _normalized(mean: Sequence[float], std: Sequence[float], side: int, device: str) -> Look:
    center, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return lambda images: ((resized(images, side) + 1.0) / 2.0 - center) / scale


def _fetch(hub: str, *files: str) -> str:
    return f"hf download {hub} {' '.join(files)}"


INCEPTION = "inception-2015-12-05.safetensors"
_CLIP = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
_CONVERTED = "convert pt_inception-2015-12-05-6726825d.pth as docs/compare.md shows"
EYES = {
    "inception": Eye(
        "Inception v3 of 2015-12-05, last pool (2048), clean-fid's resize: 299 x 299, PIL's bicubic",
        INCEPTION, "", (), _CONVERTED, _open_inception(resized),
    ),
    "inception-tensorflow": Eye(
        "Inception v3 of 2015-12-05, last pool (2048), TensorFlow 1's resize: 299 x 299, bilinear without antialiasing",
        INCEPTION, "", (), _CONVERTED, _open_inception(resized_like_tensorflow),
    ),
    "clip": Eye(
        "CLIP ViT-L/14 at 224, projected embeddings, PIL's bicubic resize",
        "clip-vit-large-patch14", "openai/clip-vit-large-patch14", _CLIP,
        _fetch("openai/clip-vit-large-patch14", *_CLIP), _open_clip,
    ),
    "clip-336": Eye(
        "CLIP ViT-L/14 at 336, projected embeddings, PIL's bicubic resize",
        "clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336", ("config.json", WEIGHTS),
        "its config.json and its weights as model.safetensors, as docs/compare.md shows", _open_clip,
    ),
    "dinov2": Eye(
        "DINOv2 ViT-L/14 at 224, class token after the last norm (1024), PIL's bicubic resize",
        "dinov2-large", "facebook/dinov2-large", ("config.json", WEIGHTS),
        _fetch("facebook/dinov2-large", "config.json", WEIGHTS), _open_dinov2,
    ),
}  # fmt: skip
"""By name."""
