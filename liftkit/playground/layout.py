"""What is on the page: choices on the left, pictures of all chosen models beside each other on the right."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from liftkit.options import STRENGTH
from liftkit.playground.abilities import Abilities

LARGEST = 8192
"""Side of a picture in pixels."""

SOLVERS = [("the model's own", ""), "euler", "heun", "unipc"]
"""Those that walk from the same noise in pixels and in latents."""

BOX = 140
"""Height of what takes a file, in pixels."""

ZOOMS = [("fit", ""), *((f"{count} to 1", str(count)) for count in (1, 2, 4, 8, 16))]


@dataclass(frozen=True)
class Choices:
    """What can be chosen.

    Args:
        models: labels.
        fields: the prompt and what makes up :class:`liftkit.options.SampleOptions`, by name.
        optional: those of them that not every model has, by the name of the :class:`Abilities`.
        dice: draws another seed.
        seen: shows the pictures that were given.
        go, stop: begin and end a run.
    """

    models: Any
    fields: dict[str, Any]
    optional: dict[str, Any]
    dice: Any
    seen: Any
    go: Any
    stop: Any


@dataclass(frozen=True)
class View:
    """What is shown.

    Args:
        results: the last run's, a list of :class:`Painted`.
        status: what goes on.
        cards, pictures, notes: of each model, by label.
        looking, zoom, at: the ways to look at pictures, the enlargement, the step.
        wiping, wipe, left, right: the picture that wipes between two models, and which.
    """

    results: Any
    status: Any
    cards: dict[str, Any]
    pictures: dict[str, Any]
    notes: dict[str, Any]
    looking: Any
    zoom: Any
    at: Any
    wiping: Any
    wipe: Any
    left: Any
    right: Any

    @property
    def changing(self) -> list[Any]:
        """All components that a run changes."""
        single = (self.results, self.status, self.looking, self.at, self.wiping, self.wipe, self.left, self.right)
        return [*single, *self.pictures.values(), *self.notes.values()]


def make_choices(labels: list[str], can: Abilities) -> Choices:
    """The left side; what no model can do is hidden."""
    models = gr.CheckboxGroup(labels, value=labels, label="Models", elem_id="models")
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", autofocus=True)
    negative = gr.Textbox(label="Negative prompt", visible=can.negative, elem_id="negative")
    with gr.Row():
        go = gr.Button("Paint", variant="primary", elem_id="paint", min_width=120)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=120)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        dice = gr.Button("Another seed", size="sm", min_width=120, elem_id="dice")
    with gr.Row():
        sides = {name: _side(name.capitalize(), can) for name in ("width", "height")}
    steps = gr.Slider(1, max(100, can.steps), can.steps, step=1, label="Steps", elem_id="steps")
    solver = gr.Dropdown(SOLVERS, value="", label="Solver", elem_id="solver")
    guidance = gr.Slider(1, max(20.0, can.scale), can.scale, step=0.1, label="Guidance", visible=can.guidance)
    about = "Keep the estimates of pixel models within the colors of sRGB at every step."
    clamp = gr.Checkbox(can.clamped, label="Clamp", info=about, visible=can.clamp, elem_id="clamp")
    with gr.Accordion("Pictures to start from", open=False, elem_id="pictures"):
        image = gr.File(label="Start image", height=BOX, elem_id="image")
        about = "Share of the steps that are taken from it: 1 forgets it, little keeps it."
        strength = gr.Slider(0.01, 1.0, STRENGTH, step=0.01, label="Strength", info=about)
        references = gr.File(
            label="Reference images",
            file_count="multiple",
            height=BOX,
            visible=can.references > 0,
            elem_id="references",
        )
        seen = gr.Gallery(label="Given", visible=False, height=160, columns=3, buttons=[], interactive=False)
    optional = {"negative": negative, "guidance": guidance, "clamp": clamp, "references": references}
    fields = {"prompt": prompt, "seed": seed, **sides, "steps": steps, "solver": solver, **optional}
    fields |= {"image": image, "strength": strength}
    return Choices(models, fields, optional, dice, seen, go, stop)


def _side(label: str, can: Abilities) -> Any:
    return gr.Number(
        can.size,
        label=label,
        precision=0,
        step=can.side,
        minimum=can.side,
        maximum=LARGEST // can.side * can.side,
        min_width=120,
    )


def make_view(labels: list[str]) -> View:
    """The right side."""
    results = gr.State([])
    status = gr.HTML(status_line("Ready. Models load when they are first used."), elem_id="status", padding=False)
    cards, pictures, notes = {}, {}, {}
    with gr.Row():
        for label in labels:
            with gr.Column(min_width=150, elem_classes="card") as cards[label]:
                gr.HTML(f'<p class="name">{html.escape(label)}</p>', padding=False)
                pictures[label] = gr.Image(
                    label=label,
                    show_label=False,
                    interactive=False,
                    format="png",
                    type="filepath",
                    buttons=["download", "fullscreen"],
                    elem_classes="picture",
                )
                notes[label] = gr.HTML("", elem_classes="note", padding=False)
    with gr.Group(visible=False) as looking:
        about = "Pixels of the screen to one of the picture; enlarged pictures scroll together."
        zoom = gr.Radio(ZOOMS, value="", label="Zoom", info=about, elem_id="zoom")
        at = gr.Slider(1, 2, 2, step=1, label="Step by step", elem_id="at")
    with gr.Column(visible=False) as wiping:
        with gr.Row():
            left = gr.Dropdown([], label="Wipe between", min_width=120, elem_id="left")
            right = gr.Dropdown([], label="and", min_width=120, elem_id="right")
        wipe = gr.ImageSlider(
            label="Wipe",
            show_label=False,
            interactive=False,
            buttons=["fullscreen"],
            elem_id="wipe",
            elem_classes="picture",
            max_height=2000,
        )
    return View(results, status, cards, pictures, notes, looking, zoom, at, wiping, wipe, left, right)


def status_line(text: str, fraction: float | None = None, problem: bool = False) -> str:
    """What goes on, as a text, and how far it is."""
    bar = "" if fraction is None else f'<progress max="1" value="{fraction:.4f}"></progress>'
    kind = ' class="problem" role="alert"' if problem else ""
    return f"<p{kind}>{html.escape(text)}</p>{bar}"


def style() -> str:
    """CSS of the page."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def theme() -> Any:
    """The fonts of the machine, so that none is fetched."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="blue", neutral_hue="stone", font=sans, font_mono=mono)
