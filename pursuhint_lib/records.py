"""What a stage read and wrote.

A stage is one notebook of a study. Its record, ``runs/<study>/<stage>/record.json``, is written last and whole: what it
was made from, what it wrote (sha256 of each file), and by which code, versions and machine. A stage is skipped when its
record has the key of today's inputs and every output still has its recorded bytes.

The key covers the parameters, the notebook's source without outputs, the library files that the notebook imports
(directly or through others), the lock file, for the first stage the images (a fingerprint of their listing; later
stages read what the first one says of them), and what the stage reads from earlier stages. Earlier stages count by the
*bytes they wrote*, not by their own keys: a stage that was made again with the same result does not drag the rest
along.
"""

import ast
import contextlib
import fnmatch
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from pydantic import BaseModel, FiniteFloat

from pursuhint_lib.storage import files_below, read_valid, sample_hash, sha256

RECORD = "record.json"
EXECUTED = "executed.ipynb"
FAILED = "failed.ipynb"
RUNNING = "running.ipynb"
SAID = ".said.txt"  # what a notebook's process says past it: libraries' own lines, and where in Python it crashed
TRACE = "failed.txt"  # that of a notebook that stopped
_NOT_OUTPUTS = (RECORD, "progress.json", FAILED, TRACE, RUNNING)  # and whatever has a part that starts with a dot
# Files that differ between equal runs (times, dates). They are outputs, but nothing that follows may depend on them.
_VOLATILE = ("timings.csv", "speed.csv", "histories/*.csv", EXECUTED, "*.pdf")


@dataclass(frozen=True)
class Stage:
    """One notebook: what it reads and writes.

    reads: earlier stages whose files it opens. writes: files below ``runs/<study>/<name>/`` that must be there at its
    end (patterns). compared: the tables by which two runs of a study are compared. resumes: it takes up its own files
    after an interruption, so they are left in place; otherwise it starts in an empty folder. pieces: pattern of the
    files that are each worth telling of ("12 finished students"). share: rough part of a study's time, used for the
    first forecast only.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    resumes: bool = False
    pieces: str = ""
    share: float = 0.2


class Runs(BaseModel):
    """Ids in MLflow, of a notebook and of the networks that it trained, and what code trained these."""

    notebook: str
    models: dict[str, str] = {}
    trained_at: dict[str, dict[str, Any]]


class Origin(BaseModel):
    """What is known of every notebook that has run, by hand as well."""

    runs: Runs
    source: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]


class Inputs(BaseModel):
    """See `inputs_of`."""

    parameters: dict[str, Any]
    notebook: str
    library: dict[str, str]
    lock: str
    reads: dict[str, dict[str, str]]
    images: str = ""


class Record(Origin):
    """What others read of a stage's record, which holds more."""

    key: str
    inputs: Inputs
    outputs: dict[str, str]
    seconds: FiniteFloat
    ended: str


def inputs_of(
    stage: Stage,
    parameters: Mapping[str, Any],
    notebook: Path,
    library: Path,
    lock: Path,
    earlier: Mapping[str, Mapping[str, Any]],
    images: str = "",
) -> dict[str, Any]:
    """Everything a stage is made from, as hashes, in parts that can be named when one of them changes.

    earlier: records of the stages before it. images: fingerprint of the images (`listing_hash`), "" for none. Raises
    FileNotFoundError when the notebook is not there, ValueError when it or a library file cannot be read as Python.
    """
    files = library_files(notebook, library)
    inputs = {
        "parameters": dict(parameters),
        "notebook": notebook_hash(notebook),
        "library": {name: sha256(path) for name, path in sorted(files.items())},
        "lock": sha256(lock) if lock.exists() else "",
        "reads": {
            name: {file: digest for file, digest in earlier[name]["outputs"].items() if not _matches(file, _VOLATILE)}
            for name in stage.reads
        },
    }
    return inputs | ({"images": images} if images else {})


def trained_at(folder: Path) -> dict[str, dict[str, Any]]:
    """File name of a network below ``<folder>/networks/``, without its suffix -> commit and dirty (whether there were
    changes) of the code that trained it, and the arithmetic (`arithmetic.facts`), as `arms.train_and_keep` has
    written it down; those where it did not are left out. Reads no weights.
    """
    found = {}
    for path in sorted((folder / "networks").glob("*.safetensors")):
        with (
            contextlib.suppress(OSError, KeyError, safetensors.SafetensorError),
            safetensors.safe_open(path, framework="numpy") as file,
        ):
            about = json.loads(json.loads(file.metadata()["pursuhint"])["about"])
            found[path.stem] = about["facts"]["source"]
    return found


_COPIES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's names


def listing_hash(data: str, folder: Path) -> str:
    """Hex sha256 over name, size and time of change of each file that the data set `data` may read in `folder`, and
    over the content of some.

    These are the files below ``train/`` and ``test/`` (of an image folder below ``val/`` too), else those of
    torchvision's copy; hidden ones are left out. "" when there are none yet. Where the folder lies does not count.
    Raises ValueError, one line, for what cannot be read.
    """
    parts = ("train", "test") if data in _COPIES else ("train", "test", "val")
    if data in _COPIES and not any((folder / part).is_dir() for part in parts):
        parts = (_COPIES[data],)
    files = sorted(
        (f"{part}/{name}", status.st_size, status.st_mtime_ns)
        for part in parts
        if (folder / part).is_dir()
        for name, status in files_below(folder / part)
        if status
    )
    listing = [files, sample_hash(folder, [name for name, *_ in files])]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest() if files else ""


def key_of(inputs: Mapping[str, Any]) -> str:
    """One hex sha256 over `inputs`; equal keys mean equal inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def what_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In a few words, why two `inputs` differ, for example ``parameter epochs 2 -> 3``."""
    reasons = [
        f"parameter {key} {before!r} -> {now!r}"
        for key, before, now in differences(old["parameters"], new["parameters"])
    ]
    if old.get("images") != new.get("images"):
        reasons.append("the images changed")
    if old["notebook"] != new["notebook"]:
        reasons.append("the notebook changed")
    reasons += [f"library file {name} changed" for name, _, _ in differences(old["library"], new["library"])]
    if old["lock"] != new["lock"]:
        reasons.append("requirements.lock changed")
    reasons += [f"{name} gave something else" for name, _, _ in differences(old["reads"], new["reads"])]
    more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return (reasons[0] if reasons else "nothing") + more


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every entry that differs; None where one has no such key."""
    keys = dict.fromkeys([*old, *new])
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def outputs_of(stage: Stage, folder: Path) -> dict[str, str]:
    """sha256 of each file that a stage left in its folder.

    Raises FileNotFoundError, one line, when one that it should have written is not there.
    """
    there = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    there = {name: path for name, path in there.items() if not (_hidden(name) or _matches(name, _NOT_OUTPUTS))}
    for pattern in stage.writes:
        if not fnmatch.filter(there, pattern):
            raise FileNotFoundError(f"{stage.name} ended without writing {pattern} in its folder ({_few(there)})")
    return {name: sha256(path) for name, path in there.items()}


def changed_outputs(outputs: Mapping[str, str], folder: Path) -> list[str]:
    """Names of recorded files (name below `folder` -> sha256) that are gone or have other bytes now."""
    return [name for name, digest in outputs.items() if _digest(folder / name) != digest]


def matching(outputs: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The outputs whose names match one of the patterns."""
    return {
        name: digest for name, digest in outputs.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a stage, or None when there is none or it is damaged: then the stage is made again."""
    return read_valid(folder / RECORD, Record)


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return "there: " + ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "it is empty"


# --- What a notebook is made of


def read_notebook(path: Path) -> list[dict[str, Any]]:
    """Cells of a notebook as {"cell_type", "source", "tags"}; outputs, counters and other metadata are left out.

    Raises FileNotFoundError or ValueError of one line.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            {
                "cell_type": cell["cell_type"],
                "source": "".join(cell["source"]),  # a list of lines or one string; both are valid
                "tags": sorted(cell.get("metadata", {}).get("tags", [])),
            }
            for cell in cells
        ]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent.name}/{path.name} is not there: a study needs this notebook") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not a notebook ({error})") from None


def notebook_hash(path: Path) -> str:
    """Hex sha256 of a notebook's source: running it, or saving it with outputs, changes nothing."""
    return hashlib.sha256(json.dumps(read_notebook(path), ensure_ascii=False).encode()).hexdigest()


def code_of(path: Path) -> list[str]:
    """The notebook's code cells as plain Python: lines of IPython magic become ``pass``."""
    return [_without_magic(cell["source"]) for cell in read_notebook(path) if cell["cell_type"] == "code"]


def _without_magic(source: str) -> str:
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip().startswith(("%", "!")) else line
        for line in lines
    )


def declared_parameters(path: Path) -> list[str]:
    """Names that the cell tagged ``parameters`` assigns at its top level.

    Read from the syntax tree, because papermill's own inspection (regular expressions) overlooks ``str | None``,
    ``Literal[...]`` and lines with two equals signs. Raises ValueError, one line, when there is no such cell.
    """
    tagged = [cell for cell in read_notebook(path) if cell["cell_type"] == "code" and "parameters" in cell["tags"]]
    if len(tagged) != 1:
        raise ValueError(
            f"{path.parent.name}/{path.name} has {len(tagged)} cells tagged 'parameters'; it should have one"
        )
    names = []
    for statement in _parsed(tagged[0]["source"], path).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def library_files(notebook: Path, library: Path) -> dict[str, Path]:
    """Files of the package in the folder `library` that a notebook imports, also through others, by relative path.

    A file that belongs to a module by its name (``report.html.j2`` to ``report.py``) goes with it.
    """
    library = Path(library)
    found: dict[str, Path] = {}
    waiting = [module for code in code_of(notebook) for module in _imports(_parsed(code, notebook), "")]
    while waiting:
        for path in _module_files(waiting.pop(), library):
            name = path.relative_to(library).as_posix()
            if name not in found:
                found[name] = path
                found |= {
                    own.relative_to(library).as_posix(): own
                    for own in path.parent.glob(f"{path.stem}.*")
                    if own.suffix != ".pyc"
                }
                package = ".".join([library.name, *path.relative_to(library).parent.parts])
                waiting += _imports(_parsed_file(path, path.stat().st_mtime_ns), package)
    return found


@functools.cache
def _parsed_file(path: Path, _changed: int) -> ast.Module:
    return _parsed(path.read_text(encoding="utf-8"), path)


def _parsed(code: str, path: Path) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise ValueError(
            f"{path.parent.name}/{path.name} is not valid Python: {error.msg}: {(error.text or '').strip()!r}"
        ) from None


def _imports(tree: ast.Module, package: str) -> list[str]:
    """Dotted names that a module imports, also inside functions; `package` resolves relative imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            names += [
                base,
                *(f"{base}.{alias.name}" for alias in node.names),
            ]  # a name may be a module or a thing inside one
    return names


def _module_files(module: str, library: Path) -> list[Path]:
    """The files that importing `module` runs: packages on the way and the module; none of other packages."""
    parts = module.split(".")
    if parts[0] != library.name:
        return []
    files, folder = [library / "__init__.py"], library
    for part in parts[1:]:
        files += [folder / f"{part}.py", folder / part / "__init__.py"]
        folder = folder / part
    return [file for file in files if file.is_file()]
