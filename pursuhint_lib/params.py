"""A study's parameter file, typed and checked.

One YAML per study: a section `common` and one section per notebook, literals only. Each notebook has one flat model
here; it lists its own keys and the common keys that it needs, and no others, so a changed key re-runs only the
notebooks that use it. Two checks, both before anything is trained: `load_params` (types, limits, unknown keys; light,
no torch) and `check_names` (images, networks, layers, metrics, strategies and methods exist and fit each other; needs
torch).

YAML traps handled here: PyYAML reads ``1e-3`` as a string (numbers are parsed from such strings, but not from ``089``
or ``1_0e-4``), ``010`` as 8 and ``1:30`` as 90 (refused), and ``yes`` as true (a boolean is refused where a number or a
name is meant, and no other value is one), and of a key given twice it takes the last (refused).
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pursuhint_lib.errors import first_line
from pursuhint_lib.storage import REPOSITORY, home

PARAMS_FOLDER = REPOSITORY / "params"
LANDSCAPE = ("single_", "subset_")  # how names of hint points begin that stand for all the choices there are


class ParameterError(ValueError):
    """A parameter file that cannot be run. The text is one line: file, key, value, what is allowed."""


def _as_it_looks(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str) and re.search(r"_|^\s*[-+]?0\d", value):  # PyYAML's text, which pydantic would parse
        raise ValueError("should be a decimal number, without _ or a leading 0")
    return value


def _all_different(values: list) -> list:
    repeated = [v for i, v in enumerate(values) if v in values[:i]]
    if repeated:
        raise ValueError(f"names {repeated[0]!r} twice; each may stand once")
    return values


_NUMBER = BeforeValidator(_as_it_looks)


# Every number has both ends, far beyond what makes sense: what is further out would only fail later, or never end.
def _whole(least: int, most: int) -> Any:
    return Annotated[int, _NUMBER, Field(ge=least, le=most)]


def _real(least: float, most: float) -> Any:
    return Annotated[float, _NUMBER, Field(ge=least, le=most, allow_inf_nan=False)]


Count = _whole(1, 1_000_000)
CountOrNone = _whole(0, 1_000_000)
AtATime = _whole(1, 1024)  # threads, processes, networks
Seed = _whole(0, 2**31 - 1)
Positive = _real(1e-9, 1e9)
Weight = _real(0, 1e9)
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1), AfterValidator(_all_different)]


class Study(BaseModel):
    """What every notebook is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = (
        "smoke"  # also the folder below runs/ and reports/
    )


class Images(Study):
    """Which images, and how they are split and disturbed."""

    data: Literal["digits", "cifar10", "cifar100", "image_folder"] = "digits"
    data_folder: str = ""  # empty: $PURSUHINT_DATA, else data/ in the repository
    n_classes: CountOrNone = 0  # a seeded subset of the classes; 0 = all
    image_size: _whole(0, 4096) = 0  # image_folder only: side in pixels
    streaming: StrictBool = False  # image_folder only: decode images anew in every epoch, for sets larger than memory
    loaders: _whole(0, 1024) = 2  # streaming only: processes that decode; they change no result
    channel_statistics: Literal["training_images", "imagenet"] = (
        "training_images"  # what images are normalized with; imagenet: what torchvision's weights expect
    )
    noise: _real(0, 100) = 0.5  # standard deviation of Gaussian pixel noise on the [0, 1] scale
    crop_padding: CountOrNone = 1  # training only: pad by so many pixels, crop at random
    flip: StrictBool = False  # training only: mirror half of the images
    evaluation_repeats: _whole(1, 1000) = 1  # noise draws per validation and test image
    validation_per_class: Count = 20  # taken from the training images
    split_seed: Seed = 0  # draws the classes, the validation and the probe images


class Hardware(Study):
    """Where it runs."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    threads: AtATime = 1  # CPU threads; results are bit-identical only for an equal number
    precision: Literal["auto", "float32", "bfloat16"] = (
        "float32"  # of the networks' arithmetic; losses are float32 always
    )


class Networks(Study):
    """Who teaches, who learns."""

    teacher: Name = "resnet20_w8"
    student: Name = "resnet8_w4"


class StudentTraining(Study):
    """How every student is trained, aided or not."""

    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_all_different)] = [0, 1]
    batch_size: _whole(2, 1_000_000) = 64
    schedule: Literal["fast", "paper", "imagenet"] = (
        "fast"  # fast: one cycle; paper: x0.1 at 62.5, 75 and 87.5 % of the epochs; imagenet: at 30, 60 and 90 %
    )
    epochs: Count = 2
    learning_rate: Positive = 0.1
    momentum: Annotated[float, _NUMBER, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    # Processes that train each network together, each on its part of a batch, with a GPU of its own or with threads //
    # processes threads, at least 1. Hints sp, cc, rkd and pkt and logits dist then relate the images of a part only.
    processes: AtATime = 1
    sync_batch_norm: StrictBool = False  # with processes: normalize by statistics of the whole batch, as one does

    @field_validator("processes")
    @classmethod
    def _enough_for_each(cls, processes: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", 2 * processes)
        if processes > 1 and batch_size < 2 * processes:
            raise ValueError(
                f"a batch of {batch_size} leaves some fewer than 2 images (allowed: 1 to {max(1, batch_size // 2)})"
            )
        return processes

    @field_validator("sync_batch_norm")
    @classmethod
    def _of_several(cls, sync_batch_norm: bool, info: ValidationInfo) -> bool:
        if sync_batch_norm and info.data.get("processes", 2) == 1:
            raise ValueError("there is nothing to synchronize with processes = 1 (allowed: false)")
        return sync_batch_norm

    @field_validator("workers", check_fields=False)
    @classmethod
    def _in_turn(cls, workers: int, info: ValidationInfo) -> int:
        processes = info.data.get("processes", 1)
        if workers > 1 and processes > 1:
            raise ValueError(f"with processes = {processes} the networks take their steps in turn (allowed: 1)")
        return workers


class TrainTeacher(StudentTraining, Networks, Hardware, Images):
    """01: a teacher, and students without one."""

    teacher_weights: str = ""  # a file of weights or torchvision's name of weights, in place of training
    teacher_epochs: Count = 2
    teacher_learning_rate: Positive = 0.1
    teacher_seed: Seed = 0
    other_teachers: _whole(0, 1000) = 1  # from other initial weights, on the same batches; they never teach
    workers: AtATime = 1  # teachers that take their step at the same time, on a CPU; see 04


class ProfileLayers(Networks, Hardware, Images):
    """02: how alike the teacher's layers are."""

    layers: list[Name] = []  # candidate layers by module path; empty = derived from the network
    before_activation: StrictBool = False  # take block outputs before their last activation
    probe_images: _whole(8, 10_000_000) = 200
    pooling_grid: Count = 1  # side of the grid of cells that a map is averaged over; 1 = the mean of the whole map
    similarity_metrics: Names = ["r2_cca", "linear_cka", "rbf_cka"]
    resamples: _whole(0, 10_000) = 4  # random halves of the probe images


class ClusterLayers(Networks):
    """03: which layers to take hints from."""

    n_hints: Count = 3
    cluster_metrics: Names = ["r2_cca", "linear_cka"]  # the first is the study's main one
    strategies: Names = ["stage_ends", "uniform", "random", "clustered"]
    random_draws: _whole(1, 1000) = 1  # how many random choices of hint points
    selection_seed: Seed = 0


class DistillStudents(StudentTraining, Networks, Hardware, Images):
    """04: a student for every method, strategy and seed."""

    methods: Names = ["at"]  # each a sum of one logit loss (else kd) and hint methods: "at", "dkd", "wsld+crd@last"
    workers: AtATime = (
        1  # arms that take their step at the same time, on a CPU; each has threads // workers threads, at least 1
    )
    ce_weight: Weight = 1.0
    kd_weight: Weight = 1.0  # of kd and kd_std
    logit_weights: dict[str, Positive] = {}  # of the other logit losses; one left out has its published weight
    temperature: _real(0.01, 1000) = 4.0
    balance: Literal["gradient", "none"] = "gradient"
    hint_share: Positive = (
        0.5  # balance "gradient": first gradient of all hints together, relative to that of the other terms
    )
    hint_weights: dict[
        str, Positive
    ] = {}  # balance "none": weight per hint method; one left out has its published weight


class Evaluate(Networks, Hardware, Images):
    """05: the test set, once."""

    confidence: Annotated[float, _NUMBER, Field(gt=0.5, lt=1)] = 0.95


STAGES: dict[str, type[Study]] = {
    "01_train_teacher": TrainTeacher,
    "02_profile_layers": ProfileLayers,
    "03_cluster_layers": ClusterLayers,
    "04_distill_students": DistillStudents,
    "05_evaluate": Evaluate,
}
SECTIONS = {stage.split("_", 1)[1]: stage for stage in STAGES}  # "train_teacher" -> "01_train_teacher"


class _DataSet(NamedTuple):
    classes: int
    training_images: int  # of the smallest class, validation images included
    channels: int
    size: int


_DATA_SETS = {
    "digits": _DataSet(10, 122, 1, 8),
    "cifar10": _DataSet(10, 5000, 3, 32),
    "cifar100": _DataSet(100, 500, 3, 32),
}


def _own_keys(model: type[Study]) -> list[str]:
    return list(model.__annotations__)


def _common_keys() -> list[str]:
    return [
        key
        for base in (Study, Images, Hardware, Networks, StudentTraining)
        for key in _own_keys(base)
        if key != "model_config"
    ]


COMMON = _common_keys()


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of `allowed`, or an empty text when none is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.55)
    return f"; did you mean {close[0]!r}?" if close else ""


def study_file(study: str) -> Path:
    """The parameter file of a study, by its name in ``params/``, or of one that a grid made (see `grid`). Raises
    ParameterError listing the studies there are in ``params/``.
    """
    folders = [PARAMS_FOLDER, *sorted((home() / "runs" / "grids").glob("*/params"))]
    for folder in folders:
        if f"{study}.yaml" in os.listdir(folder):  # a name, where a path might lead elsewhere
            return folder / f"{study}.yaml"
    there = sorted(path.stem for path in PARAMS_FOLDER.glob("*.yaml"))
    of_grids = [path.stem for folder in folders[1:] for path in folder.glob("*.yaml")]
    hint = nearest(study, [*there, *of_grids])
    raise ParameterError(f"no study {study!r}: params/ holds {', '.join(there)}{hint}")


def load_params(path: Path) -> dict[str, Study]:
    """Read and check a study's YAML. Returns stage name -> its parameters, in the order of the notebooks.

    Raises ParameterError, one line that names file, key, value and what is allowed.
    """
    path = Path(path)
    file = f"{path.parent.name}/{path.name}"
    return params_of(read_sections(path, file), path.stem, file)


def params_of(sections: Mapping[str, Mapping[str, Any]], study: str, file: str) -> dict[str, Study]:
    """Check the values of a study's sections, as `read_sections` gives them. Returns and raises as `load_params`."""
    common = {"study": study} | sections.get("common", {})
    if common["study"] != study:
        raise ParameterError(
            f"{file}: common.study = {common['study']!r}: should be the file's own name, {study!r}, or be left out"
        )
    result = {}
    for section, stage in SECTIONS.items():
        model = STAGES[stage]
        values = {key: value for key, value in common.items() if key in model.model_fields} | sections.get(section, {})
        try:
            result[stage] = model.model_validate(values)
        except ValidationError as error:
            raise ParameterError(_one_line(error, file, section, common)) from None
    return result


_NOT_DECIMAL = re.compile(r"[_:xb]|^[-+]?0\d+$")  # of a number in YAML: 1_000, 1:30 (base 60), 0x10, 0b10, 010 (octal)


class _AsItLooks(yaml.SafeLoader):
    """Refuses a number that PyYAML may read as another than it looks, and a key that one mapping holds twice, of which
    it would take the last.
    """

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and _NOT_DECIMAL.search(node.value):
            read = yaml.safe_load(node.value)
            problem = f"{node.value} would be read as {read!r}: write a decimal number, or text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                line = first[key.tag, key.value].start_mark.line + 1
                problem = f"{key.value} is given twice, first at line {line}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


def read_yaml(path: Path, file: str) -> Any:
    """What a YAML file holds. Raises ParameterError, one line that begins with `file`."""
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise ParameterError(f"{file}: is no file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_AsItLooks)
    except FileNotFoundError:
        raise ParameterError(f"{file}: no such parameter file") from None
    except OSError as error:
        raise ParameterError(f"{file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ParameterError(f"{file}: is nested too deeply (allowed: sections of keys and values)") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8, a date that there is not
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ParameterError(
            f"{file}: is not valid YAML{where} ({getattr(error, 'problem', None) or first_line(error)})"
        ) from None


def read_sections(path: Path, file: str) -> dict[str, dict[str, Any]]:
    """The sections of a study file; names of sections and keys are checked, values are not. Raises ParameterError."""
    content = read_yaml(path, file)
    if not isinstance(content, dict):
        raise ParameterError(
            f"{file}: should hold the sections common, {', '.join(SECTIONS)}; it holds {type(content).__name__}"
        )
    for section, values in content.items():
        if section != "common" and section not in SECTIONS:
            allowed = ["common", *SECTIONS]
            raise ParameterError(
                f"{file}: unknown section {section!r}{nearest(section, allowed)} (allowed: {', '.join(allowed)})"
            )
        if values is None:
            content[section] = values = {}
        if not isinstance(values, dict):
            raise ParameterError(f"{file}: section {section} = {values!r}: should hold keys and values")
        allowed = section_keys(section)
        for key, value in values.items():
            if key not in allowed:
                raise ParameterError(_unknown_key(file, section, str(key), value, allowed))
    return content


def section_keys(section: str) -> list[str]:
    """The keys that a section of a study file may hold."""
    return COMMON if section == "common" else [k for k in _own_keys(STAGES[SECTIONS[section]]) if k not in COMMON]


def _unknown_key(file: str, section: str, key: str, value: Any, allowed: list[str]) -> str:
    elsewhere = [name for name, stage in SECTIONS.items() if key in _own_keys(STAGES[stage]) and key not in COMMON]
    elsewhere += ["common"] if key in COMMON else []
    hint = f"; it belongs in section {elsewhere[0]}" if elsewhere else nearest(key, allowed)
    return f"{file}: {section}.{key} = {value!r}: unknown key{hint} (allowed: {', '.join(allowed)})"


def _one_line(error: ValidationError, file: str, section: str, common: Mapping[str, Any]) -> str:
    first, more = error.errors()[0], error.error_count() - 1
    key = ".".join(str(part) for part in first["loc"])
    place = "common" if first["loc"] and first["loc"][0] in common else section
    reason = re.sub(r"^(Value error, |Input )", "", first["msg"])
    return f"{file}: {place}.{key} = {first['input']!r}: {reason}" + (f" (and {more} more)" if more else "")


def from_variables(model: type[Study], variables: Mapping[str, Any]) -> Any:
    """The parameters of a notebook, read again from its own variables (pass ``globals()``) and checked.

    papermill does not check types, and a reader in JupyterLab may have typed anything into the cell.
    Raises ParameterError naming key, value and what is allowed.
    """
    missing = [name for name in model.model_fields if name not in variables]
    if missing:
        raise ParameterError(f"the parameters cell does not set {', '.join(missing)}")
    try:
        return model.model_validate({name: variables[name] for name in model.model_fields})
    except ValidationError as error:
        raise ParameterError(_one_line(error, "the parameters cell", model.__name__, {})) from None


def images_folder(images: Images, file: str) -> Path | None:
    """Where the images of a study are: None for digits, else the folder that is named by `data_folder` or
    ``$PURSUHINT_DATA``, else the home's ``data/``. Agrees with `data.load_images`, without torch.

    Raises ParameterError, one line, when a folder that is named is not there.
    """
    if images.data == "digits":
        return None
    named = images.data_folder or os.environ.get("PURSUHINT_DATA", "")
    folder = home() / Path(named or "data").expanduser()
    if named and not folder.is_dir():
        key = "common.data_folder" if images.data_folder else "PURSUHINT_DATA (environment)"
        at = "" if str(folder) == named else f" at {folder}"
        raise ParameterError(f"{file}: {key} = {named!r}: there is no such folder{at} (allowed: a folder, or empty)")
    return folder


def check_names(params: Mapping[str, Study], file: str) -> None:
    """Check what a type cannot tell: the images are there and enough, the device is there, networks, layers, metrics,
    strategies and methods exist, the networks take the images, and the hints fit.

    Raises ParameterError, one line that names `file`, key, value and what is allowed.
    """
    import torch  # here, so that a run with nothing to do stays light

    from pursuhint_lib.arms import parse_methods
    from pursuhint_lib.features import layer_table
    from pursuhint_lib.hints import STRATEGIES, name_choices
    from pursuhint_lib.logit_losses import LOGIT_LOSSES, TWO_CLASSES
    from pursuhint_lib.methods import METHODS
    from pursuhint_lib.models import build_model, candidate_layers
    from pursuhint_lib.pretrained import check_source
    from pursuhint_lib.profiling import METRICS
    from pursuhint_lib.training import resolve_device

    profile, cluster, distill = params["02_profile_layers"], params["03_cluster_layers"], params["04_distill_students"]

    def known(section: str, key: str, names: Iterable[str], allowed: Iterable[str]) -> None:
        allowed = list(allowed)
        for name in names:
            if name not in allowed:
                hint = f"{nearest(name, allowed)} (allowed: {_some(allowed)})"
                raise ParameterError(f"{file}: {section}.{key} = {name!r}: unknown{hint}")

    known("profile_layers", "similarity_metrics", profile.similarity_metrics, METRICS)
    known("cluster_layers", "cluster_metrics", cluster.cluster_metrics, profile.similarity_metrics)
    known("cluster_layers", "strategies", cluster.strategies, [name for name in STRATEGIES if name != "none"])
    try:
        methods = parse_methods(distill.methods)
    except ValueError as error:  # "'atr': unknown ..."
        raise ParameterError(f"{file}: distill_students.methods = {error}") from None
    used: dict[str, None] = {}  # losses that some method names, in order
    for method, objective in methods.items():
        used |= dict.fromkeys([objective.logit_loss, *dict(objective.hints)])
        for name, strategy in objective.hints:
            if METHODS[name].joint and "redrawn" in cluster.strategies and strategy in ("", "redrawn"):
                raise ParameterError(
                    f"{file}: distill_students.methods = {method!r}: {name} joins all its hints, which cannot be "
                    "redrawn one by one (allowed: another method, or no strategy 'redrawn')"
                )
    known("distill_students", "hint_weights", distill.hint_weights, [name for name in used if name in METHODS])
    for name in distill.logit_weights:
        if name in ("kd", "kd_std"):
            raise ParameterError(
                f"{file}: distill_students.logit_weights = {name!r}: its weight is kd_weight "
                "(allowed here: other logit losses)"
            )
    weighed = [name for name in used if name in LOGIT_LOSSES and name not in ("kd", "kd_std")]
    known("distill_students", "logit_weights", distill.logit_weights, weighed)
    if distill.hint_weights and distill.balance == "gradient":
        raise ParameterError(
            f"{file}: distill_students.hint_weights = {distill.hint_weights!r}: not with balance gradient, which sets "
            "the weights itself (allowed: {}, or balance: none)"
        )
    if distill.ce_weight == distill.kd_weight == 0:
        raise ParameterError(
            f"{file}: distill_students.kd_weight = 0.0: with ce_weight = 0.0, nothing teaches the classifier "
            "(allowed: one of the two above 0)"
        )

    shape, classes = _check_images(profile, file)
    if profile.crop_padding >= shape[1]:
        raise ParameterError(
            f"{file}: common.crop_padding = {profile.crop_padding}: crops may hold nothing of an image of {shape[1]} "
            f"pixels (allowed: 0 to {shape[1] - 1})"
        )
    for method, objective in methods.items():
        if classes == 2 and LOGIT_LOSSES[objective.logit_loss].standardized:
            raise ParameterError(
                f"{file}: distill_students.methods = {method!r}: {TWO_CLASSES} (allowed: methods without _std)"
            )
    try:
        device = resolve_device(profile.device)
    except ValueError as error:  # "device = 'cuda': ..."
        raise ParameterError(f"{file}: common.{error}") from None
    if distill.processes > 1:
        alone = [name for name in used if name in METHODS and METHODS[name].one_process]
        if alone:
            raise ParameterError(
                f"{file}: common.processes = {distill.processes}: {alone[0]} remembers what each image was, which "
                f"several processes cannot (allowed: 1, or methods without {alone[0]})"
            )
        if device.index is not None:
            raise ParameterError(
                f"{file}: common.device = {profile.device!r}: each of {distill.processes} processes has a GPU of its "
                "own (allowed: auto, cuda, cpu)"
            )
        if device.type == "cuda" and distill.processes > torch.cuda.device_count():
            raise ParameterError(
                f"{file}: common.processes = {distill.processes}: more than the GPUs of this machine "
                f"(allowed: 1 to {torch.cuda.device_count()})"
            )

    teacher = params["01_train_teacher"]
    candidates = {}  # role -> how many layers it has to choose from
    for role in ("teacher", "student"):
        name = getattr(profile, role)
        place = f"{file}: common.{role} = {name!r}"
        by_hand = profile.layers if role == "teacher" else []
        before_activation = role == "teacher" and profile.before_activation
        with torch.device("meta"):  # shapes without memory or time
            try:
                network = _built_for_shapes(build_model, name, shape[0])
            except ValueError as error:
                raise ParameterError(f"{place}: {error}") from None
            try:
                network.eval()(torch.zeros(1, *shape))
            except Exception as error:  # whatever a foreign network says of images that it cannot take
                size = "x".join(map(str, shape))
                raise ParameterError(f"{place}: cannot take images of {size} ({first_line(error)})") from None
            if by_hand:
                known("profile_layers", "layers", by_hand, dict(network.named_modules()))
                place = f"{file}: profile_layers.layers = {by_hand!r}"
            elif before_activation:
                place = f"{file}: profile_layers.before_activation = True"
            try:
                layers = by_hand or candidate_layers(network, before_activation=before_activation)
                table = layer_table(network, layers, shape)
            except Exception as error:
                raise ParameterError(f"{place}: {first_line(error)}") from None
        candidates[role] = len(layers)
        tokens = table[(table["height"] == 1) & (table["width"] > 1)]["layer"]
        if len(tokens):
            raise ParameterError(f"{place}: layer {tokens.iloc[0]} gives tokens; hints need maps (allowed: C x H x W)")
        if role == "teacher" and len(layers) < 3:
            raise ParameterError(
                f"{place}: {len(layers)} candidate layers leave nothing to choose (allowed: 3 or more)"
            )
        if role == "teacher" and "subset" in cluster.strategies and math.comb(len(layers), cluster.n_hints) > 1000:
            count = math.comb(len(layers), cluster.n_hints)
            raise ParameterError(
                f"{file}: cluster_layers.strategies = 'subset': {count} subsets of {cluster.n_hints} out of "
                f"{len(layers)} layers, each a student per seed (allowed: up to 1000 subsets)"
            )
        if cluster.n_hints > len(layers):
            raise ParameterError(
                f"{file}: cluster_layers.n_hints = {cluster.n_hints}: more hints than the {role} {name} "
                f"has candidate layers ({len(layers)}); allowed: 1 to {len(layers)}"
            )

    if teacher.teacher_weights:
        try:
            check_source(teacher.teacher, teacher.teacher_weights)
        except (FileNotFoundError, ValueError) as error:
            raise ParameterError(
                f"{file}: train_teacher.teacher_weights = {teacher.teacher_weights!r}: {error}"
            ) from None

    names = name_choices(
        cluster.strategies, cluster.cluster_metrics, candidates["teacher"], cluster.n_hints, cluster.random_draws
    )
    names = list(dict.fromkeys([*names, "last"]))  # which is there in every study, see `arms`
    for method, objective in methods.items():
        for _, strategy in objective.hints:
            if strategy and strategy not in names:
                raise ParameterError(
                    f"{file}: distill_students.methods = {method!r}: no hint points {strategy!r} in this study"
                    f"{nearest(strategy, names)} (allowed behind @: {_some(names)})"
                )


def _some(names: list[str], most: int = 30) -> str:
    """The names, or the first of them and their number."""
    if len(names) > most:
        return f"{', '.join(names[:most])} ... {len(names)} in all"
    return ", ".join(names) or "none"


def _built_for_shapes(build_model: Callable[..., Any], name: str, channels: int) -> Any:
    """The network on the meta device, built there where it can be: a RegNet counts its widths with real tensors."""
    import torch

    try:
        return build_model(name, 2, channels=channels)
    except NotImplementedError:
        with torch.device("cpu"):
            return build_model(name, 2, channels=channels).to("meta")


def _check_images(images: Images, file: str) -> tuple[tuple[int, int, int], int]:
    """Channels, height and width of the images, and the number of classes; ParameterError when they are not there or
    not enough.
    """
    from pursuhint_lib.data import list_image_folder

    folder = images_folder(images, file)

    def refuse(key: str, reason: str) -> ParameterError:
        return ParameterError(f"{file}: common.{key} = {getattr(images, key)!r}: {reason}")

    if images.n_classes == 1:
        raise refuse("n_classes", "one class leaves nothing to tell apart (allowed: 0 for all, or 2 or more)")
    if images.streaming:
        if images.data != "image_folder":
            raise refuse("streaming", f"{images.data} lies in memory (allowed: image_folder, or streaming: false)")
        for key, off in (("noise", 0), ("crop_padding", 0), ("evaluation_repeats", 1)):
            if getattr(images, key) != off:
                raise refuse(key, f"not with streaming, which crops a random part of each image (allowed: {off})")
    if images.channel_statistics == "imagenet" and images.data == "digits":
        raise refuse("channel_statistics", "digits are gray (allowed: training_images)")
    if images.data == "image_folder":
        if images.image_size == 0:
            raise refuse("image_size", "image_folder needs the side of its images in pixels (allowed: 1 or more)")
        if not (folder / "train").is_dir() or not any((folder / split).is_dir() for split in ("test", "val")):
            named = images.data_folder or os.environ.get("PURSUHINT_DATA", "")
            key = "PURSUHINT_DATA (environment)" if named and not images.data_folder else "common.data_folder"
            raise ParameterError(
                f"{file}: {key} = {named!r}: {folder} does not hold train/ and test/ or val/"
                + ("" if named else "; name the folder by data_folder, or by DATA=folder behind make")
                + " (allowed: a folder with train/<class>/* and test/<class>/* or val/<class>/*)"
            )
        try:
            _, classes = list_image_folder(folder, images.n_classes, images.split_seed)
        except (FileNotFoundError, ValueError) as error:
            raise ParameterError(f"{file}: common.data = 'image_folder': {first_line(error)}") from None
        if len(classes) == 1:
            raise refuse("data", f"{folder / 'train'} holds one class, {classes[0]!r} (allowed: 2 or more)")
        return (3, images.image_size, images.image_size), len(classes)
    known = _DATA_SETS[images.data]
    if images.image_size != 0:
        raise refuse("image_size", f"{images.data} has a size of its own, {known.size} pixels (allowed: 0)")
    if images.n_classes > known.classes:
        raise refuse("n_classes", f"{images.data} has {known.classes} classes (allowed: 0 for all, to {known.classes})")
    if images.validation_per_class >= known.training_images:
        most = known.training_images - 1
        raise refuse("validation_per_class", f"leaves a class of {images.data} without images (allowed: 1 to {most})")
    return (known.channels, known.size, known.size), images.n_classes or known.classes
