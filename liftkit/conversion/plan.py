"""The plan of a conversion: everything that can be known, checked and printed before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from liftkit.checkpoint.finite import check_files
from liftkit.checkpoint.folder import check_space, check_target
from liftkit.checkpoint.header import Header, TensorEntry, read_header, tensor_bytes
from liftkit.checkpoint.model import Weights
from liftkit.checkpoint.rewrite import casts, rewritten_size
from liftkit.checkpoint.source import Stamp, stamps
from liftkit.color import ColorSpace
from liftkit.conversion.inputs import check_apart, copied_files
from liftkit.conversion.memory import choose_proof
from liftkit.errors import UsageError
from liftkit.fit.engine import DEFAULT_COLOR, PUBLISHED
from liftkit.fit.gallery import ROWS, SHOWN, SHOWN_SIDE
from liftkit.fit.subject import Subject, check_sources, choose, inspect_model, note_images
from liftkit.lift import Lift
from liftkit.models.absent import limits
from liftkit.models.surgery import RawChannels, check_finite, check_lift, check_width
from liftkit.models.trial import Trial
from liftkit.options import ConvertOptions, ProofKind
from liftkit.tally import Tally

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
REPORT_BYTES = 1_500_000
"""Of charts, figures, records and the card, beside the pictures."""


@dataclass
class Plan(Subject):
    """What a conversion would do.

    Args:
        output: the target folder.
        weights: the transformer's files.
        options: as given, with every automatic choice made.
        rewritten: tensors that change, by name, as they will be.
        kept: number of tensors whose bytes are copied.
        transformer_bytes: of the new transformer.
        needed_bytes: disk that the whole output takes.
        parts: what takes it, in bytes: the new transformer, files that are copied (or linked, which takes off), what finetuning
            needs of the source's projections, and the report.
        lift: a given lift, checked.
        copied_files: the source's files that come along, by their path in the output.
        made: texts of files that are written anew beside them: indexes that name shards without their variant.
        left_out: the source's files that stay behind.
        absent: what cannot be done with the result for want of components that the source lacks.
        trial: that builds the source, and at the end the result, to find out whether they load.
        lacks: waits until the source is built, and says what this machine lacks to load it.
        sources: what every file that is read looked like, to be sure at the end that it is still the same.
        proof: how the conversion will be proved; the reason is among the reasons.
        component: the transformer that this is about.
        companions: the same for each further transformer of the pipeline that gets the lift; of these only what is theirs
            differs: config, weights and what is rewritten.
    """

    output: Path
    weights: Weights
    options: ConvertOptions
    rewritten: dict[str, TensorEntry] = field(default_factory=dict)
    kept: int = 0
    transformer_bytes: int = 0
    needed_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    lift: Lift | None = None
    copied_files: dict[str, Path] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    left_out: Tally = field(default_factory=lambda: Tally("files"))
    absent: list[str] = field(default_factory=list)
    trial: Trial = field(default_factory=Trial)
    lacks: Callable[[], list[str]] = list
    sources: dict[Path, Stamp] = field(default_factory=dict)
    proof: ProofKind = "model"
    component: str = "transformer"
    companions: list[Plan] = field(default_factory=list)

    @property
    def limits(self) -> list[str]:
        """What cannot be done with the result, and why.

        Raises:
            UsageError: naming the component of the source that is incomplete, or that its library cannot load.
            LiftkitError: if the process that tries was killed.
        """
        return [*self.absent, *self.lacks()]

    @property
    def transformers(self) -> list[Plan]:
        """All that get the lift, the main one first."""
        return [self, *self.companions]

    @property
    def wanted(self) -> str | None:
        """The dtype that floating tensors are cast to, as safetensors calls it, or None to keep their own."""
        return None if self.options.dtype == "auto" else DTYPES[self.options.dtype]

    @property
    def color(self) -> ColorSpace | None:
        """The color space of the result; None where it is fitted, or chosen by comparing."""
        if self.lift is not None:
            return self.lift.color
        return PUBLISHED.get(self.options.color or DEFAULT_COLOR)

    def is_untouched(self, header: Header) -> bool:
        """Whether a weight file of the transformer comes along as it is."""
        return self.rewritten.keys().isdisjoint(header.tensors) and not casts(header, self.wanted)


def make_plan(model: str, output: Path, options: ConvertOptions, *, wait: bool = True) -> Plan:
    """Check everything that can be checked, and say what would happen.

    Args:
        model: a diffusers folder or a Hub id.
        output: the target folder.
        options: of the conversion.
        wait: until the source is built and its weights are looked at, which takes seconds; else the one goes on, and who asks
            for the plan's limits waits, and the other is left to the copying where no fit comes before that.

    Raises:
        UsageError: if the model, the options, the lift, the target or the disk will not do.
    """
    check_target(output, overwrite=options.overwrite)
    subject = inspect_model(model)
    check_apart(
        output,
        {"the model": subject.model.path, "--images": options.images, "--lift": options.lift, "--vae": options.vae},
    )
    weights = subject.model.weights("transformer")
    if options.lift is not None and options.vae is not None:
        raise UsageError("--vae is for a fit, and --lift reuses one: give one of the two")
    if options.rank is not None:
        raise UsageError("--rank is for training from scratch; a conversion has the rank of its latents")
    chosen = choose(options, subject)
    plan = Plan(**vars(subject), output=output, weights=weights, options=chosen)
    if chosen.lift is not None:
        plan.lift = Lift.load(chosen.lift)
        check_lift(plan.spec, plan.config, plan.factor, plan.lift)
    else:
        check_sources(chosen)
        note_images(plan, chosen)
    plan.companions = [_companion(plan, name) for name in plan.spec.companions]
    for each in plan.transformers:
        _plan_tensors(each)
    _plan_files(plan)
    if wait or plan.lift is None or chosen.save == "adapter":
        _check_numbers(plan)
    plan.proof, plan.reasons["proof"] = choose_proof(chosen.proof, weights, chosen.device)
    if chosen.save == "adapter":
        if plan.companions:
            raise UsageError(
                f"--save adapter: it holds one transformer, and {plan.spec.name} comes with {plan.companions[0].component}; "
                "save the whole model"
            )
        plan.proof, plan.reasons["proof"] = "projections", "an adapter holds nothing else"
        changed = sum(entry.size for entry in plan.rewritten.values())
        plan.parts = {"projections": changed, "reference": _size_of(plan, plan.spec.reference)}
        plan.needed_bytes = sum(plan.parts.values())
    check_space(output, plan.needed_bytes)
    plan.absent, plan.lacks = limits(plan.model, plan.components), plan.trial.begin(plan.model)
    if wait:
        plan.lacks()
    return plan


def _companion(plan: Plan, component: str) -> Plan:
    """The plan of a further transformer, for which it is a model of the same class and shape.

    Raises:
        UsageError: if it is missing or is not.
    """
    model = plan.model
    found = model.class_of(component)
    if found != plan.spec.name:
        raise UsageError(
            f"{model.source}: its {component} is {found or 'missing'}, expected a {plan.spec.name}; is the model complete?"
        )
    config = model.config(component)
    differing = [key for key in plan.spec.channel_keys if config.get(key) != plan.config.get(key)]
    if differing:
        raise UsageError(
            f"{model.path / component / 'config.json'}: {differing[0]} is {config.get(differing[0])}, that of the transformer "
            f"{plan.config.get(differing[0])}; one lift cannot serve both"
        )
    return replace(plan, config=config, weights=model.weights(component), component=component, rewritten={})


def _plan_files(plan: Plan) -> None:
    """Which files come along, what each looks like now, and what the output takes."""
    model = plan.model
    plan.copied_files, plan.made, plan.left_out = copied_files(model, plan.components, plan.spec.companions)
    headers = [header for each in plan.transformers for header in each.weights.headers.values()]
    transformer = [header.path for header in headers]
    configs = [model.path / each.component / "config.json" for each in plan.transformers]
    configs += [model.path / "scheduler" / "scheduler_config.json", model.path / "model_index.json"]
    plan.sources = stamps([*configs, *transformer, *plan.copied_files.values()])
    # Headers were read a moment ago: that file, not one that took its place since, is what was planned for.
    plan.sources |= {header.path: header.stamp for header in headers if header.stamp is not None}
    names = (*(projection.path for projection, _ in plan.spec.projections), *plan.spec.reference)
    copied = sum(plan.sources[path].size for path in plan.copied_files.values())
    reference = sum(_size_of(each, names) for each in plan.transformers)
    plan.parts = {each.component: each.transformer_bytes for each in plan.transformers}
    plan.parts |= {"copied": copied, "reference": reference}
    plan.parts["report"] = _report_size(plan)
    plan.needed_bytes = sum(plan.parts.values())
    if plan.options.shards == "link":
        device = plan.output.resolve().parent.stat().st_dev
        linked = [plan.sources[path] for path in plan.copied_files.values() if path.suffix == ".safetensors"]
        untouched = [h for each in plan.transformers for h in each.weights.headers.values() if each.is_untouched(h)]
        linked += [plan.sources[header.path] for header in untouched]
        plan.parts["linked"] = -sum(stamp.size for stamp in linked if stamp.device == device)
        plan.needed_bytes += plan.parts["linked"]


def _check_numbers(plan: Plan) -> None:
    """Raise unless the weights are finite, as far as they are read before the work begins: copying looks at all of them.

    Raises:
        UsageError: naming the file and the tensor.
    """
    headers = [header for each in plan.transformers for header in each.weights.headers.values()]
    copied = [path for path in plan.copied_files.values() if path.suffix == ".safetensors"]
    check_files([*headers, *map(read_header, copied)])


def _report_size(plan: Plan) -> int:
    """At most, of the lift's file and the page: the basis in double precision, and pictures as numbers and as PNG in base64."""
    side = min(SHOWN_SIDE, plan.options.resolution or SHOWN_SIDE)
    pictures = len(ROWS) * SHOWN * 3 * side**2
    return 8 * plan.dim * plan.rank + pictures + pictures * 4 // 3 + REPORT_BYTES


def _size_of(plan: Plan, modules: tuple[str, ...]) -> int:
    """Bytes of the source's tensors below some modules."""
    entries = (header.tensors.items() for header in plan.weights.headers.values())
    return sum(e.size for each in entries for name, e in each if name.startswith(tuple(f"{m}." for m in modules)))


def _plan_tensors(plan: Plan) -> None:
    """Which tensors change and what the new transformer weighs, from headers and config alone."""

    for projection, side in plan.spec.projections:
        raw = RawChannels(plan.spec, projection, side, plan.spec.latent_patch(plan.config))
        for kind in ("weight", "bias") if side == "output" else ("weight",):
            name = f"{projection.path}.{kind}"
            if name not in plan.weights.where:
                if kind == "weight":
                    raise UsageError(
                        f"{plan.model.path / plan.component}: tensor {name!r} is missing; is the model complete?"
                    )
                continue
            _check_projection(plan, name, raw)
            entry = plan.weights.headers[plan.weights.where[name]].tensors[name]
            shape = raw.reshaped(entry.shape, plan.rank, plan.dim)
            dtype = plan.wanted or entry.dtype
            plan.rewritten[name] = TensorEntry(dtype, shape, 0, tensor_bytes(dtype, shape))
    plan.rewritten["lift.basis"] = TensorEntry("F32", (plan.dim, plan.rank), 0, 4 * plan.dim * plan.rank)
    plan.kept = len(plan.weights.where) - (len(plan.rewritten) - 1)
    for header in plan.weights.headers.values():
        here = {
            name: entry for name, entry in plan.rewritten.items() if plan.weights.where.get(name) == header.path.name
        }
        plan.transformer_bytes += rewritten_size(header, here, plan.wanted)
    plan.transformer_bytes += plan.rewritten["lift.basis"].size


def _check_projection(plan: Plan, name: str, raw: RawChannels) -> None:
    """Raise unless a projection is what can be lifted: of the right width, and finite."""

    header = plan.weights.headers[plan.weights.where[name]]
    if name.endswith(".weight"):
        check_width(name, header.tensors[name].shape, raw, plan.rank, header.path)
    tensor = plan.weights.read(name)
    assert tensor is not None
    check_finite(name, tensor, header.path)
