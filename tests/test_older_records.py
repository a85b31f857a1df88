"""Records of older versions, whose digests are SHA-256, beside those of this one: read, verified, compared, gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liftkit.checkpoint.folder import manifest
from liftkit.checkpoint.hashing import algorithm_of, named_digests
from liftkit.checkpoint.model import find_model
from liftkit.checkpoint.record import like, read_record, transformer_digests, write_record
from liftkit.conversion.audit import Check as AuditCheck
from liftkit.conversion.audit import _Auditor
from liftkit.errors import UsageError
from liftkit.finetune.resume import Resumption, check_model, model_record
from liftkit.models.adapted import check_needs
from liftkit.progress import Silent

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of all files but the record, as older versions wrote them."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop("liftkit.json", None)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


@pytest.fixture
def folder(pixel_klein: Path, tmp_path: Path) -> Path:
    shutil.copytree(pixel_klein, tmp_path / "pixel")
    return tmp_path / "pixel"


@pytest.fixture
def older(folder: Path) -> Path:
    """A conversion with the record that an older version would have written."""
    record = json.loads((folder / "liftkit.json").read_text())
    old = sums(folder)
    tensors = {
        old[name]: record["tensors"][new] for name, new in record.pop("digests").items() if new in record["tensors"]
    }
    (folder / "liftkit.json").write_text(json.dumps({**record, "sha256": old, "tensors": tensors}))
    return folder


def manifest_check(folder: Path) -> AuditCheck:
    check = AuditCheck("manifest")
    _Auditor(folder, None, Silent())._manifest(check)
    return check


def test_new_records_have_digests_that_name_their_hash(folder: Path) -> None:
    digests = json.loads((folder / "liftkit.json").read_text())["digests"]
    assert {**digests, "liftkit.json": ""} == {**manifest(folder), "liftkit.json": ""}
    assert {algorithm_of(digest) for digest in digests.values()} == {"blake3"}
    from blake3 import blake3

    assert digests[WEIGHTS] == f"blake3:{blake3((folder / WEIGHTS).read_bytes()).hexdigest()}"


def test_an_older_record_verifies_and_tells_which_tensor_was_spoiled(older: Path) -> None:
    found = manifest_check(older)
    assert found.ok
    assert found.detail.endswith("by SHA-256")
    with (older / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    (problem,) = manifest_check(older).problems
    assert problem.startswith(f"{WEIGHTS}: changed: tensor '")


def test_both_tables_in_one_record(older: Path) -> None:
    record = json.loads((older / "liftkit.json").read_text())
    name = "lift.safetensors"
    del record["sha256"][name]
    record["digests"] = {name: manifest(older)[name]}
    (older / "liftkit.json").write_text(json.dumps(record))
    found = manifest_check(older)
    assert found.ok
    assert found.detail.endswith("by BLAKE3 and SHA-256")


@pytest.mark.parametrize(
    ("table", "digest", "words"),
    [
        ("digests", "md5:00", "'md5:00' is no digest of blake3 or sha256"),
        ("digests", 7, "is 7, expected text"),
        ("sha256", [], "expected text"),
        ("digests", None, "digests is a str, expected a table"),
    ],
)
def test_digests_that_nobody_knows_are_named(folder: Path, table: str, digest: Any, words: str) -> None:
    record = json.loads((folder / "liftkit.json").read_text())
    record[table] = {"lift.safetensors": digest} if digest is not None else "none"
    (folder / "liftkit.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=words):
        read_record(folder)


def test_a_record_that_begins_from_an_older_one_is_new(older: Path) -> None:
    (older / "liftkit.json").unlink()
    write_record(older, {"format": "x", "sha256": {"gone": "00"}})
    record = json.loads((older / "liftkit.json").read_text())
    assert record.keys() == {"format", "digests"}
    assert "gone" not in record["digests"]


def test_an_adapter_that_needs_a_folder_finds_it_under_either_record(folder: Path) -> None:
    old = {name: digest for name, digest in sums(folder).items() if name in transformer_digests(folder)}
    for needs in ({"sha256": old}, {"digests": transformer_digests(folder)}):
        adapter = SimpleNamespace(provenance={"needs": {"name": "pixel", **needs}})
        check_needs(adapter, find_model(str(folder)))  # type: ignore[arg-type]
    spoiled = SimpleNamespace(provenance={"needs": {"name": "pixel", "sha256": dict.fromkeys(old, "0" * 64)}})
    with pytest.raises(UsageError, match="learned upon pixel"):
        check_needs(spoiled, find_model(str(folder)))  # type: ignore[arg-type]


def test_a_run_of_an_older_version_goes_on_with_the_same_model_alone(folder: Path) -> None:
    model = find_model(str(folder))
    before = {"name": "pixel", "class": model.class_of("transformer"), "sha256": sums(folder)}
    run = Resumption(Path("run"), Path("run/checkpoints/step-0000001"), 1, [], before)
    check_model(run, model_record(model, run))
    before["sha256"] = {**before["sha256"], WEIGHTS: "0" * 64}
    with pytest.raises(UsageError, match=f"another model.*{WEIGHTS} 00000000"):
        check_model(run, model_record(model, run))
    before["digests"] = {WEIGHTS: "md5:00"}
    with pytest.raises(UsageError, match=f"{WEIGHTS}: cannot be compared .*'md5:00' is no digest of blake3 or sha256"):
        model_record(model, run)


def test_only_what_differs_in_its_hash_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "liftkit.checkpoint.record.digest_file",
        lambda path, algorithm: read.append(path.name) or SimpleNamespace(value="sha256:aa"),
    )
    found = named_digests(read_record(folder))
    assert like(found, found, folder) == found
    assert read == []
    assert like({"lift.safetensors": "sha256:bb"}, found, folder) == {**found, "lift.safetensors": "sha256:aa"}
    assert read == ["lift.safetensors"]


def test_images_of_an_older_version_are_gone_on_with(cli: Cli, tmp_path: Path) -> None:
    few = ("--prompts", "demo", "-n", "1", "--steps", "1", "--device", "cpu")
    assert cli("generate", "demo", *few, "-o", tmp_path / "set")[0] == 0
    file, model = tmp_path / "set" / "generate.json", find_model("demo")
    record = json.loads(file.read_text())
    assert record["settings"]["model_digest"].startswith("blake3:")
    whole = hashlib.sha256(json.dumps(model.index, sort_keys=True).encode())
    for name in sorted(model.components):
        if (model.path / name).is_dir():
            whole.update(json.dumps(sums(model.path / name)).encode())
    record["settings"]["model_digest"] = whole.hexdigest()
    file.write_text(json.dumps(record))
    code, out, err = cli("generate", "demo", *few, "-o", tmp_path / "set")
    assert code == 0, err
    assert "0 new images" in out
    record["settings"]["model_digest"] = "0" * 64
    file.write_text(json.dumps(record))
    assert cli("generate", "demo", *few, "-o", tmp_path / "set")[0] == 2
