"""Train the oracle on real composites."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from liftkit.color import to_signed
from liftkit.data.oracle import Oracle, judge
from tools.tiny_klein import autoencoder, common

POOL = 24576


def train(steps: int = 1500, batch_size: int = 64) -> None:
    """Cross-entropy on digit, color and background, with light noise and blur so that it reads content."""
    torch.manual_seed(common.SEED)
    oracle = Oracle()
    images, scenes = common.demo_images(POOL)
    targets = torch.tensor([(scene.digit, scene.color, scene.background) for scene in scenes])
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=2e-3, weight_decay=0.02)
    log = common.Log("oracle", steps, batch_size)
    for step, index in common.batches(POOL, batch_size, steps):
        autoencoder.set_learning_rate(optimizer, 2e-3 * common.cosine(step, steps))
        batch = to_signed(images[index])
        blurred = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), "replicate"), 3, 1)
        batch = torch.lerp(batch, blurred, torch.rand(len(batch), 1, 1, 1))
        batch = batch + 0.1 * torch.rand(len(batch), 1, 1, 1) * torch.randn_like(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = oracle(batch)
        losses = [F.cross_entropy(part.float(), targets[index, which]) for which, part in enumerate(logits)]
        loss = torch.stack(losses).sum()
        autoencoder.descend(optimizer, loss, oracle.parameters())
        log(step, loss=loss.item())
    oracle.eval()
    held_out, held_out_scenes = common.demo_images(2048, split="heldout")
    print(f"oracle on real held-out images: {judge(oracle, to_signed(held_out), held_out_scenes)}", flush=True)
    weights = {key: value.to(torch.bfloat16) for key, value in oracle.state_dict().items()}
    common.save(common.work_file("oracle.safetensors"), weights)
