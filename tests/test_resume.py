"""Going on with a run by the command line: by which recipe, from which checkpoint, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from liftkit.data import demo
from liftkit.errors import UsageError
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.recipe_paths import paths_from
from liftkit.finetune.resume import compare_recipes
from liftkit.finetune.run_folder import RunFolder, resume_command
from liftkit.finetune.state import checkpoints
from tests.training import few_steps


@pytest.fixture(scope="module")
def trained(pixel_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, and a run of two steps on them, both by relative paths; not to be changed."""
    from liftkit.finetune.run import finetune

    root = tmp_path_factory.mktemp("trained")
    (root / "photos").mkdir()
    for index in range(6):
        Image.fromarray(demo.image_at(index)[0]).save(root / "photos" / f"{index}.png")
    (root / "pixel").symlink_to(pixel_klein)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        finetune(load_recipe("tiny-klein", few_steps("my run")))
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    copied = tmp_path / "place"
    shutil.copytree(trained, copied, symlinks=True)
    monkeypatch.chdir(copied)
    began_in(copied / "my run", copied)
    return copied


def began_in(run: Path, directory: Path) -> None:
    """Relative paths of a run's recipe are looked for in the directory where it was started."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "directory": str(directory)}))


def recipe_of(run: Path) -> dict[str, Any]:
    return load_recipe(run / "recipe.yaml").model_dump(mode="json")


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("named", ["my run", "my run/", "my run/checkpoints", "my run/checkpoints/step-0000002"])
def test_a_run_goes_on_by_its_own_recipe(place: Path, cli, named: str) -> None:
    before = recipe_of(place / "my run")
    code, _, stderr = cli("finetune", "--resume", named, "steps=3")
    assert code == 0, stderr
    assert "note: my run: steps was 2, it is 3 now" in stderr
    assert "not as it would have" not in stderr
    assert recipe_of(place / "my run") == {**before, "steps": 3}
    assert steps_of(place / "my run")[-1] == 3


def test_the_line_that_is_printed_at_a_stop_can_be_pasted(place: Path, cli) -> None:
    (place / "my run" / "stop").touch()
    code, stdout, stderr = cli("finetune", "--resume", "my run", "steps=9")
    assert code == 130, stderr
    (line,) = [line for line in stdout.splitlines() if line.startswith("go on")]
    command = shlex.split(line.removeprefix("go on").strip())
    assert command == ["liftkit", "finetune", "--resume", "my run"]
    assert stderr.rstrip().endswith(shlex.join(command))
    code, stdout, stderr = cli(*command[1:])
    assert code == 0, stderr
    assert "9 of 9" in stdout


def test_a_dry_run_of_a_run_without_a_checkpoint_plans_its_beginning(place: Path, cli) -> None:
    for name in ("checkpoints", "model"):
        shutil.rmtree(place / "my run" / name)
    log = (place / "my run" / "log.jsonl").read_bytes()
    assert log
    note = "my run: the run there ended before its first checkpoint; it begins again at step 0"
    code, stdout, stderr = cli("finetune", "--resume", "my run", "--dry-run")
    assert (code, note in stderr) == (0, True), stderr
    assert "for 2 steps" in stdout
    assert (place / "my run" / "log.jsonl").read_bytes() == log, "a dry run leaves the log as it is"
    code, _, stderr = cli("finetune", "--resume", "my run")
    assert (code, note in stderr) == (0, True), stderr
    rows = [json.loads(line) for line in (place / "my run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2], "its log begins again too"


def test_the_recipe_of_a_run_keeps_what_it_was(place: Path, cli) -> None:
    for steps, rate in ((3, 1e-3), (4, 2e-3)):
        code, _, stderr = cli("finetune", "--resume", "my run", f"steps={steps}", f"optimizer.learning_rate={rate}")
        assert code == 0, stderr
    assert "goes on from step 3, but not as it would have by its own recipe" in stderr
    comments = [line for line in (place / "my run" / "recipe.yaml").read_text().splitlines() if line.startswith("#")]
    assert comments == [
        "# Since step 2: optimizer.learning_rate was 0.002, it is 0.001 now",
        "# Since step 2: steps was 2, it is 3 now",
        "# Since step 3: optimizer.learning_rate was 0.001, it is 0.002 now",
        "# Since step 3: steps was 3, it is 4 now",
    ]
    assert [each["step"] for each in json.loads((place / "my run" / "run.json").read_text())["resumed"]] == [2, 3]


def test_a_recipe_that_is_named_is_not_taken_in_silence(place: Path, cli) -> None:
    code, stdout, stderr = cli(
        "finetune", "tiny-klein", *few_steps("my run", batch_size=1, steps=3), "--resume", "latest", "--dry-run"
    )
    assert code == 0, stderr
    assert "note: my run: batch_size was 2, it is 1 now" in stderr
    assert "not as it would have" in stderr
    assert steps_of(place / "my run") == [1, 2], stdout


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_another_model_is_refused_in_one_line_that_names_both(place: Path, cli, dry: tuple[str, ...]) -> None:
    before = (place / "my run" / "recipe.yaml").read_text()
    code, _, stderr = cli("finetune", "tiny-klein", "--resume", "latest", "-o", "my run", *dry)
    assert (code, stderr.count("\n")) == (2, 2)
    assert "the run trains pixel, the recipe's is demo" in stderr
    assert "liftkit finetune --resume 'my run'" in stderr
    assert (place / "my run" / "recipe.yaml").read_text() == before
    assert not (place / "my run" / "base").exists()


def spoil(folder: Path, name: str) -> None:
    """Another digest of one file in a model's record: what a conversion by another lift or of another model has."""
    record = json.loads((folder / "liftkit.json").read_text())
    assert name in record["digests"]
    record["digests"][name] = f"blake3:{0:064}"
    (folder / "liftkit.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("file", "what"),
    [("lift.safetensors", "lift"), ("transformer/diffusion_pytorch_model.safetensors", "model")],
)
def test_another_conversion_at_the_same_place_is_refused(
    place: Path, pixel_klein: Path, cli, file: str, what: str
) -> None:
    (place / "pixel").unlink()
    shutil.copytree(pixel_klein, place / "pixel")
    assert cli("finetune", "--resume", "my run", "--dry-run")[0] == 0
    spoil(place / "pixel", file)
    code, _, stderr = cli("finetune", "--resume", "my run", "steps=3")
    assert (code, stderr.count("\n")) == (2, 2)
    assert f"another {what}: the run trains pixel ({file} " in stderr
    assert f"the recipe's is pixel ({file} 00000000)" in stderr


def test_another_architecture_is_refused(place: Path, cli) -> None:
    for name in ("run.json", "checkpoints/step-0000002/state.json"):
        text = (place / "my run" / name).read_text()
        (place / "my run" / name).write_text(text.replace("AsymFlux2Transformer2DModel", "AsymSD3Transformer2DModel"))
    code, _, stderr = cli("finetune", "--resume", "my run")
    assert code == 2
    assert "another architecture: the run trains pixel (AsymSD3Transformer2DModel), the recipe's is" in stderr


@pytest.mark.parametrize(
    "override",
    [
        "trainable.mode=lora",
        "ema.enabled=false",
        "objective.adversarial=1",
        "space=latent objective.loss=flow trainable.open=0",
    ],
)
def test_what_a_checkpoint_does_not_hold_is_refused_before_anything_is_loaded(place: Path, cli, override: str) -> None:
    code, _, stderr = cli("finetune", "--resume", "my run", *override.split())
    assert (code, stderr.count("\n")) == (2, 2)
    assert override.partition("=")[0] in stderr
    assert steps_of(place / "my run") == [1, 2]


def test_another_optimizer_begins_anew(place: Path, cli) -> None:
    code, _, stderr = cli("finetune", "--resume", "my run", "steps=3", "optimizer.name=muon")
    assert code == 0, stderr
    assert 'optimizer.name was "adamw", it is "muon" now' in stderr


def test_a_run_goes_on_from_another_directory_and_after_it_moved(
    place: Path, cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "moved"
    (place / "my run").rename(moved)
    # The photographs and the model lie where the run was started, and nowhere from here.
    code, _, stderr = cli("finetune", "--resume", "moved", "steps=3")
    assert code == 0, stderr
    assert load_recipe(moved / "recipe.yaml").output == Path("moved")
    assert steps_of(moved)[-1] == 3


def test_paths_of_a_new_network_are_looked_for_where_the_run_began(tmp_path: Path) -> None:
    for name in ("began/vae", "began/photos", "began/demo", "began/10"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "began" / "lift.safetensors").touch()
    paths = {"vae": "vae", "subspace": "lift.safetensors", "images": "photos", "classes": "photos"}
    found = paths_from(json.dumps({"model": "new", "network": paths}), tmp_path / "began")
    assert found == {f"network.{key}": str(tmp_path / "began" / name) for key, name in paths.items()}
    # These are names of what is embedded and a number, whatever folders there are.
    embedded = {"model": "demo", "network": {"vae": "demo", "images": "demo", "classes": "10"}}
    assert paths_from(json.dumps(embedded), tmp_path / "began") == {}


def test_a_model_that_moved_is_found_by_its_new_name(place: Path, cli) -> None:
    (place / "pixel").rename("renamed")
    code, _, stderr = cli("finetune", "--resume", "my run", "--dry-run")
    assert code == 2
    assert "model: no folder pixel" in stderr
    code, _, stderr = cli("finetune", "--resume", "my run", "model=renamed", "steps=3")
    assert code == 0, stderr


def test_a_checkpoint_goes_on_in_a_new_folder_and_never_in_another_run(place: Path, cli) -> None:
    checkpoint = "my run/checkpoints/step-0000001"
    code, _, stderr = cli("finetune", "--resume", checkpoint, "-o", "branch")
    assert code == 0, stderr
    assert steps_of(place / "branch") == [2]
    code, _, stderr = cli("finetune", "--resume", checkpoint, "-o", "branch")
    assert code == 2
    assert "branch: holds another run than my run/checkpoints/step-0000001" in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume", "latest"), "of which run?"),
        (("--resume", "nowhere"), "no such folder"),
        (("--resume", "photos"), "no run and no complete checkpoint"),
        (("steps=3",), "no recipe: name one"),
        (("my run",), "give its folder by --resume"),
        (("tiny-klein", "--resume", "latest", "-o", "new"), "no complete checkpoint"),
    ],
)
def test_what_cannot_go_on_says_what_to_do(place: Path, cli, arguments: tuple[str, ...], words: str) -> None:
    code, _, stderr = cli("finetune", *arguments)
    assert (code, words in stderr) == (2, True), stderr
    assert not (place / "new").exists()


def test_a_finished_run_asked_for_fewer_steps_says_that_nothing_is_left(place: Path, cli) -> None:
    code, stdout, stderr = cli("finetune", "--resume", "my run", "steps=1")
    assert code == 0, stderr
    assert "2 done before, 1 asked for: nothing was left to train" in stdout


def test_changes_of_a_recipe_are_those_of_its_keys(place: Path) -> None:
    before = recipe_of(place / "my run")
    assert compare_recipes(before, {**before, "output": "elsewhere"}) == []
    now = {**before, "data": {**before["data"], "sources": [{"kind": "demo", "count": 3, "weight": 1.0}]}}
    (change,) = compare_recipes(before, now)
    assert str(change).startswith('data.sources was [{"kind": "folder"')


def test_processes_go_on_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resume_command(Path("runs/a b")) == "liftkit finetune --resume 'runs/a b'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    gpus = "accelerate launch --multi_gpu --num_processes 4 -m"
    for cpu, launch in ((False, gpus), (True, "torchrun --nproc_per_node 4 -m")):
        monkeypatch.setattr("liftkit.finetune.run_folder.launched_on_cpu", lambda cpu=cpu: cpu)
        assert resume_command(Path("runs/a")) == f"{launch} liftkit finetune --resume runs/a"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in (
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "1"),
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_PORT", "29500"),
    ):
        monkeypatch.setenv(name, value)
    machines = "--num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    launch = f"accelerate launch --use_fsdp --fsdp_version 2 {machines} --num_processes 4 -m"
    assert resume_command(Path("runs/a")) == f"{launch} liftkit finetune --resume runs/a"


@pytest.mark.parametrize("place", [".", "transformer", "new/run"])
def test_no_run_begins_inside_of_a_model(place: str, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="inside of the model"):
        RunFolder(tmp_path / place).check(resuming=False)


def test_a_dry_run_refuses_the_output_of_another_run(place: Path, cli) -> None:
    for dry in ((), ("--dry-run",)):
        code, _, stderr = cli("finetune", "tiny-klein", *few_steps("my run"), *dry)
        assert (code, "holds a run already" in stderr) == (2, True), stderr
