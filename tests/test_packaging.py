"""What a wheel carries."""
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_code_text_and_recipes_and_no_stray_package(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry] = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    assert "lrkv = lrkv_cli.main:app" in entry
    code = {str(p.relative_to(ROOT)) for p in (ROOT / "lrkv_convert").rglob("*.py")}
    assert code <= names
    assert {"lrkv_" + str(p.relative_to(ROOT)) for p in (ROOT / "cli").glob("*.py")} <= names
    assert {"lrkv_convert/" + str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")} <= names
    assert "lrkv_convert/data/calibration.txt" in names and any(n.endswith("LICENSE") for n in names)
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {"lrkv_convert", "lrkv_cli"}
