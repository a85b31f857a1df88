"""What a user can choose, command by command: one typed object feeds the command line and the Python functions.

A field's default stands here and nowhere else, and so does the sentence that explains it, as ``liftkit COMMAND --help`` prints
it. Nothing here imports torch, so that the help comes at once.

Read ``option.py`` first; each other file has the options of a few commands.
"""

from __future__ import annotations

from liftkit.options.compare import CompareOptions
from liftkit.options.finetune import FinetuneOptions
from liftkit.options.fit import (
    ColorChoice,
    ConvertOptions,
    FitKind,
    FitOptions,
    InitOptions,
    ProofKind,
    ScaleRule,
    number_or_auto,
    rank_or_auto,
)
from liftkit.options.formats import ExportOptions, ImportOptions
from liftkit.options.option import LAST_SEED, Argument, Auto, Device, Named, Option, Overwrite, Shards, ShardsOption
from liftkit.options.report import Html, ReportOptions
from liftkit.options.sampling import (
    STRENGTH,
    GenerateOptions,
    Guidance,
    Offload,
    Pictures,
    SampleOptions,
    Sampler,
    Solver,
    chosen,
)
