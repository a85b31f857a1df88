"""What weights cost that begin where a file's header ends, not at a multiple of 64 bytes: python -m benchmarks alignment

The forward of one FLUX.2-like transformer, its weights at multiples of 64, then 8 and 4 bytes behind them, in turns in one process
with one thread. Seconds are the process's own, so that other programs disturb less. Files that liftkit writes are aligned.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from _gpu_model import Scale, call_arguments, latent_transformer
from convert import KLEIN_4B

CONFIG = {**KLEIN_4B, "num_attention_heads": 6, "num_layers": 1, "num_single_layers": 2}
LATE, ROUNDS, SIDE, TEXT = (0, 8, 4), 30, 128, 64


def moved(model, late: int):
    """A copy whose weights begin ``late`` bytes behind multiples of 64."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        first = late // parameter.element_size()
        room = torch.empty(first + parameter.numel(), dtype=parameter.dtype)[first:]
        parameter.data = room.view(parameter.shape).copy_(parameter.data)
    return model


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    scale, where = Scale(config=CONFIG, text=TEXT), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        aligned = latent_transformer(scale, where).to(dtype)
        models = [moved(aligned, late) for late in LATE]
        arguments = call_arguments(scale, SIDE, CONFIG["in_channels"], where, dtype)
        outputs = [model(**arguments)[0] for model in models]
        rows = []
        for _ in range(ROUNDS):
            row = []
            for model in models:
                start = time.process_time()
                model(**arguments)
                row.append(time.process_time() - start)
            rows.append(row)
        for place, late in enumerate(LATE):
            ratio = statistics.median(row[place] / row[0] for row in rows)
            same = "equal" if torch.equal(outputs[place], outputs[0]) else "other"
            print(f"{dtype!s:15s} {late} bytes late: {ratio:.3f} of the aligned forward's time, {same} bits")


if __name__ == "__main__":
    main()
