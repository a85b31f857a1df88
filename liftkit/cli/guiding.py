"""The options of every command that samples: when and how its models are guided."""

from __future__ import annotations

from typing import Annotated

import typer

Scale = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.", show_default="the pipeline's")]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, max=10_000, help="Denoising steps.", show_default="the pipeline's")
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**62, help="Image i starts from seed + i, whatever the batch.")
]
Start = Annotated[
    float, typer.Option("--guidance-start", min=0.0, max=1.0, help="Part of the steps before guidance starts.")
]
Stop = Annotated[
    float, typer.Option("--guidance-stop", min=0.0, max=1.0, help="Part of the steps after which guidance stops.")
]
Orthogonal = Annotated[
    bool, typer.Option("--guidance-orthogonal", help="Leave out guidance along the denoised estimate: less contrast.")
]
