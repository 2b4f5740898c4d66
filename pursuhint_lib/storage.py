"""Where files live, and how they are written whole.

A file of a study is first written beside its final name and then renamed, so a reader (or a resumed run) finds either
the whole file or none. Folders hang below one home: the repository, or ``$PURSUHINT_HOME`` when that is set.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

REPOSITORY = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds runs/, reports/, data/ and mlflow.db: ``$PURSUHINT_HOME``, else the repository."""
    return Path(os.environ.get("PURSUHINT_HOME") or REPOSITORY).resolve()


def run_folder(study: str, stage: str = "") -> Path:
    """``runs/<study>/<stage>``: what a study computes. Made when missing."""
    return _made(home() / "runs" / study / stage)


def report_folder(study: str, part: str = "") -> Path:
    """``reports/<study>/<part>``: what a study shows (report, tables, figures, executed notebooks). Made when
    missing.
    """
    return _made(home() / "reports" / study / part)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder}: a file is where this folder should be; move it away") from None
    return folder


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success flush it to disk and rename it to `path`, on an error remove it.

    The temporary name keeps the suffix of `path`, for writers that choose a format by it. Raises what the block
    raises; a full disk (OSError 28) leaves an older `path` untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_table(table: pd.DataFrame, path: Path, *, index: bool = False) -> Path:
    """Write a table as CSV, whole or not at all. Floats keep every digit (shortest text that reads back the same)."""
    with written_whole(path) as temporary:
        table.to_csv(temporary, index=index)
    return Path(path)


def read_table(path: Path, *, index: bool = False) -> pd.DataFrame:
    """Read a table that `save_table` wrote; `index` when its first column holds the row labels.

    Raises FileNotFoundError with one line that names the notebook to run first when the file is not there, ValueError
    when it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run notebook {path.parent.name} of this study first")
    try:
        return pd.read_csv(path, index_col=0 if index else None)
    except ValueError as error:  # pandas' own errors are such
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None


def save_json(value: Any, path: Path) -> Path:
    """Write a JSON file, whole or not at all, keys in the order given."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises FileNotFoundError naming the notebook to run first, ValueError when it is damaged."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run notebook {path.parent.name} of this study first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error.msg}, line {error.lineno}): delete it and run again") from None


def files_below(folder: Path, _within: tuple[str, ...] = ()) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every file below `folder`, links followed, in no order: its path relative to `folder` and its status.

    The status is None for what is hidden, which is not looked into, and for what is no regular file. An empty folder is
    given as its path with a slash behind. Raises ValueError, one line, for what cannot be read: links that lead nowhere
    or back to where they are, folders without permission.
    """
    try:
        real = os.path.realpath(folder, strict=True)
        if real in _within:
            raise ValueError(f"{folder} is a link to a folder that it lies in: remove it")
        with os.scandir(folder) as scanned:
            entries = list(scanned)
        if not entries:
            yield "", None
        for entry in entries:
            hidden = entry.name.startswith(".")
            if not hidden and entry.is_dir():
                for name, status in files_below(Path(entry), (*_within, real)):
                    yield f"{entry.name}/{name}", status
            else:
                regular = not hidden and stat.S_ISREG(entry.stat().st_mode)
                yield entry.name, entry.stat() if regular else None
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be read ({error.strerror})") from None


def sample_hash(folder: Path, names: Sequence[str | bytes]) -> str:
    """Hex sha256 over the beginnings of some hundred of the files `names` in `folder`, spread evenly.

    Tells sets of files apart that have equal names and sizes, as uncompressed images do, and costs the same for any
    number of files.
    """
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // 100)]:
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "rb") as file:
            digest.update(file.read(2**16))
    return digest.hexdigest()


def read_valid(path: Path, form: Any) -> Any:
    """What a JSON file holds; None where there is none, or it is damaged: no JSON, or not of this form.

    form: a pydantic model or another type, strictly taken; what a file holds beside a model's fields is let through.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        TypeAdapter(form).validate_python(value, strict=True)
    except (OSError, ValueError, RecursionError):
        return None
    return value


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
