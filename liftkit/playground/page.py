"""The page, and what its buttons do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import randrange
from threading import Event
from typing import Any

import gradio as gr

from liftkit.errors import LiftkitError, UsageError
from liftkit.models.editing import read
from liftkit.options import LAST_SEED, Guidance, Pictures, SampleOptions, Sampler
from liftkit.playground.layout import LARGEST, make_choices, make_view, status_line
from liftkit.playground.run import Cancelled, Painted, Step, paint
from liftkit.playground.shelf import Shelf
from liftkit.playground.streamed import streamed

TITLE = "liftkit try"
LEAD = "Every model starts from the same noise: what differs is what the models do."
RANGES = {"seed": (0, LAST_SEED), "height": (1, LARGEST), "width": (1, LARGEST), "steps": (1, 10_000)}
KEPT = 4
"""Runs whose files are kept; pages show the last."""
ZOOM = "(zoom) => { if (zoom) document.body.dataset.zoom = zoom; else delete document.body.dataset.zoom }"
"""The style of the page enlarges pictures."""
SCROLL = """() => document.addEventListener("scroll", (event) => {
  const panes = [...document.querySelectorAll(".picture .image-container")];
  if (panes.includes(event.target)) for (const pane of panes)
    if (pane !== event.target) pane.scrollTo(event.target.scrollLeft, event.target.scrollTop);
}, true)"""
"""Enlarged pictures scroll together, so that all show the same place."""
REVEAL = """() => {
  const { top, bottom } = document.querySelector("#status").getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) document.querySelector("#status").scrollIntoView({ behavior: "smooth" });
}"""
"""On a narrow page the pictures lie below the choices: a run goes to where they appear."""
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that do not wait for models."""
Changes = dict[Any, Any]
"""What becomes of components of the page; the others stay as they are."""


class Page:
    """The page and what its buttons do.

    Args:
        shelf: the models.
        folder: for pictures, which are deleted again run by run.
    """

    def __init__(self, shelf: Shelf, folder: Path) -> None:
        self.shelf, self.folder = shelf, folder
        self.runs = self.looks = 0
        self.stops: dict[str, Event] = {}
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            gr.HTML(f"<h1>{TITLE}</h1><p>{LEAD}</p>", padding=False)
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=300):
                    self.choices = make_choices(shelf.labels, shelf.can(shelf.labels))
                with gr.Column(scale=5, min_width=300):
                    self.view = make_view(shelf.labels)
            self._wire()

    def _wire(self) -> None:
        """What happens at which event."""
        choices, view = self.choices, self.view
        begin = gr.on([choices.go.click, choices.fields["prompt"].submit], lambda: self._running(True), None,
                      [choices.go, choices.stop], js=REVEAL, **QUICK)  # fmt: skip
        run = begin.then(
            self.paint,
            {choices.models, *choices.fields.values()},
            view.changing,
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
        run.then(lambda: self._running(False), None, [choices.go, choices.stop], **QUICK)
        choices.stop.click(self.stop, None, None, **QUICK)
        given = [choices.fields["image"], choices.fields["references"]]
        for each in given:
            each.change(self.look, given, [choices.seen, view.status], **QUICK)
        choices.dice.click(lambda: randrange(2**31), None, choices.fields["seed"], **QUICK)
        adapted = [*choices.optional.values(), *view.cards.values()]
        choices.models.change(self.adapt, choices.models, adapted, **QUICK)
        shown = [view.results, view.at, view.left, view.right]
        for change in (view.at.change, view.left.input, view.right.input):
            change(self.show, shown, [*view.pictures.values(), view.wipe, view.at], **QUICK)
        view.zoom.change(None, view.zoom, None, js=ZOOM)
        self.blocks.load(None, None, None, js=SCROLL)

    def adapt(self, chosen: Sequence[str]) -> Changes:
        """Show the choices that go with some models, and their cards."""
        can = self.shelf.can(chosen)
        visible = {each: bool(getattr(can, name)) for name, each in self.choices.optional.items()}
        visible |= {card: label in chosen for label, card in self.view.cards.items()}
        return {each: gr.update(visible=value) for each, value in visible.items()}

    def paint(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[Changes]:
        """Paint pictures of the chosen models.

        Args:
            values: of all choices, by component.
            request: tells pages apart.

        Yields:
            What changes, as it comes.
        """
        stop = self.stops[str(request.session_hash)] = Event()
        chosen = values[self.choices.models]
        done: list[Painted] = []
        yield self._fresh()
        try:
            prompt, options = self._asked(chosen, values)
            folder = self._folder()
            for event in streamed(lambda observe: paint(self.shelf, prompt, options, chosen, folder, observe), stop):
                if isinstance(event, Painted):
                    done.append(event)
                    yield self._painted(event)
                else:
                    yield self._step(*event)
            text = status_line(f"Done in {sum(each.seconds for each in done):.1f} s.")
        except Cancelled:
            text = status_line("Stopped.")
        except LiftkitError as error:
            text = self._problem(error)
        yield {self.view.status: text, **self._finished(done)}

    def look(self, image: str | None, references: Sequence[str] | None) -> Changes:
        """Show the pictures that were given, as liftkit reads them."""
        found, status = [], gr.skip()
        self.looks += 1
        for number, path in enumerate([*([image] if image else []), *(references or ())]):
            small = self.folder / f"given-{self.looks}-{number}.png"  # a new name, or the browser shows its old picture
            try:
                picture = read("", Path(path))
            except LiftkitError as error:
                status = self._problem(error)
                continue
            picture.thumbnail((256, 256))
            picture.save(small)
            found.append((str(small), Path(path).name))
        return {self.choices.seen: gr.update(value=found, visible=bool(found)), self.view.status: status}

    def stop(self, request: gr.Request) -> None:
        """End the run of this page at its next step."""
        stop = self.stops.get(str(request.session_hash))
        if stop is not None:
            stop.set()

    def show(self, results: list[Painted], at: float, left: str | None, right: str | None) -> Changes:
        """Show the pictures at a step, counted from 1; behind the last step come the finished pictures."""
        files = {each.model: _files(each) for each in results}
        found = {label: str(each[min(int(at), len(each)) - 1]) for label, each in files.items()}
        changes: Changes = {self.view.pictures[label]: file for label, file in found.items()}
        if left in found and right in found:
            changes[self.view.wipe] = (found[left], found[right])
        return {**changes, self.view.at: gr.update(info=_which(results, int(at)))}

    def _asked(self, chosen: Sequence[str], values: Mapping[Any, Any]) -> tuple[str, SampleOptions]:
        """Prompt and options, without what none of the models can do, which the page does not show."""
        can = self.shelf.can(chosen)
        asked = {name: values[each] for name, each in self.choices.fields.items()}
        asked |= {name: None for name in self.choices.optional if not getattr(can, name)}
        numbers: dict[str, Any] = {name: _whole(name, asked[name], *RANGES[name]) for name in RANGES}
        options = SampleOptions(
            **numbers,
            guidance=Guidance(asked["guidance"]),
            negative=asked["negative"] or None,
            sampler=Sampler(solver=asked["solver"] or None, clamp=asked["clamp"]),
            pictures=Pictures(
                image=Path(asked["image"]) if asked["image"] else None,
                strength=asked["strength"] if asked["image"] else None,
                references=tuple(map(Path, asked["references"] or ())),
            ),
        )
        return asked["prompt"] or "", options

    def _problem(self, error: LiftkitError) -> str:
        """What went wrong, without the folders that pictures were uploaded to."""
        text = re.sub(re.escape(f"{self.folder}/") + r"[^/\s]*/", "", str(error))
        return status_line(text.strip().removeprefix("--"), problem=True)

    def _running(self, runs: bool) -> Changes:
        return {self.choices.go: gr.update(interactive=not runs), self.choices.stop: gr.update(interactive=runs)}

    def _fresh(self) -> Changes:
        """As before the first run."""
        view = self.view
        hidden = {group: gr.update(visible=False) for group in (view.looking, view.wiping)}
        empty = {**dict.fromkeys(view.pictures.values()), **dict.fromkeys(view.notes.values(), "")}
        return {view.results: [], view.status: status_line("Starting."), **hidden, **empty}

    def _step(self, model: str, step: Step | None) -> Changes:
        """A model has taken a step, or is loaded."""
        if step is None:
            return {self.view.status: status_line(f"{model}: loading, unless it is in memory.", 0.0)}
        number, count = step.at.index + 1, step.at.count
        text = f"{model}: step {number} of {count}, noise level {step.at.sigma:.2f}"
        changes: Changes = {self.view.status: status_line(text, number / count)}
        if step.estimate is not None:
            changes[self.view.pictures[model]] = str(step.estimate)
        return changes

    def _painted(self, event: Painted) -> Changes:
        """A picture is finished."""
        made = event.settings
        words = [f"{made['width']} x {made['height']} pixels, {event.seconds:.1f}\N{NO-BREAK SPACE}s"]
        words += [f"takes no {name}" for name in event.left_out]
        return {
            self.view.pictures[event.model]: str(event.file),
            self.view.notes[event.model]: f"<p>{'; '.join(words)}</p>",
        }

    def _finished(self, done: list[Painted]) -> Changes:
        """The ways to look at finished pictures."""
        view, names = self.view, [each.model for each in done]
        changes: Changes = {view.results: done, view.looking: gr.update(visible=bool(done))}
        if done:
            last = max(len(_files(each)) for each in done)
            changes[view.at] = gr.update(maximum=last, value=last, info=_which(done, last))
        if len(names) > 1:
            changes[view.wiping] = gr.update(visible=True)
            changes[view.wipe] = (str(done[0].file), str(done[1].file))
            changes |= {
                side: gr.update(choices=names, value=name) for side, name in zip((view.left, view.right), names)
            }
        return changes

    def _folder(self) -> Path:
        """For the files of a run; those of old ones go."""
        self.runs += 1
        shutil.rmtree(self.folder / f"{self.runs - KEPT}", ignore_errors=True)
        return self.folder / f"{self.runs}"


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """A number that was typed.

    Raises:
        UsageError: if it is none, or out of range.
    """
    if not isinstance(value, int | float) or not float(value).is_integer() or not low <= value <= high:
        raise UsageError(f"{name}: expected a whole number from {low} to {high}, got {value}")
    return int(value)


def _files(painted: Painted) -> list[Path]:
    """The pictures of a run, step by step, the finished one last."""
    return [*(step.estimate for step in painted.steps if step.estimate is not None), painted.file]


def _which(results: list[Painted], at: int) -> str:
    """What the pictures show at a step, counted from 1."""
    steps = results[0].steps if results else ()
    if at > len(steps):
        return "The finished pictures."
    return f"What each model expects to arrive at, after step {steps[at - 1].at.index + 1}."
