"""The sections of a recipe: every key with its type, default, range and meaning; ``recipe_data.py`` has the section ``data``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from liftkit.finetune.recipe_types import LISTED, Beta, Names, Section, Share, Text, distance


class Base(Section):
    """The weights that do not learn, which student and reference share."""

    quantize: Annotated[
        Literal["none", "int8", "nf4"],
        Field(description="Bits of its matrices: 8 with torchao, 4 with bitsandbytes, or as many as `precision` says."),
    ] = "none"
    offload: Annotated[
        Literal["none", "blocks"],
        Field(
            description="Blocks: those that do not learn wait in host memory, and each comes to the device when it runs."
        ),
    ] = "none"


class Head(Section):
    """A convolutional network after the recovery of the velocity, which sees across the borders of patches."""

    channels: Annotated[int, Field(ge=1, description="Between its convolutions.")] = 48
    depth: Annotated[int, Field(ge=2, description="Convolutions of 3 x 3, at half resolution.")] = 4


class Trainable(Section):
    """What learns."""

    mode: Annotated[
        Literal["lora", "full", "head"],
        Field(description="LoRA beside frozen weights, every weight of the network, or its detail head alone."),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, description="Rank of the LoRA matrices.")] = 256
    alpha: Annotated[float | None, Field(gt=0, description="The LoRA counts alpha / rank; null: alpha = rank.")] = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout on the LoRA's input.")] = 0.05
    targets: Annotated[
        Names | None,
        Field(
            description="Modules with LoRA: full names, where `*` stands for anything; null: the architecture's own."
        ),
    ] = None
    modules: Annotated[
        Names | None,
        Field(description="Modules trained in full, by full name; null: the projections and `norm_out`."),
    ] = None
    open: Annotated[
        float,
        Field(
            ge=0,
            description="Random input columns for what no latent serves, relative to the lifted ones; 0: as converted, "
            "from where that part is learned slowly.",
        ),
    ] = 0.0
    head: Annotated[
        Head | None,
        Field(
            description="Add a detail head, which begins as if it were not there, for borders of patches; null: none is added, and "
            "one that the model has learns on."
        ),
    ] = None


class Trunk(Section):
    """When and how fast the trunk learns: all but projections, output norm and detail head, or its LoRA."""

    start: Annotated[int, Field(ge=0, description="Steps for which it is held, while the others begin.")] = 0
    factor: Annotated[float, Field(gt=0, description="On its learning rate.")] = 0.1


class Optimizer(Section):
    """How it learns."""

    name: Annotated[
        Literal["adamw", "adamw8bit", "muon"],
        Field(description="AdamW, its 8-bit kind, or Muon for matrices with AdamW for the rest."),
    ] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, description="Learning rate at its highest, after warm-up.")] = 1e-4
    betas: Annotated[tuple[Beta, Beta], LISTED, Field(description="Momenta of AdamW.")] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, description="Decoupled weight decay.")] = 0.0
    multipliers: Annotated[
        dict[Text, Annotated[float, Field(gt=0)]],
        Field(description="Factors on the learning rate by module, such as `proj_out: 10`."),
    ] = {}  # noqa: RUF012 (pydantic copies it)
    trunk: Annotated[
        Trunk | None,
        Field(
            description="Hold the weights between the projections at first, and let them learn more slowly; null: all alike."
        ),
    ] = None
    warmup: Annotated[int, Field(ge=0, description="Steps of linear warm-up.")] = 100
    decay: Annotated[
        Literal["constant", "linear", "cosine"], Field(description="How the learning rate goes to 0 at the end.")
    ] = "constant"
    decay_from: Annotated[Share, Field(description="Share of the steps at which the decay begins.")] = 0.0
    clip: Annotated[
        float | None, Field(gt=0, description="Largest gradient norm, over all that learns; null: no limit.")
    ] = 1.0


class Noise(Section):
    """Noise levels in training: a logit-normal, shifted by sigma -> shift sigma / (1 + (shift - 1) sigma)."""

    mean: Annotated[float, Field(description="Mean of the normal distribution.")] = 0.0
    std: Annotated[float, Field(gt=0, description="Standard deviation of the normal distribution.")] = 1.0
    shift: Annotated[
        float, Field(gt=0, description="Shift of the pixel sigma: the latent model's, times the lift's scale.")
    ] = 17.0
    latent_shift: Annotated[
        float | None,
        Field(
            gt=0,
            description="The latent model's own shift: multiplied by the lift's scale, it takes the place of shift.",
        ),
    ] = None


class Bands(Section):
    """Weights of the flow loss by band of the pixels' spectrum, at low noise; their mean is 1 at every noise level."""

    power: Annotated[
        float,
        Field(
            description="At sigma 0 weights rise as frequency to twice this power: 0 counts pixels, 1 whitens photographs."
        ),
    ] = 1.0
    wavelength: Annotated[float, Field(gt=0, description="In pixels; bands of longer waves count about alike.")] = 16.0
    below: Annotated[float, Field(gt=0, le=1, description="Noise level sigma from which all bands count alike.")] = 0.5


class Objective(Section):
    """What is minimized."""

    loss: Annotated[
        Literal["asymflow", "flow"],
        Field(description="The paper's loss, with variance reduction by the frozen model, or the plain flow loss."),
    ] = "asymflow"
    kappa: Annotated[
        float | None,
        Field(ge=0, description="How soon the plain loss returns as noise falls; null: full reduction at every level."),
    ] = 0.3
    reference_below: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Share 1 - w of the frozen model's error below which it is not asked, which saves its pass for images of "
            "low noise, unless there is a perceptual term or bands, or blocks are compiled. "
            "At 0.005 their loss changes by 1 % at most; 0: always asked.",
        ),
    ] = 0.005
    reference_precision: Annotated[
        Literal["same", "float8"],
        Field(
            description="Of the frozen model's matrix products: the student's, or `float8`, which is faster on GPUs that have it "
            "(compute capability 8.9) and keeps another byte for each number of the matrices; for one process.",
        ),
    ] = "same"
    weight: Annotated[float, Field(gt=0, description="Weight of the flow loss.")] = 5.0
    sigma_floor: Annotated[float, Field(gt=0, le=1, description="Smallest sigma that the loss divides by.")] = 0.05
    bands: Annotated[
        Bands | None,
        Field(description="Weigh what is squared by band of the spectrum and by noise level; null: all pixels alike."),
    ] = None
    borders: Annotated[
        float,
        Field(
            ge=0,
            description="Weight, relative to the flow loss, of the error in the steps across borders of patches, which counts at "
            "high noise; 0: none.",
        ),
    ] = 0.0
    perceptual: Annotated[
        str,
        AfterValidator(distance),
        Field(
            description="`none`, `lpips` (VGG), `vae` (features of the model's own), `gradient` (of images), or a distance "
            "of your own."
        ),
    ] = "none"
    perceptual_weight: Annotated[float, Field(ge=0, description="Weight of the perceptual term.")] = 1.0
    adversarial: Annotated[float, Field(ge=0, description="Weight of an adversarial term; 0: none.")] = 0.0
    repa: Annotated[float, Field(ge=0, description="Weight of REPA: JiT's hidden tokens follow DINOv2's; 0: none.")] = (
        0.0
    )
    repa_block: Annotated[int, Field(ge=1, description="Blocks behind which the tokens of REPA are taken.")] = 8
    repa_encoder: Annotated[
        Text, Field(description="DINOv2 of REPA: a folder that transformers reads, or a Hub id.")
    ] = "facebook/dinov2-base"
    terms: Annotated[
        dict[Text, float],
        Field(description="Weights of loss terms of your own, by the name that they are registered by."),
    ] = {}  # noqa: RUF012 (pydantic copies it)


class Ema(Section):
    """A running mean of what learns."""

    enabled: Annotated[bool, Field(description="Keep a running mean, and write it as the result.")] = True
    kind: Annotated[
        Literal["karras", "constant"],
        Field(description="Kind of mean: by Karras' power function, or with the same share kept at each step."),
    ] = "karras"
    gamma: Annotated[float, Field(gt=0, description="Exponent of the power function; a larger one forgets sooner.")] = (
        7.0
    )
    decay: Annotated[float, Field(ge=0, lt=1, description="Share that the constant kind keeps at each step.")] = 0.9999
    start: Annotated[int, Field(ge=0, description="Step at which the running mean begins.")] = 100


class Checkpoints(Section):
    """States to go on from."""

    every: Annotated[int, Field(ge=0, description="Steps between checkpoints; 0: only at the end.")] = 500
    keep: Annotated[
        int, Field(ge=1, description="Number of checkpoints that stay; older ones go when a newer one is safe.")
    ] = 2


class Previews(Section):
    """Pictures along the way, from the same noise each time; of pixel models alone."""

    every: Annotated[int, Field(ge=0, description="Steps between previews; 0: never.")] = 0
    prompts: Annotated[Names | None, Field(description="What to paint, in turns; null: captions of the data.")] = None
    count: Annotated[int, Field(ge=1, description="Number of images.")] = 8
    steps: Annotated[int | None, Field(ge=1, description="Denoising steps; null: 24.")] = None
    guidance: Annotated[float | None, Field(ge=0, description="Guidance scale; null: 4.")] = None
    seed: Annotated[int, Field(ge=0, description="Seed of the noise.")] = 0


class Validation(Section):
    """The loss on held-out images, by noise level."""

    every: Annotated[int, Field(ge=0, description="Steps between validations; 0: never.")] = 0
    images: Annotated[
        int | None,
        Field(
            ge=1,
            description="Held-out images; null: 256, but a tenth of each source at most, and none of fewer than ten.",
        ),
    ] = None
    quantiles: Annotated[int, Field(ge=1, description="Noise levels, in parts that training meets equally often.")] = 8
