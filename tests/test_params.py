"""Parameter files: every mistake is one line that names file, key, value and what is allowed."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pursuhint_lib import data, drawings, grid, params
from pursuhint_lib.grid import read_grid
from pursuhint_lib.params import (
    COMMON,
    PARAMS_FOLDER,
    SECTIONS,
    STAGES,
    ParameterError,
    check_names,
    from_variables,
    images_folder,
    load_params,
)

SMOKE = yaml.safe_load((PARAMS_FOLDER / "smoke.yaml").read_text())


STREAMED = {"data": "image_folder", "image_size": 32, "streaming": True, "noise": 0, "crop_padding": 0}


def image_folder(folder, splits=("train", "test"), classes=("cat", "dog")):
    """A folder that can be listed; nothing in it is decoded here."""
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.png").touch()
    return folder


def load(tmp_path, **changes):
    """The smoke study with `section__key=value` changed."""
    content = {section: dict(values) for section, values in SMOKE.items()}
    for place, value in changes.items():
        section, key = place.split("__")
        content.setdefault(section, {})[key] = value
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_params(path)


@pytest.mark.parametrize("path", sorted(PARAMS_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_in_the_repository_is_fit_to_run(path, home, monkeypatch):
    found = load_params(path)
    if found["01_train_teacher"].data == "image_folder":
        monkeypatch.setenv("PURSUHINT_DATA", str(image_folder(home / "images")))
    check_names(found, path.name)
    assert list(found) == list(STAGES) and all(stage.study == path.stem for stage in found.values())


def test_common_keys_reach_the_notebooks_that_declare_them_and_no_others(tmp_path):
    found = load(tmp_path, common__epochs=7)
    assert found["04_distill_students"].epochs == found["01_train_teacher"].epochs == 7
    assert "epochs" not in found["03_cluster_layers"].model_dump()
    assert all(key in {k for model in STAGES.values() for k in model.model_fields} for key in COMMON)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "smoke.yaml"
    path.write_text("common: {weight_decay: 1e-3, learning_rate: 5E-2}\n")
    found = load_params(path)["01_train_teacher"]
    assert (found.weight_decay, found.learning_rate) == (1e-3, 5e-2)


@pytest.mark.parametrize(
    ("written", "read"),
    [("010", "8"), ("1_000", "1000"), ("1:30", "90"), ("0x1F", "31"), ("0b11", "3"), ("1:30.5", "90.5"), ("-00", "0")],
)
def test_a_number_that_yaml_reads_otherwise_than_it_looks_is_refused(tmp_path, written, read):
    path = tmp_path / "smoke.yaml"
    path.write_text(f"common:\n  epochs: 1\n  learning_rate: {written}\n")
    with pytest.raises(ParameterError) as error:
        load_params(path)
    assert f"at line 3 ({written} would be read as {read}: write a decimal number" in str(error.value)
    path.write_text(f"common: {{data_folder: '{written}'}}")
    assert load_params(path)["01_train_teacher"].data_folder == written


@pytest.mark.parametrize("written", ["0", "+10", "0.5", "1.", ".5", "1.0e-05", "1.e+3", "100", "007.5"])
def test_a_decimal_number_is_read_as_it_looks(tmp_path, written):
    path = tmp_path / "smoke.yaml"
    path.write_text(f"distill_students: {{ce_weight: {written}}}")
    assert load_params(path)["04_distill_students"].ce_weight == float(written)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("common__epoch", 3, ["common.epoch = 3", "unknown key", "'epochs'"]),
        (
            "distill_students__teacher_epochs",
            3,
            ["distill_students.teacher_epochs", "belongs in section train_teacher"],
        ),
        ("train_teacher__epochs", 3, ["train_teacher.epochs", "belongs in section common"]),
        ("common__epochs", "ten", ["common.epochs = 'ten'", "integer"]),
        ("common__epochs", 0, ["common.epochs = 0", "greater than or equal to 1"]),
        ("common__epochs", True, ["common.epochs = True", "number"]),
        ("common__learning_rate", -1, ["common.learning_rate = -1", "greater than or equal to 0.000000001"]),
        ("common__learning_rate", float("inf"), ["common.learning_rate = inf", "less than or equal to"]),
        ("common__threads", 100_000, ["common.threads = 100000", "less than or equal to 1024"]),
        ("common__noise", 1e308, ["common.noise = 1e+308", "less than or equal to 100"]),
        ("common__evaluation_repeats", 10**6, ["common.evaluation_repeats = 1000000", "less than or equal to 1000"]),
        ("common__device", "cuda:99999999999999999999", ["common.device = 'cuda:9999"]),
        ("distill_students__temperature", 1e-300, ["temperature = 1e-300", "greater than or equal to 0.01"]),
        ("common__data", "digit", ["common.data = 'digit'", "'digits'", "'cifar100'"]),
        ("common__seeds", [0, 0], ["common.seeds", "0 twice"]),
        ("common__seeds", [1, "1"], ["common.seeds = [1, '1']", "1 twice"]),
        ("common__epochs", "089", ["common.epochs = '089'", "decimal number, without _ or a leading 0"]),
        ("common__weight_decay", "1_0e-4", ["common.weight_decay = '1_0e-4'", "without _"]),
        ("common__momentum", "0_9e-1", ["common.momentum = '0_9e-1'", "without _"]),
        ("common__flip", 1, ["common.flip = 1", "boolean"]),
        ("common__streaming", "t", ["common.streaming = 't'", "boolean"]),
        ("common__processes", 33, ["common.processes = 33", "a batch of 64", "fewer than 2 images", "1 to 32"]),
        ("common__sync_batch_norm", True, ["common.sync_batch_norm = True", "processes = 1", "allowed: false"]),
        ("common__seeds", [], ["common.seeds = []", "at least 1"]),
        ("common__device", "gpu", ["common.device = 'gpu'"]),
        ("evaluate__confidence", 1.5, ["evaluate.confidence = 1.5", "less than 1"]),
        ("clusters__n_hints", 3, ["unknown section 'clusters'", "'cluster_layers'"]),
        ("common__study", "other", ["common.study = 'other'", "'smoke'"]),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_what_is_allowed(tmp_path, place, value, says):
    with pytest.raises(ParameterError) as error:
        load(tmp_path, **{place: value})
    text = str(error.value)
    assert "\n" not in text and "smoke.yaml" in text
    assert all(part in text for part in says), text


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("common__teacher", "resnet21", ["common.teacher = 'resnet21'", "resnet20"]),
        ("common__student", "vgg13bn", ["common.student = 'vgg13bn'", "vgg13_bn"]),
        ("cluster_layers__n_hints", 4, ["n_hints = 4", "more hints than the student", "1 to 3"]),
        ("cluster_layers__strategies", ["unifrom"], ["'unifrom'", "did you mean 'uniform'"]),
        ("cluster_layers__cluster_metrics", ["svcca"], ["'svcca'", "r2_cca, linear_cka, rbf_cka"]),
        ("profile_layers__similarity_metrics", ["linear_kca"], ["'linear_kca'", "did you mean 'linear_cka'"]),
        ("profile_layers__layers", ["stage1.9"], ["'stage1.9'", "did you mean 'stage1"]),
        ("profile_layers__layers", ["stage1.0", "stage3.2"], ["2 candidate layers", "3 or more"]),
        ("distill_students__methods", ["fit_net"], ["'fit_net'", "did you mean 'fitnet'"]),
        ("distill_students__methods", ["at+att"], ["methods = 'at+att'", "did you mean 'at'", "joined by +"]),
        ("distill_students__methods", ["dkd+wsld"], ["matches logits in 2 ways", "one of kd, dkd"]),
        ("distill_students__methods", ["wsld+cdr@last"], ["'wsld+cdr@last': unknown 'cdr'; did you mean 'crd'"]),
        ("distill_students__methods", ["dkd@last"], ["'dkd@last': a logit loss takes no layers"]),
        ("distill_students__methods", ["at+crd", "crd+at"], ["= 'crd+at': the same sum as 'at+crd'"]),
        (
            "distill_students__methods",
            ["crd@clustered"],
            [
                "no hint points 'clustered' in this study; did you mean 'clustered_",
                "stage_ends, uniform, random_0, clustered_r2_cca, clustered_linear_cka, last)",
            ],
        ),
        ("distill_students__methods", ["crd@random"], ["'random' in this study; did you mean 'random_0'"]),
        ("distill_students__methods", ["crd@random_7"], ["'random_7' in this study; did you mean 'random_0'"]),
        ("distill_students__methods", ["crd@clustered_nonsense"], ["no hint points 'clustered_nonsense'"]),
        ("distill_students__methods", ["at+crd@stage_ends_x"], ["'at+crd@stage_ends_x'", "did you mean 'stage_ends'"]),
        ("distill_students__hint_weights", {"fitnet": 3.0}, ["hint_weights = 'fitnet'", "allowed: at"]),
        ("distill_students__hint_weights", {"at": 3.0}, ["hint_weights = {'at': 3.0}", "gradient", "balance: none"]),
        ("distill_students__logit_weights", {"kd": 3.0}, ["logit_weights = 'kd': its weight is kd_weight"]),
        ("distill_students__logit_weights", {"kd_std": 3.0}, ["logit_weights = 'kd_std': its weight is kd_weight"]),
        ("distill_students__logit_weights", {"wsld": 3.0}, ["logit_weights = 'wsld': unknown", "(allowed: none)"]),
        ("train_teacher__teacher_weights", "a.pth", ["teacher_weights = 'a.pth'", "a.pth are not there"]),
        ("train_teacher__teacher_weights", "IMAGENET1K_V1", ["torchvision has none of resnet20_w8; name a file"]),
    ],
)
def test_a_name_that_the_library_does_not_know_is_one_line(tmp_path, place, value, says):
    found = load(tmp_path, **{place: value})
    with pytest.raises(ParameterError) as error:
        check_names(found, "params/smoke.yaml")
    text = str(error.value)
    assert "\n" not in text and text.startswith("params/smoke.yaml: ")
    assert all(part in text for part in says), text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_classes": 11}, ["n_classes = 11", "0 for all, to 10"]),
        ({"n_classes": 1}, ["n_classes = 1", "nothing to tell apart", "2 or more"]),
        ({**STREAMED, "n_classes": 3}, ["n_classes must be 0 (all) or 1..2"]),
        ({"data": "cifar100", "n_classes": 101}, ["n_classes = 101", "to 100"]),
        ({"validation_per_class": 122}, ["validation_per_class = 122", "1 to 121"]),
        ({"data": "cifar10", "validation_per_class": 5000}, ["validation_per_class = 5000", "1 to 4999"]),
        ({"image_size": 8}, ["image_size = 8", "allowed: 0"]),
        ({"crop_padding": 8}, ["crop_padding = 8", "nothing of an image of 8 pixels", "allowed: 0 to 7"]),
        ({"data": "image_folder"}, ["image_size = 0", "allowed: 1 or more"]),
        ({"streaming": True}, ["streaming = True", "digits lies in memory"]),
        ({**STREAMED, "noise": 0.1}, ["noise = 0.1", "not with streaming", "allowed: 0"]),
        ({**STREAMED, "crop_padding": 4}, ["crop_padding = 4", "not with streaming", "allowed: 0"]),
        ({**STREAMED, "evaluation_repeats": 2}, ["evaluation_repeats = 2", "not with streaming", "allowed: 1"]),
        ({**STREAMED, "image_size": 0}, ["image_size = 0", "allowed: 1 or more"]),
        ({"channel_statistics": "imagenet"}, ["channel_statistics = 'imagenet'", "digits are gray"]),
        ({"data": "cifar10", "data_folder": "/nowhere"}, ["data_folder = '/nowhere'", "no such folder"]),
        ({**STREAMED, "data_folder": ""}, ["data_folder = ''", "train/ and test/ or val/; name the folder", "DATA="]),
        ({**STREAMED, "data_folder": "."}, ["data_folder = '.'", "does not hold train/ and test/ or val/ (allowed"]),
        ({"device": "cuda:99"}, ["device = 'cuda:99'", "allowed here: auto, cpu"]),
        ({"teacher": "resnet18"}, ["teacher = 'resnet18'", "takes 3 channels, not 1"]),
        ({"data": "cifar10", "student": "alexnet"}, ["student = 'alexnet'", "cannot take images of 3x32x32"]),
        ({"data": "image_folder", "image_size": 224, "teacher": "vit_b_16"}, ["teacher = 'vit_b_16'", "gives tokens"]),
    ],
)
def test_images_networks_and_device_that_do_not_fit_are_one_line(tmp_path, home, changes, says):
    if changes.get("data") == "image_folder" and "data_folder" not in changes:
        image_folder(home / "data")
    found = load(tmp_path, **{f"common__{key}": value for key, value in changes.items()})
    with pytest.raises(ParameterError) as error:
        check_names(found, "params/smoke.yaml")
    text = str(error.value)
    assert "\n" not in text and text.startswith("params/smoke.yaml: common.")
    assert all(part in text for part in says), text


def test_standardized_logits_of_two_classes_are_refused(tmp_path):
    methods = {"distill_students__methods": ["at", "dkd_std+at"]}
    found = load(tmp_path, **methods, common__n_classes=2)
    says = r"^f: distill_students.methods = 'dkd_std\+at': standardized logits of two classes .* without _std\)$"
    with pytest.raises(ParameterError, match=says):
        check_names(found, "f")
    check_names(load(tmp_path, **methods, common__n_classes=3), "f")


def test_the_classes_of_an_image_folder_are_counted(tmp_path, home):
    image_folder(home / "data", ["train", "test"])
    streamed = {f"common__{key}": value for key, value in STREAMED.items()}
    found = load(tmp_path, **streamed, distill_students__methods=["kd_std"])
    with pytest.raises(ParameterError, match="two classes"):
        check_names(found, "f")


def test_a_classifier_that_nobody_teaches_is_refused(tmp_path):
    weights = {"distill_students__ce_weight": 0, "distill_students__kd_weight": 0}
    with pytest.raises(ParameterError, match="^f: distill_students.kd_weight = 0.0: with ce_weight = 0.0, nothing .*"):
        check_names(load(tmp_path, **weights), "f")
    for place in weights:
        check_names(load(tmp_path, **(weights | {place: 0.1})), "f")


def test_hint_points_of_the_study_and_the_deepest_layer_can_stand_behind_a_method(tmp_path):
    methods = ["at@last", "crd @ clustered_linear_cka", "fitnet@random_1 + at", "sp@subset_1_2_9"]
    places = {"cluster_layers__strategies": ["random", "clustered", "subset"], "cluster_layers__random_draws": 2}
    check_names(load(tmp_path, distill_students__methods=methods, **places), "f")
    found = load(tmp_path, distill_students__methods=["at@subset_1_2_10"], **places)
    with pytest.raises(ParameterError, match=r"allowed behind @: random_0, random_1, .* \.\.\. 89 in all\)$"):
        check_names(found, "f")


def test_hint_weights_without_balance_are_taken(tmp_path):
    changes = {"distill_students__hint_weights": {"at": 3.0}, "distill_students__balance": "none"}
    check_names(load(tmp_path, **changes), "f")


@pytest.mark.parametrize("splits", [("train",), ("test", "val")])
def test_an_image_folder_without_its_parts_is_refused(tmp_path, home, monkeypatch, splits):
    monkeypatch.setenv("PURSUHINT_DATA", str(image_folder(home / "images", splits)))
    found = load(tmp_path, **{f"common__{key}": value for key, value in STREAMED.items()})
    with pytest.raises(
        ParameterError, match=r"^f: PURSUHINT_DATA \(environment\) = .* does not hold train/ and"
    ) as error:
        check_names(found, "f")
    assert "\n" not in str(error.value) and "name the folder" not in str(error.value)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_image_folder_with_one_class_or_a_class_that_cannot_be_read_is_refused(tmp_path, home, streaming):
    found = load(tmp_path, **{f"common__{key}": value for key, value in (STREAMED | {"streaming": streaming}).items()})
    folder = image_folder(home / "data", classes=("cat",))
    with pytest.raises(ParameterError, match=rf"^f: common.data = .*{folder}/train holds one class, 'cat' .allowed: 2"):
        check_names(found, "f")
    (folder / "train" / "dog").symlink_to("dog")
    with pytest.raises(
        ParameterError, match=rf"^f: common.data = .*{folder}/train/dog cannot be read .Too many"
    ) as error:
        check_names(found, "f")
    assert "\n" not in str(error.value)


def test_streamed_images_without_noise_are_taken(tmp_path, home):
    image_folder(home / "data", ("train", "val"))
    check_names(load(tmp_path, **{f"common__{key}": value for key, value in STREAMED.items()}), "params/smoke.yaml")


def test_more_subsets_than_anybody_would_train_are_refused(tmp_path):
    found = load(tmp_path, common__teacher="resnet56", cluster_layers__strategies=["uniform", "subset"])
    with pytest.raises(ParameterError, match="'subset': 2925 subsets of 3 out of 27 layers"):
        check_names(found, "params/smoke.yaml")
    check_names(load(tmp_path, cluster_layers__strategies=["subset"]), "params/smoke.yaml")  # 84 of resnet20


def test_a_network_that_cannot_be_built_without_memory_is_checked_all_the_same(tmp_path, home):
    found = load(tmp_path, common__data="cifar10", common__teacher="regnet_y_400mf", common__student="resnet20")
    check_names(found, "params/smoke.yaml")


def test_the_largest_values_that_fit_and_a_swin_are_taken(tmp_path, home):
    check_names(load(tmp_path, common__n_classes=10, common__validation_per_class=121), "params/smoke.yaml")
    changes = {"common__data": "cifar100", "common__n_classes": 100, "common__validation_per_class": 499}
    check_names(load(tmp_path, **changes, common__teacher="swin_t"), "params/smoke.yaml")


def test_the_data_sets_are_as_they_are_said_to_be():
    digits = data.load_images("digits")["train"]
    classes, smallest, *shape = params._DATA_SETS["digits"]
    assert (classes, smallest) == (len(digits.classes), int(digits.labels.bincount().min()))
    assert tuple(digits.images.shape[1:]) == (*shape, shape[-1])
    for name, known in data._CIFAR.items():
        assert params._DATA_SETS[name] == (known.n_classes, known.per_class["train"], 3, data._CIFAR_SIZE)
    assert [*params._DATA_SETS, "image_folder"] == list(data.DATA_SETS)


def test_the_image_folder_is_the_one_that_the_images_are_read_from(tmp_path, home, monkeypatch):
    images = load(tmp_path, common__data="cifar10")["01_train_teacher"]
    (home / "a").mkdir()
    (home / "b").mkdir()
    assert images_folder(images, "f") == data.data_folder("") == home / "data"
    monkeypatch.setenv("PURSUHINT_DATA", "a")
    assert images_folder(images, "f") == data.data_folder("") == home / "a"
    named = images.model_copy(update={"data_folder": "b"})
    assert images_folder(named, "f") == data.data_folder("b") == home / "b"
    monkeypatch.setenv("PURSUHINT_DATA", "c")
    with pytest.raises(ParameterError, match=r"^f: PURSUHINT_DATA .environment. = 'c': there is no such folder at /"):
        images_folder(images, "f")
    assert images_folder(load(tmp_path)["01_train_teacher"], "f") is None  # digits need no folder


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("common:\n  epochs: 2\n  noise: 0\n  epochs: 3\n", "at line 4 .epochs is given twice, first at line 2"),
        ("common: {}\ncommon: {}\n", "at line 2 .common is given twice, first at line 1"),
        ("a: [", "not valid YAML at line"),
        ("- 1", "should hold the sections"),
        ("common: 3", "section common = 3"),
        (f"common: {'[' * 1000}{']' * 1000}", "smoke.yaml: is nested too deeply"),
        ("common: {noise: 2001-99-99}", "not valid YAML .month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_parameter_file_is_one_line(tmp_path, content, says):
    path = tmp_path / "smoke.yaml"
    path.write_text(content)
    with pytest.raises(ParameterError, match=says) as error:
        load_params(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "is no file"),
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read .Input/output error"),
    ],
)
@pytest.mark.parametrize(("read", "file"), [(load_params, "/x.yaml"), (read_grid, "params/grids/x.yaml")])
def test_what_cannot_be_read_as_a_file_is_one_line(tmp_path, make, says, read, file):
    make(tmp_path / "x.yaml")
    with pytest.raises(ParameterError, match=f"{file}: {says}"):
        read(tmp_path / "x.yaml")


@pytest.mark.parametrize("model", STAGES.values())
@pytest.mark.parametrize("beyond", [10**30, -(10**30)])
def test_every_number_has_both_ends(model, beyond):
    for name in (name for name, field in model.model_fields.items() if field.annotation in (int, float)):
        with pytest.raises(ValidationError, match=rf"^1 validation error for {model.__name__}\n{name}\n"):
            model(**{name: beyond})


def test_an_unknown_study_is_answered_with_those_there_are():
    with pytest.raises(ParameterError, match="no study 'digit': params/ holds .*digits.*did you mean 'digits'"):
        params.study_file("digit")


NO_NAMES = ["", "-h", "./smoke", "../params/smoke", "../params/grids/digits_pairs", "x" * 300, "a\nb", "*"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused_in_one_line_as_a_study_a_grid_and_a_report(name, home, capsys):
    for refuse in (params.study_file, grid.grid_file):
        with pytest.raises(ParameterError, match=r"\Ano (study|grid) '.*: params/.*holds.*\Z"):
            refuse(name)
    (home / "reports" / "smoke").mkdir(parents=True)
    (home / "reports" / "smoke" / "records.json").write_text("{}")
    assert drawings.main(["--", name]) == 1
    said = capsys.readouterr().err
    assert ": reports/ holds smoke" in said and said.count("\n") == 1


def test_networks_that_several_processes_train_take_their_steps_in_turn(tmp_path):
    assert load(tmp_path, common__processes=2, common__sync_batch_norm=True)["01_train_teacher"].workers == 1
    for section in ("train_teacher", "distill_students"):
        with pytest.raises(ParameterError, match=rf"{section}.workers = 2: with processes = 2 .* \(allowed: 1\)$"):
            load(tmp_path, common__processes=2, **{f"{section}__workers": 2})


def test_several_processes_are_refused_a_method_that_keeps_a_bank_and_one_gpu_for_all(tmp_path, monkeypatch):
    together = load(tmp_path, common__processes=2, distill_students__methods=["at", "dkd+crd@last"])
    with pytest.raises(
        ParameterError, match="common.processes = 2: crd remembers .* \\(allowed: 1, or methods without"
    ):
        check_names(together, "smoke.yaml")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ParameterError, match="common.device = 'cuda:1': each of 2 processes has a GPU of its own"):
        check_names(load(tmp_path, common__processes=2, common__device="cuda:1"), "smoke.yaml")
    with pytest.raises(ParameterError, match="common.processes = 5: more than the GPUs .*allowed: 1 to 4"):
        check_names(load(tmp_path, common__processes=5, common__device="cuda"), "smoke.yaml")


def test_a_notebook_reads_its_own_cell_again():
    model = STAGES["03_cluster_layers"]
    values = load_params(PARAMS_FOLDER / "smoke.yaml")["03_cluster_layers"].model_dump()
    assert from_variables(model, values | {"unrelated": 1}) == model(**values)
    with pytest.raises(ParameterError, match="n_hints = 'many'"):
        from_variables(model, values | {"n_hints": "many"})
    del values["n_hints"]
    with pytest.raises(ParameterError, match="does not set n_hints"):
        from_variables(model, values)


def test_sections_are_the_notebooks_without_their_numbers():
    assert {section: stage[3:] for section, stage in SECTIONS.items()} == {s: s for s in SECTIONS}
