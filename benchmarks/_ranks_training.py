"""One run of ranks.py: the network, its training, and how long a step takes."""

from __future__ import annotations

import time

import torch
from _ranks_data import CLASSES, PATCH, Plan, load
from torch import Tensor

FLOOR, DROPPED = 0.05, 0.1


class Student:
    """A network and how its answer becomes a velocity."""

    def __init__(self, plan: Plan, basis: Tensor, seed: int) -> None:
        from liftkit.models.jit import JiTTransformer2DModel

        torch.manual_seed(seed)
        self.model = JiTTransformer2DModel(
            sample_size=plan.side,
            patch_size=PATCH,
            num_layers=plan.depth,
            num_attention_heads=plan.width // 64,
            attention_head_dim=64,
            bottleneck_dim=64,
            num_classes=CLASSES,
            context_tokens=8,
            context_start=2,
            upcast_attention=False,
        )
        if basis.shape[1] <= 64:
            self.model.begin_with(basis)
        self.model = self.model.to(plan.device)
        self.basis, self.device, self.side = basis.float().to(plan.device), plan.device, plan.side

    def velocity(self, x_t: Tensor, sigma: Tensor, labels: Tensor, floor: float) -> Tensor:
        """u = eps - x_0."""
        from liftkit.asymflow import recover_velocity
        from liftkit.tokens import patchify, unpatchify

        with torch.autocast(torch.device(self.device).type, torch.bfloat16, cache_enabled=False):
            answer = self.model(x_t, sigma, labels, return_dict=False)[0]
        tokens = recover_velocity(
            patchify(answer.float(), PATCH), patchify(x_t, PATCH), sigma, self.basis, 1.0, sigma_min=floor
        )
        return unpatchify(tokens, PATCH, self.side, self.side)


class Training:
    """One run: static buffers, so that a step can be captured as a CUDA graph.

    Args:
        plan: of all runs.
        rank, seed: of this one.
        images: uint8 (n, 3, side, side) on the device.
        digits: (n,) on the device.
        basis: (D, D), of which the first ``rank`` columns are taken.
    """

    def __init__(self, plan: Plan, rank: int, seed: int, images: Tensor, digits: Tensor, basis: Tensor) -> None:
        self.plan, self.images, self.digits = plan, images, digits
        self.student = Student(plan, basis[:, :rank], seed)
        device, size = plan.device, plan.batch
        self.generator = torch.Generator(device).manual_seed(seed + 1)
        self.x0 = torch.zeros(size, 3, plan.side, plan.side, device=device)
        self.noise, self.sigma = torch.zeros_like(self.x0), torch.zeros(size, device=device)
        self.labels = torch.zeros(size, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)
        self.total = torch.zeros((), device=device)
        self.parameters = list(self.student.model.parameters())
        graphed = plan.graphs
        model = self.student.model
        small = {*model.class_embed.parameters(), *model.time_embed.parameters()}
        self.groups = [
            {"params": [p for p in self.parameters if (p in small) == wanted], "factor": factor}
            for wanted, factor in ((False, 1.0), (True, plan.embeddings))
        ]
        rate = torch.tensor(plan.rate, device=device) if graphed else plan.rate
        self.optimizer = torch.optim.AdamW(
            self.groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=graphed
        )
        for group in self.optimizer.param_groups if graphed else ():
            group["lr"] = group["lr"].clone()  # each group's own number, which a graph reads
        self.average = [p.detach().clone() for p in self.parameters]
        self.kept = 1.0 - 1.0 / max(0.05 * plan.steps, 10)
        self.graph: torch.cuda.CUDAGraph | None = None

    def feed(self) -> None:
        """Draw a batch into the buffers."""
        size, generator, device = self.plan.batch, self.generator, self.plan.device
        rows = torch.randint(len(self.images), (size,), generator=generator, device=device)
        self.x0.copy_(self.images[rows].float() / 127.5 - 1.0)
        dropped = torch.rand(size, generator=generator, device=device) < DROPPED
        self.labels.copy_(torch.where(dropped, CLASSES, self.digits[rows]))
        self.noise.normal_(generator=generator)
        self.sigma.normal_(generator=generator)
        self.sigma.mul_(self.plan.noise_std).add_(self.plan.noise_mean).sigmoid_().clamp_(min=1e-4)

    def compute(self) -> None:
        """Loss, gradients, step, average; of the buffers alone."""
        self.optimizer.zero_grad(set_to_none=True)
        x_t = torch.lerp(self.x0, self.noise, self.sigma.view(-1, 1, 1, 1))
        u = self.student.velocity(x_t, self.sigma, self.labels, 1e-6)
        weight = (self.sigma / self.sigma.clamp(min=FLOOR)).view(-1, 1, 1, 1)
        loss = (weight * (u - (self.noise - self.x0))).square().mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - self.kept)
        self.loss.copy_(loss.detach())
        self.total.add_(self.loss)

    def capture(self) -> None:
        """Record a step; the weights are put back to where they began."""
        before = [p.detach().clone() for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.feed()
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()
        with torch.no_grad():
            for parameter, value, average in zip(self.parameters, before, self.average):
                parameter.copy_(value)
                average.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def step(self, index: int) -> None:
        """One optimizer step."""
        rate = self.plan.rate * min(1.0, (index + 1) / max(0.05 * self.plan.steps, 1.0))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["factor"])
            else:
                group["lr"] = rate * group["factor"]
        self.feed()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.compute()

    def run(self) -> list[float]:
        """All steps; the mean loss of each eighth."""
        self.generator.manual_seed(self.generator.initial_seed())
        eighth, losses = max(1, self.plan.steps // 8), []
        self.student.model.train()
        for index in range(self.plan.steps):
            self.step(index)
            if (index + 1) % eighth == 0:
                losses.append(self.total.item() / eighth)
                self.total.zero_()
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average):
                parameter.copy_(average)
        self.student.model.eval()
        return losses


def step_seconds(plan: Plan) -> float:
    """Seconds of a step where one run has the device to itself."""
    data, basis = load(plan)
    images, digits = (torch.from_numpy(each).to(plan.device) for each in (data["train"], data["train_labels"][:, 0]))
    training = Training(plan, 8, 0, images, digits, basis)
    if plan.graphs:
        training.capture()
    count = 60 if plan.device != "cpu" else 3
    for index in range(count // 3):
        training.step(index)
    if plan.device != "cpu":
        torch.cuda.synchronize()
    began = time.monotonic()
    for index in range(count):
        training.step(index)
    training.loss.item()
    return (time.monotonic() - began) / count
