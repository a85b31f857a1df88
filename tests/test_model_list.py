"""``liftkit models``: the list of what is supported is current, complete and readable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import liftkit
from liftkit.errors import UsageError
from liftkit.models.catalog import FILE, PROOFS, catalog, supported
from liftkit.models.registry import architecture
from tools.model_table import BEGIN, END, PAGES, listing

Cli = Callable[..., tuple[int, str, str]]


def test_the_list_and_its_tables_are_current() -> None:
    assert FILE.read_text() == listing(), "python -m tools.model_table makes it anew"
    for page, content in PAGES.items():
        assert page.read_text().partition(BEGIN)[2].partition(END)[0].strip() == content().strip(), page


def test_the_list_holds_every_architecture_and_says_of_each_proof_how_or_why_not() -> None:
    found = {each.name: each for each in catalog()}
    assert set(found) == set(liftkit.architectures())
    for each in found.values():
        assert "bare" in each.proved
        assert set(each.proved) | set(each.missing) == set(PROOFS)
        assert not set(each.proved) & set(each.missing)
        assert each.dim == 3 * each.patch**2 > each.rank > 0


def test_models_are_listed_and_shown(cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    assert all(each.name in out for each in catalog())
    code, out, _ = cli("models", "AsymFlux2Transformer2DModel")
    assert code == 0
    assert "Flux2KleinPipeline" in out
    assert "128 / 16 / 768" in out
    code, out, _ = cli("--json", "models")
    answer = json.loads(out)["models"]
    assert [each["name"] for each in answer] == [each.name for each in catalog()]
    assert answer[0]["proved"]["bare"].startswith("float64")


def test_a_class_that_is_not_known_gets_the_nearest_name_and_a_pointer(cli: Cli) -> None:
    code, _, err = cli("models", "FluxTransformerModel")
    assert code == 2
    assert "did you mean Flux" in err
    assert "docs/extending.md" in err
    for ask in (supported, architecture):
        with pytest.raises(UsageError, match="liftkit models lists those that are"):
            ask("UNet2DConditionModel")
    assert (Path(__file__).parents[1] / "docs" / "extending.md").is_file()
