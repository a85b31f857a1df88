"""The demo data, the oracle, and images from folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from liftkit.color import to_signed
from liftkit.data import demo
from liftkit.data.images import BROKEN, ImageFolder, batches, load_image
from liftkit.data.oracle import judge, load_oracle
from liftkit.errors import UsageError
from liftkit.evaluate.patches import frechet, gaussian, patch_frechet, unsharp
from liftkit.evaluate.two_sample import two_sample_accuracy


def real(count: int, split: str = "heldout", start: int = 0) -> tuple[torch.Tensor, list[demo.Scene]]:
    images, scenes = demo.images(count, split=split, start=start)
    return to_signed(torch.from_numpy(images).permute(0, 3, 1, 2)), scenes


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    together, scenes = demo.images(6, seed=3)
    for index in (5, 0, 2):
        image, scene = demo.image_at(index, seed=3)
        assert np.array_equal(image, together[index])
        assert scene == scenes[index] == demo.scene_at(index, seed=3)
    for other in ({"seed": 4}, {"seed": 3, "split": "heldout"}):
        assert not np.array_equal(demo.image_at(0, **other)[0], together[0])


def test_prompts_name_their_scene() -> None:
    scenes = demo.all_scenes()
    assert len({scene.prompt for scene in scenes}) == 160
    assert demo.Scene(7, 0, 0).prompt == "a red seven on flower petals"


def test_all_scenes_occur() -> None:
    drawn = {demo.scene_at(index) for index in range(2000)}
    assert drawn == set(demo.all_scenes())


def test_the_oracle_reads_real_images_and_is_not_flattered_by_wrong_prompts() -> None:
    oracle = load_oracle()
    images, scenes = real(256)
    right = judge(oracle, images, scenes)
    assert right.digit > 0.95
    assert right.color > 0.99
    assert right.background > 0.99
    wrong = judge(oracle, images, scenes[1:] + scenes[:1])
    assert wrong.digit < 0.3
    assert wrong.color < 0.3


def test_folders_are_read_in_a_seeded_order(image_folder: Path) -> None:
    def first(seed: int) -> list[torch.Tensor]:
        return [image for _, image in ImageFolder(image_folder, 5, seed).images(16, 4)]

    assert all(torch.equal(a, b) for a, b in zip(first(0), first(0)))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first(0), first(1)))
    assert len(list(ImageFolder(image_folder, 5).images(16, 4))) == 5


def test_batches_hold_images_of_one_size(image_folder: Path) -> None:
    pairs = list(batches(ImageFolder(image_folder).images(64, 4), 4))
    assert torch.cat([places for places, _ in pairs]).tolist() == list(range(40))
    found = [batch for _, batch in pairs]
    assert sum(len(batch) for batch in found) == 40
    assert all(batch.shape[2] % 4 == 0 and batch.dtype == torch.uint8 for batch in found)
    assert len({batch.shape[2] for batch in found}) > 1


def test_images_are_shrunk_never_enlarged_and_cropped_about_the_center(tmp_path: Path) -> None:
    Image.new("RGB", (30, 50), "red").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 64, 8).shape == (3, 24, 24)
    assert load_image(tmp_path / "a.png", 16, 8).shape == (3, 16, 16)
    with pytest.raises(BROKEN, match="smaller than a patch"):
        load_image(tmp_path / "a.png", 64, 32)


def test_transparent_grayscale_sixteen_bit_and_rotated_files(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", 8, 8) == 255).all()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png", 8, 8) == 156).all()
    Image.new("L", (8, 8), 7).save(tmp_path / "gray.jpg")
    assert (load_image(tmp_path / "gray.jpg", 8, 8) == 7).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (16, 8), "black")
    picture.paste("white", (0, 0, 8, 8))
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png", 8, 8)
    assert upright[:, :3].float().mean() > 200 > 50 > upright[:, 5:].float().mean()


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(UsageError, match="no image files"):
        ImageFolder(tmp_path)


def test_frechet_distance_of_known_normals() -> None:
    a = torch.randn(200_000, 3, dtype=torch.float64)
    b = 2.0 * torch.randn(200_000, 3, dtype=torch.float64) + torch.tensor([1.0, 0.0, 0.0])
    assert frechet(gaussian(a), gaussian(b)) == pytest.approx(1.0 + 3.0, rel=0.02)
    assert frechet(gaussian(a), gaussian(a)) < 1e-9


def test_patch_distance_orders_degradations() -> None:
    (a, _), (b, _) = real(96), real(96, start=500)
    blurred = unsharp(a, -0.8)
    floor = patch_frechet(a, b)
    assert floor < patch_frechet(blurred, b) < patch_frechet(unsharp(a, -1.0), b)
    assert floor < patch_frechet(a + 0.1 * torch.randn_like(a), b)


def test_two_sample_accuracy_tells_noise_from_images_and_not_images_from_images() -> None:
    (a, _), (b, _) = real(128), real(128, start=500)
    assert two_sample_accuracy(a + 0.3 * torch.randn_like(a), b, steps=60) > 0.9
    assert 0.4 < two_sample_accuracy(a, b, steps=60) < 0.6
