"""Run the release set in environments of its own: python tests/release_environments.py [lowest]
[pinned] [newest]

    lowest   every dependency at the bound that pyproject.toml states
    pinned   as in constraints.txt, what the suite runs with
    newest   whatever the index has

torch is the pinned one throughout, since the index's own builds are gigabytes; its bound is tried
by hand (CONTRIBUTING.md). Environments lie in .venv-releases/ and are made anew when pyproject.toml
or constraints.txt change; the newest one, always. Needs python3.11 and pip alone.
"""

import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".venv-releases"
SET = ["tests/test_releases.py", "tests/test_contract.py", "tests/test_serve.py"]
EXTRAS = ("gguf", "kernel", "serve")
SHOWN = (
    "transformers",
    "torch",
    "triton",
    "huggingface-hub",
    "tokenizers",
    "accelerate",
    "safetensors",
    "scipy",
    "typer",
    "rich",
)


def lower_bounds(project: dict) -> list[str]:
    """ "name==version" of every dependency, also of the extras that the set needs, at the bound
    stated; torch as pinned.
    """
    wanted = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", line) for line in wanted)
    return [
        f"{name}=={version}"
        for name, version in (match.groups() for match in found)
        if name != "torch"
    ]


def pinned(name: str | None = None) -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [
        line
        for line in lines
        if not line.startswith("#") and (name is None or line.startswith(f"{name}=="))
    ]


def constraints(release: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "lowest": lower_bounds(project) + pinned("torch"),
        "pinned": pinned(),
        "newest": pinned("torch"),
    }[release]


def environment(release: str) -> Path:
    """The environment's python, installed if it is not there as it should be."""
    folder, wanted = (
        PLACE / release,
        "\n".join(constraints(release)) + (ROOT / "pyproject.toml").read_text(),
    )
    stamp = folder / "installed"
    if release != "newest" and stamp.is_file() and stamp.read_text() == wanted:
        return folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "constraints.txt").write_text("\n".join(constraints(release)) + "\n")
    subprocess.run(
        [
            folder / "bin" / "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            folder / "constraints.txt",
            "-e",
            f"{ROOT}[{','.join(EXTRAS)}]",
            "pytest",
            "pytest-xdist",
        ],
        check=True,
    )
    stamp.write_text(wanted)
    return folder / "bin" / "python"


def run(release: str) -> bool:
    """Whether the set holds there."""
    began, python = time.time(), environment(release)
    say = (
        f"from importlib import metadata; print('{release}:', ', '.join(f'{{n}}"
        f" {{metadata.version(n)}}' for n in {SHOWN}))"
    )
    subprocess.run([python, "-c", say], check=True)
    passed = (
        subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *SET], cwd=ROOT
        ).returncode
        == 0
    )
    print(
        f"{release}: {'passed' if passed else 'FAILED'} in {time.time() - began:.0f} s, with"
        " setting up",
        flush=True,
    )
    return passed


if __name__ == "__main__":
    results = {release: run(release) for release in sys.argv[1:] or ("lowest", "pinned", "newest")}
    print(
        ", ".join(
            f"{release}: {'passed' if passed else 'FAILED'}" for release, passed in results.items()
        )
    )
    sys.exit(0 if all(results.values()) else 1)
