"""An exported student is the student, and runs without this package."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from pursuhint_lib import export
from pursuhint_lib.arms import kept_file
from pursuhint_lib.comparison import summarize
from pursuhint_lib.export import check_export, choose_student, export_student, main, write_programs
from pursuhint_lib.models import build_model, load_model, save_model
from pursuhint_lib.params import STAGES, DistillStudents, Images, TrainTeacher
from pursuhint_lib.status import study_lock
from pursuhint_lib.storage import REPOSITORY, read_json, save_json, save_table, sha256
from pursuhint_lib.study import study_images

PARAMS = DistillStudents(study="toy", teacher="resnet8_w8", student="resnet8_w4", seeds=[0, 1, 2], noise=0.25)
RUN = "0123456789abcdef0123456789abcdef"
# arm -> same_as, validation accuracy of seeds 0, 1, 2 (None: failed in training)
ARMS = {
    "unaided": ("", [0.90, 0.90, 0.90]),
    "kd": ("", [0.60, 0.62, 0.61]),
    "at_uniform": ("", [0.70, 0.72, 0.72]),
    "at_clustered_r2_cca": ("", [0.72, 0.70, 0.72]),  # the same mean as at_uniform
    "at_stage_ends": ("at_uniform", [0.70, 0.72, 0.72]),
    "at_random_0": ("", [0.65, None, 0.66]),
    "crd_random_0": ("", [None, None, None]),
}


def lively(network, seed):
    """Weights and batch-norm statistics that are no defaults, so that a mistake shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def make_study(home):
    """A study "toy" below `home` as far as an export reads it, with students that nobody trained."""
    teach, _, _, distill, evaluate = (home / "runs" / "toy" / stage for stage in STAGES)
    images = study_images(PARAMS)
    save_json(images.facts() | {"data": "digits", "evaluation_repeats": 1}, teach / "images.json")
    results, students = [], []
    random = np.random.default_rng(3)
    for arm, (same_as, accuracies) in ARMS.items():
        method = {"unaided": "none", "kd": "kd"}.get(arm, arm.partition("_")[0])
        strategy = arm.partition("_")[2] or "none"
        for seed, accuracy in enumerate(accuracies):
            about = {"arm": arm, "method": method, "strategy": strategy, "same_as": same_as, "seed": seed}
            if arm != "unaided":
                status = "failed" if accuracy is None else "trained"
                students.append(about | {"val_accuracy": accuracy or 0.1, "status": status})
            if accuracy is None:
                continue
            measured = {"test_accuracy": 0.5 + 0.01 * random.random(), "test_loss": 1.25, "top5": 0.975}
            measured |= {"agreement": 0.75, "ece": 0.0625, "temperature": 1.375, "ece_scaled": 0.03125}
            results.append(about | {"val_accuracy": accuracy} | measured)
            if not same_as:
                network = build_model("resnet8_w4", 10, channels=1)
                folder = teach if arm == "unaided" else distill
                save_model(lively(network, seed), kept_file(folder, arm, seed), val_accuracy=accuracy)
    results = pd.DataFrame(results)
    save_table(results, evaluate / "results.csv")
    summary = summarize(results, 0.8)
    save_table(summary.assign(reading="includes zero"), evaluate / "summary.csv")
    save_json({"confidence": 0.9, "reference": "kd"}, evaluate / "settings.json")
    teacher = {"network": "resnet8_w8", "parameters": 19_834, "macs": 150_000, "val_accuracy": 0.82}
    save_json(teacher | {"test_accuracy": 0.8125, "test_loss": 0.75}, evaluate / "teacher.json")
    save_table(pd.DataFrame(students), distill / "students.csv")
    pair = {"method": "at", "hint": 1, "teacher_layer": "stage2.0", "student_layer": "stage1.0"}
    pair |= {"teacher_shape": "16x4x4", "student_shape": "4x8x8", "source": "trained", "redrawn": 0}
    save_table(pd.DataFrame([{"arm": arm} | pair for arm in ARMS if arm.startswith("at")]), distill / "pairs.csv")
    models = {f"{arm}-s{seed}": RUN for arm in ARMS for seed in range(3)}
    record = {"key": "k", "outputs": {}, "seconds": 1.0, "ended": "", "versions": {}, "hardware": {}}
    made_from = {"notebook": "", "library": {}, "lock": "", "reads": {}}
    record["inputs"] = made_from | {"parameters": PARAMS.model_dump()}
    record |= {"source": {"commit": "c0ffee", "dirty": True}, "runs": {"notebook": "feed", "models": models}}
    record["runs"]["trained_at"] = {name: {"commit": "decade", "dirty": True} for name in models}
    save_json(record, distill / "record.json")
    unaided = TrainTeacher(study="toy", noise=PARAMS.noise, epochs=3)
    save_json(record | {"inputs": made_from | {"parameters": unaided.model_dump()}}, teach / "record.json")
    return images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with the study, and its default student exported there: (home, folder of the export, what was said)."""
    import contextlib
    import io

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setenv("PURSUHINT_HOME", str(home))
        make_study(home)
        folder = export_student("toy")
    return home, folder, said.getvalue()


@pytest.fixture
def study(made, home):
    """The study again in a home of the test's own, nothing exported yet: the folder of its runs."""
    shutil.copytree(made[0] / "runs", home / "runs")
    return home / "runs" / "toy"


# ----------------------------------------------------------------------------------------------------------- choosing


def test_validation_chooses_among_aided_arms_and_seeds_and_the_first_of_equals_counts(study):
    choice = choose_student("toy")
    assert choice[:2] == ("at_clustered_r2_cca", 0) and choice.by_validation
    assert "71.3%" in choice.why and "5 aided" not in choice.why and "\n" not in choice.why


def test_test_images_have_no_say(study):
    before = choose_student("toy")
    for path in (study / "05_evaluate" / "results.csv", study / "05_evaluate" / "summary.csv"):
        table = pd.read_csv(path)
        of_test = [name for name in table if name.startswith(("test", "difference", "gap", "top5", "agreement", "ece"))]
        save_table(table.assign(**-table[of_test]).iloc[::-1], path)
    assert choose_student("toy") == before


@pytest.mark.filterwarnings("error")
def test_a_study_in_which_no_arm_repeats_another_is_read_too(study):
    for path in (study / "05_evaluate" / "results.csv", study / "05_evaluate" / "summary.csv"):
        table = pd.read_csv(path)
        save_table(table[table["same_as"].isna()], path)
    assert choose_student("toy")[:2] == ("at_clustered_r2_cca", 0)


def test_an_arm_that_repeats_another_gives_the_others_student(study):
    choice = choose_student("toy", "at_stage_ends")
    assert choice[:2] == ("at_uniform", 1) and "at_stage_ends" in choice.why


def test_arm_and_seed_can_be_asked_for(study):
    assert choose_student("toy", "unaided", 2)[:2] == ("unaided", 2)
    assert choose_student("toy", "kd")[:2] == ("kd", 1)
    asked = choose_student("toy", seed="2")
    assert asked[:2] == ("at_clustered_r2_cca", 2) and not asked.by_validation


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["toi"], ["'toi'", "did you mean 'toy'"]),
        (["../toy"], ["'../toy'", "toy"]),
        ([""], ["has been run", "toy"]),
        (["toy", "--arm=at_unifrom"], ["did you mean 'at_uniform'", "at_stage_ends", "unaided"]),
        (["toy", "--arm=crd_random_0"], ["crd_random_0", "failed"]),
        (["toy", "--arm=at_random_0", "--seed=1"], ["seed 1", "failed", "0, 2"]),
        (["toy", "--arm=kd", "--seed=7"], ["seed 7", "0, 1, 2"]),
        (["toy", "--seed=one"], ["seed one", "0, 1, 2"]),
    ],
)
def test_what_is_not_there_is_answered_in_one_line(study, capsys, arguments, parts):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (study.parent.parent / "reports").exists()


def test_a_study_that_is_not_finished_is_answered_in_one_line(study, capsys):
    with study_lock("toy"):
        assert main(["toy"]) == 1
    assert "is running" in capsys.readouterr().err
    (study / "05_evaluate" / "results.csv").unlink()
    assert main(["toy"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "make reproduce STUDY=toy" in err


def test_a_student_that_the_tables_do_not_know_is_refused(study, capsys):
    file = kept_file(study / "04_distill_students", "kd", 1)
    save_model(load_model(file)[0], file, val_accuracy=0.5)
    assert main(["toy", "--arm=kd"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "kd-s1" in err
    file.write_bytes(b"half")
    assert main(["toy", "--arm=kd"]) == 1
    assert "kd-s1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what is there


def test_the_files_are_whole_and_said_to_be_the_students(made):
    _, folder, said = made
    facts = read_json(folder / "facts.json")
    names = {path.name for path in folder.iterdir()}
    assert names - {"student.onnx"} == {"student.pt2", "student.pth", "MODEL_CARD.md", "facts.json"}
    assert facts["files"] == {name: sha256(folder / name) for name in names - {"facts.json"}}
    assert facts["check"]["images"] == 200 and facts["check"]["batch_sizes"] == [1, 7, 200]
    assert 0 <= facts["check"]["largest_difference"]["student.pt2"] <= 1e-4 * facts["check"]["largest_logit"]
    assert facts["check"]["largest_logit"] > 0.05
    assert said.splitlines()[0].startswith("exporting at_clustered_r2_cca seed 0 of toy: best mean on validation")
    assert "200 validation images" in said
    assert [path.name for path in folder.parent.iterdir()] == ["student"], "nothing is left beside it"


def test_the_program_takes_pixels_and_gives_the_students_logits(made):
    home, folder, _ = made
    facts = read_json(folder / "facts.json")
    student = load_model(kept_file(home / "runs" / "toy" / "04_distill_students", facts["arm"], facts["seed"]))[0]
    program = torch.export.load(folder / "student.pt2").module()
    mean, std = (torch.tensor(facts[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        for size in (1, 7, 300):
            pixels = torch.rand(size, 1, 8, 8)
            torch.testing.assert_close(program(pixels), student((pixels - mean) / std), rtol=1e-5, atol=1e-5)


def test_the_state_dict_is_the_bare_networks(made):
    home, folder, _ = made
    facts = read_json(folder / "facts.json")
    student = load_model(kept_file(home / "runs" / "toy" / "04_distill_students", facts["arm"], facts["seed"]))[0]
    state = torch.load(folder / "student.pth", weights_only=True)
    spec = facts["network"]
    build_model(spec["name"], spec["classes"], channels=spec["channels"]).load_state_dict(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_the_lines_of_the_card_run_in_a_fresh_process_beside_nothing_but_the_program(made, tmp_path):
    _, folder, _ = made
    shutil.copy(folder / "student.pt2", tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "MODEL_CARD.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(lines.replace("\n\n", "\n").splitlines()) <= 6
    lines += "import sys\nassert not [name for name in sys.modules if name.startswith('pursuhint')]\n"
    done = subprocess.run([sys.executable, "-I", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d+", done.stdout)) == 7


def test_the_fresh_process_cannot_import_this_package(made, monkeypatch):
    monkeypatch.setattr(export, "FRESH_PROCESS", export.FRESH_PROCESS + "\nimport pursuhint_lib.models\n")
    network = build_model("resnet8_w4", 10, channels=1)
    with pytest.raises(ValueError, match="must do without pursuhint_lib"):
        check_export(made[1], network, PARAMS)


def test_no_file_says_where_it_was_made_and_the_same_student_gives_the_same_bytes(made, study, home, capsys):
    _, folder, _ = made
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in (str(REPOSITORY), str(made[0]), sys.prefix, "site-packages"):
            assert place.encode() not in content, (path.name, place)
    again = export_student("toy")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_numbers_of_the_card_are_those_of_the_tables(made):
    home, folder, _ = made
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    runs = home / "runs" / "toy"
    results = pd.read_csv(runs / "05_evaluate" / "results.csv")
    row = results[(results["arm"] == "at_clustered_r2_cca") & (results["seed"] == 0)].iloc[0]
    summary = summarize(results.fillna({"same_as": ""}), 0.8, confidence=0.9).set_index("arm")
    own = summary.loc["at_clustered_r2_cca"]
    interval = f"{own.test_mean:.1%} ({own.test_low:.1%} to {own.test_high:.1%})"
    assert f"| accuracy, test images | {row.test_accuracy:.1%} | {interval} | 81.2% |" in card
    assert "its arm: mean of 3 seeds (90% interval)" in card
    for shown in ("97.5%", "6.2%", "3.1%", "1.375", "1.250", "19,834", "150,000", "75.0%"):
        assert shown in card, shown
    assert "| at 1 | `stage2.0` (16x4x4) | `stage1.0` (4x8x8) |" in card
    assert "standard deviation 0.25 on the scale" in card and "adds none" in card
    assert "includes zero" in card and RUN in card and "Trained by `04_distill_students`" in card
    assert "`decade`, with uncommitted changes" in card
    parameters = sum(p.numel() for p in build_model("resnet8_w4", 10, channels=1).parameters())
    assert f"| parameters | {parameters:,} |" in card
    assert "Test images had no say" in card


def test_the_name_of_a_class_is_text_on_the_card_whatever_it_is_made_of(study):
    path = study / "01_train_teacher" / "images.json"
    facts = read_json(path)
    save_json(facts | {"classes": ["<img src=x onerror=alert(1)>", *facts["classes"][1:]]}, path)
    card = (export_student("toy", "unaided", 0) / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "of the logits: &lt;img src=x onerror=alert(1)&gt;, 1, 2" in card and "<img" not in card


def test_a_card_says_nothing_of_what_a_student_has_not(study, capsys):
    path = study / "05_evaluate" / "results.csv"
    table = pd.read_csv(path).drop(columns=["ece", "ece_scaled", "temperature"])
    save_table(table.assign(top5=float("nan")), path)  # five classes or fewer
    card = (export_student("toy", "unaided", 0) / "MODEL_CARD.md").read_text(encoding="utf-8")
    for absent in ("first five", "temperature", "teacher layer", "no say", "nan", "Calibration"):
        assert absent not in card, absent
    assert "3 epochs" in card and "Labels alone, no teacher: arm `unaided`" in card and "asked for by name" in card


# -------------------------------------------------------------------------------------------------------- what breaks


def test_a_wrong_mean_is_noticed_and_nothing_is_written(study, home, capsys):
    facts = read_json(study / "01_train_teacher" / "images.json")
    facts["mean"] = [facts["mean"][0] + 0.05]
    save_json(facts, study / "01_train_teacher" / "images.json")
    assert main(["toy"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not give the student's logits" in err
    assert list((home / "reports").rglob("*")) == [home / "reports" / "toy"]


def test_an_earlier_export_stays_when_the_check_fails(study, home, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no")

    monkeypatch.setattr(export, "check_export", fails)
    final = home / "reports" / "toy" / "student"
    final.mkdir(parents=True)
    (final / "student.pt2").write_text("earlier")
    assert main(["toy"]) == 1
    assert [path.read_text() for path in final.iterdir()] == ["earlier"]
    assert list(final.parent.iterdir()) == [final]


def test_the_files_of_another_student_are_noticed(made, tmp_path):
    home, folder, _ = made
    file = kept_file(home / "runs" / "toy" / "04_distill_students", "at_clustered_r2_cca", 1)
    with pytest.raises(ValueError, match="does not give the student's logits"):
        check_export(folder, load_model(file)[0], PARAMS)


def test_a_program_that_cannot_be_loaded_is_one_line(made, tmp_path):
    (tmp_path / "student.pt2").write_bytes((made[1] / "student.pt2").read_bytes()[:2000])
    with pytest.raises(ValueError, match="does not run in a fresh process") as error:
        check_export(tmp_path, build_model("resnet8_w4", 10, channels=1), PARAMS)
    assert "\n" not in str(error.value)


def test_missing_onnx_packages_are_named_and_an_older_onnx_file_goes(study, home, monkeypatch, capsys):
    monkeypatch.setattr(export, "missing_packages", lambda: ["onnx", "onnxscript"])
    final = home / "reports" / "toy" / "student"
    final.mkdir(parents=True)
    (final / "student.onnx").write_text("of another student")
    (final / "notes.txt").write_text("the reader's own")
    export_student("toy", "kd")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not installed" in line]
    assert "onnx, onnxscript" in line and "pip install onnx onnxscript" in line
    assert not (final / "student.onnx").exists() and (final / "notes.txt").exists()
    assert "onnx" not in (final / "MODEL_CARD.md").read_text(encoding="utf-8").lower()


# ----------------------------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize("name", ["vgg8_cifar", "shufflenet_v2_cifar"])
def test_networks_of_the_zoo_can_be_exported(name, tmp_path):
    network = lively(build_model(name, 10, channels=1), 0)
    images = study_images(PARAMS)
    write_programs(network, tmp_path, mean=images.mean.tolist(), std=images.std.tolist(), shape=images.shape)
    assert check_export(tmp_path, network, PARAMS)["images"] == 200


@pytest.mark.filterwarnings("error::UserWarning:torch")
def test_a_network_of_torchvision_in_train_mode_and_channels_last_is_exported_and_left_as_it_was(tmp_path, home):
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 1)):
        for label in ("cat", "dog"):
            folder = home / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    params = Images(
        data="image_folder",
        data_folder="pictures",
        image_size=32,
        validation_per_class=4,
        noise=0.0,
        streaming=True,
        channel_statistics="imagenet",
    )
    network = lively(build_model("mobilenet_v2", 2), 0).train()  # with dropout, which must not be in the program
    network.to(memory_format=torch.channels_last)
    images = study_images(params)
    write_programs(network, tmp_path, mean=images.mean.tolist(), std=images.std.tolist(), shape=images.shape)
    found = check_export(tmp_path, network, params)
    assert found["images"] == 8 and found["batch_sizes"] == [1, 7, 8]
    assert network.training and network.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        return {"logits": self.body(x), "pixels": x}


def test_a_network_that_returns_more_than_logits_is_exported_with_its_logits_alone(tmp_path):
    network, pixels = Wrapped(), torch.rand(5, 1, 2, 2)
    write_programs(network, str(tmp_path), mean=[0.5], std=[0.25], shape=(1, 2, 2))
    found = torch.export.load(tmp_path / "student.pt2").module()(pixels)
    assert torch.allclose(found, network((pixels - 0.5) / 0.25)["logits"])


def test_numbers_that_are_not_one_for_each_channel_are_refused_by_their_shape(tmp_path):
    with pytest.raises(ValueError, match=r"one value per channel, shape \(1,\), not \(\), \(2,\)"):
        write_programs(Wrapped(), tmp_path, mean=0.5, std=[0.3, 0.3], shape=(1, 2, 2))
    assert not list(tmp_path.iterdir())


def test_the_onnx_file_gives_the_students_logits(study, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    folder = export_student("toy", "kd", 0)
    assert "not installed" not in capsys.readouterr().out
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    assert set(facts["check"]["largest_difference"]) == {"student.onnx", "student.pt2"}
    assert "`student.onnx`" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    session = onnxruntime.InferenceSession(folder / "student.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(folder / "student.pt2").module()
    pixels = torch.rand(5, 1, 8, 8)
    (logits,) = session.run(["logits"], {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), program(pixels).detach(), rtol=1e-4, atol=1e-4)
