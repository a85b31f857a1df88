"""Carry out a plan: fit, rewrite, write the folder, prove it; the output appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.finite import message as not_finite
from liftkit.checkpoint.folder import RECORD, atomic_folder, digests
from liftkit.checkpoint.follow import Ledger
from liftkit.checkpoint.hashing import TABLE
from liftkit.checkpoint.model import find_model
from liftkit.checkpoint.record import versions
from liftkit.checkpoint.source import check_unchanged
from liftkit.conversion.card import model_card
from liftkit.conversion.plan import Plan, make_plan
from liftkit.conversion.proof import Proof, worst
from liftkit.conversion.result import Conversion
from liftkit.conversion.verify import prove
from liftkit.conversion.write import FileCopier, write_components, write_transformer
from liftkit.errors import LiftkitError, UsageError
from liftkit.lift import Lift
from liftkit.options import ConvertOptions
from liftkit.progress import Observer, Silent
from liftkit.report.data import Report
from liftkit.report.pages import alignment_page
from liftkit.tally import Tally


def convert(
    model: str,
    output: str | Path,
    options: ConvertOptions | None = None,
    observer: Observer | None = None,
    **choices: Any,
) -> Conversion:
    """Convert a latent flow pipeline into a pixel pipeline: plan, fit, surgery, write, prove.

    Args:
        model: a diffusers folder or a Hub id.
        output: the folder to make.
        options: see :class:`liftkit.options.ConvertOptions`; or give its fields as keywords.
        observer: shows the progress.

    Raises:
        UsageError: bad input; nothing was left behind.
        ProofError: the converted model does not do what its source does; nothing was left behind.
        LiftkitError: the disk refused.
    """
    if options is not None and choices:
        raise TypeError("convert: give options or keywords, not both")
    # Where no fit has to wait for it, whether the source loads is found out beside the copying.
    plan = make_plan(model, Path(output), options or ConvertOptions(**choices), wait=False)
    return execute(plan, observer or Silent())


def execute(plan: Plan, observer: Observer) -> Conversion:
    """Carry out a plan; see :func:`convert`."""
    try:
        return (_make_adapter if plan.options.save == "adapter" else _make_folder)(plan, observer)
    finally:
        plan.trial.end()


def _make_adapter(plan: Plan, observer: Observer) -> Conversion:
    from liftkit.conversion.adapter import save_adapter

    lift, tallies = _lift(plan, observer)
    plan.lacks()
    plan.trial.end()
    return Conversion(plan, lift, save_adapter(plan, lift, _provenance(plan), observer), tallies)


def _make_folder(plan: Plan, observer: Observer) -> Conversion:
    # The folder is claimed before the fit: a second run into the same one learns so at once.
    with atomic_folder(plan.output, overwrite=plan.options.overwrite) as building:
        lift, tallies = _lift(plan, observer)
        with Ledger(building) as ledger:
            copier = FileCopier(plan.sources, plan.options.shards == "link", ledger, observer.note)
            write_components(plan, lift, building, copier)
            for each in plan.transformers:
                write_transformer(each, lift, building, observer, copier)
            loads = _begin_loading(plan, building)
            proof = worst([_prove(each, lift, building, observer) for each in plan.transformers])
            loads()
            plan.trial.end()
            result = Conversion(plan, lift, proof, tallies)
            _write_report(result, building, ledger, observer)
        check_unchanged(plan.sources)
    return result


def _prove(plan: Plan, lift: Lift, building: Path, observer: Observer) -> Proof:
    return prove(
        plan.model.path,
        building,
        plan.spec,
        lift,
        component=plan.component,
        kind="projections" if plan.proof == "projections" else plan.options.proof,
        # Copied by the kernel; the ledger compares the ends of each, and says what it finds before the output is there.
        compared=True,
        device=plan.options.device,
        steps=plan.options.proof_steps,
        seed=plan.options.seed,
        observer=observer,
    )


def _begin_loading(plan: Plan, building: Path) -> Callable[[], None]:
    """Begin to build the result, once the source is a pipeline that loads, or lacks a package alone, as the plan said.

    Returns:
        A function that waits for it, and raises if it is not the same of the result.
    """
    plan.lacks()
    with _of_result(building):
        answer = plan.trial.begin(find_model(str(building)))

    def wait() -> None:
        with _of_result(building):
            answer()

    return wait


@contextmanager
def _of_result(building: Path) -> Iterator[None]:
    """What is amiss is the result, which the user has not seen and will not."""
    try:
        yield
    except UsageError as error:
        raise LiftkitError(
            f"the result would not load: {str(error).replace(str(building), '')}; the output was discarded"
        ) from error


def _lift(plan: Plan, observer: Observer) -> tuple[Lift, list[Tally]]:
    """The lift of a plan, given or fitted, and accounts of the images for it."""
    if plan.lift is not None:
        return plan.lift, []
    # A fit takes long and has the libraries in this process: what cannot be loaded is said before, and nobody waits beside it.
    plan.lacks()
    plan.trial.end()
    from liftkit.fit.engine import fit_collected, fit_pass
    from liftkit.fit.source import open_source

    source = open_source(plan, plan.options, observer)
    collection = fit_pass(source, plan.options, plan.latent_patch, observer=observer)
    return fit_collected(collection, plan.options, plan.latent_patch, source, observer), [source.tally]


def _write_report(result: Conversion, building: Path, ledger: Ledger, observer: Observer) -> None:
    """Alignment page and figures, model card, and last the manifest."""
    plan = result.plan
    provenance = {**_provenance(plan), "versions": versions()}
    name = f"{plan.model.name.rsplit('/', 1)[-1]}, lifted to pixels"
    report = Report(name, result.lift, result.proof.to_dict(), provenance)
    write_text(building / "alignment.json", json.dumps(report.to_dict(), indent=2) + "\n")
    write_text(building / "alignment.html", alignment_page(report))
    write_text(building / "README.md", model_card(result))
    with observer.stage("write: checksums", None, "bytes") as advance:
        found = digests(building, ledger.digests(), advance)
    for path, digest in found.items():
        if digest.not_finite:
            raise UsageError(not_finite(f"{plan.model.source}: {path}", digest.not_finite[0]))
    record = {
        "format": "liftkit.conversion",
        "version": 1,
        **provenance,
        "scale": result.lift.scale,
        "proof": report.proof,
        TABLE: {path: digest.value for path, digest in found.items()},
        # By the digest of their file: what is no longer that file is not looked up here by mistake.
        "tensors": {digest.value: digest.tensors for digest in found.values() if digest.tensors},
    }
    write_text(building / RECORD, json.dumps(record, indent=2) + "\n")


def _provenance(plan: Plan) -> dict[str, Any]:
    return {
        "source": {"model": plan.model.name, "class": plan.spec.name, "pipeline": plan.model.index["_class_name"]},
        "options": _plain_options(plan.options),
    }


def _plain_options(options: ConvertOptions) -> dict[str, Any]:
    """Options as plain data, without those that leave every byte as it is; of paths the name alone, for the folder may
    be published."""
    paths = {
        key: Path(value).name
        for key, value in vars(options).items()
        if value and key in ("images", "lift", "prompts", "vae")
    }
    return {key: value for key, value in {**vars(options), **paths}.items() if key not in ("overwrite", "shards")}
