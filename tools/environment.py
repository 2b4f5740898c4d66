"""Write environment.yml from requirements.lock: `make lock` runs it, `tests/test_environment.py` holds the two
together.

The pins stand in the file itself, because some conda front ends move the pip part elsewhere before they read it, where
a line such as `-r requirements.lock` finds nothing. Hashes cannot stand there, so conda users get the pins without
them.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
# Generated from requirements.lock by `make lock`: do not edit by hand.
# For conda users; `make reproduce` and `make test` do not need it. After `conda env create -f environment.yml`:
#   conda activate pursuhint && python -m pip install --no-deps --no-build-isolation -e .
name: pursuhint
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def pins(lock: str) -> list[str]:
    """The requirements of a lock file's text, markers kept, hashes and comments dropped, in the order of the file."""
    return [line.rstrip(" \\") for line in lock.splitlines() if re.match(r"[A-Za-z0-9]", line)]


def environment(lock: str) -> str:
    """The text of environment.yml for a lock file's text."""
    # Markers hold single quotes only, so a pin is safe between double quotes.
    return HEAD + "".join(f'      - "{pin}"\n' for pin in pins(lock))


if __name__ == "__main__":
    text = environment((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    (ROOT / "environment.yml").write_text(text, encoding="utf-8")
