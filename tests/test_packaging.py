"""What `pip install .` gives people: a real wheel, installed beside nothing of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ckpt_ema
from tests.conftest import save_students

ROOT = Path(__file__).parent.parent


def test_the_wheel_has_every_module_and_folds(tmp_path: Path) -> None:
    """Every source is in it, and its command folds from a folder where only the wheel can be imported from."""
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    shutil.copytree(ROOT / "ckpt_ema", source / "ckpt_ema", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True, timeout=120
    )
    [wheel] = wheels.iterdir()
    assert wheel.name.startswith(f"ckpt_ema-{ckpt_ema.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ckpt_ema/")}
    sources = (path for path in (source / "ckpt_ema").rglob("*") if path.is_file())
    assert packed == {path.relative_to(source).as_posix() for path in sources}
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=120)
    save_students(tmp_path / "run", 3)
    command = f"import ckpt_ema.cli; assert {str(site)!r} in ckpt_ema.__file__; ckpt_ema.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "fold", "run", "--momentum", "0.3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "run/teacher.safetensors\n"), done.stderr
