"""tools/bootstrap.py: which Python, which environment, and what is said when one of them won't do."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from drpo_megatron import versions

ROOT = Path(__file__).parents[2]
BOOTSTRAP = ROOT / "tools" / "bootstrap.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the set-up reads, in a folder with a space in its name."""
    directory = tmp_path / "a checkout"
    for name in ("tools/bootstrap.py", "drpo_megatron/versions.py", "setup.py", "Makefile"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    shutil.copytree(ROOT / "requirements", directory / "requirements")
    return directory


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "tools" / "bootstrap.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def with_stamp(checkout: Path, directory: str = ".venv", lock: str = "cpu.lock") -> Path:
    """An environment without pip that says it is complete: whoever asks pip for anything fails."""
    venv.create(checkout / directory, with_pip=False)
    here = os.getcwd()
    os.chdir(checkout)
    try:
        stamp = runpy.run_path(str(checkout / "tools" / "bootstrap.py"))["_stamp"](lock)
    finally:
        os.chdir(here)
    (checkout / directory / ".installed").write_text(stamp)
    return checkout / directory


def test_a_python_that_is_not_supported_is_named_before_anything_is_made(checkout: Path) -> None:
    program = f"import sys, runpy; sys.version_info = (3, 9, 2, 'final', 0); sys.argv = ['bootstrap.py', 'setup']; \
runpy.run_path({str(checkout / 'tools' / 'bootstrap.py')!r}, run_name='__main__')"
    environment = os.environ | {"PATH": str(checkout)}  # No other Python is found.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: Python 3.9.2 ({sys.executable}) is not supported: Python 3.11, 3.12, 3.13 is"
    )
    assert done.stdout == "" and not (checkout / ".venv").exists()


def test_another_python_on_the_path_is_taken_instead(checkout: Path) -> None:
    """`python3` may be an old one, or have no venv, where a good one lies beside it."""
    good = checkout / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    good.parent.mkdir()
    good.symlink_to(sys.executable)
    with_stamp(checkout)
    program = f"import sys, runpy; sys.version_info = (3, 8, 1, 'final', 0); sys.argv = ['bootstrap.py', 'setup']; \
runpy.run_path({str(checkout / 'tools' / 'bootstrap.py')!r}, run_name='__main__')"
    environment = os.environ | {"PATH": str(good.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.strip().splitlines()) == (
        0,
        [f"Python 3.8.1 ({sys.executable}) can't be used here; going on with {good}"],
    )


def test_a_python_without_venv_is_named_with_the_package_that_has_it(checkout: Path) -> None:
    """As Debian's and Ubuntu's: it runs, and can't import what makes environments."""
    bare = checkout / "bare-python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    program = f"import sys, runpy; sys.executable = {str(bare)!r}; sys.argv = ['bootstrap.py', 'setup']; \
runpy.run_path({str(checkout / 'tools' / 'bootstrap.py')!r}, run_name='__main__')"
    environment = os.environ | {"PATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert done.returncode == 1 and f"apt-get install python{version}-venv" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("name", ["PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH"])
def test_settings_that_install_elsewhere_do_not_reach_pip(checkout: Path, tmp_path: Path, name: str) -> None:
    """The environment's Python is replaced by one that says what pip would have been given."""
    environment = with_stamp(checkout)
    (environment / ".installed").unlink()
    python = environment / "bin" / "python"
    real = os.path.realpath(sys.executable)
    python.unlink()
    python.write_text(f'#!/bin/sh\n[ "$2 $3" = "-m pip" ] || exec {real} "$@"\nenv > "{tmp_path}/given"\nexit 1\n')
    python.chmod(0o755)
    done = run(checkout, "setup", **{name: str(tmp_path / "elsewhere")})
    assert done.returncode == 1 and "pip could not install into .venv" in done.stderr
    given = (tmp_path / "given").read_text().splitlines()
    assert [line for line in given if line.startswith(f"{name}=")] == []
    assert any(line.startswith("PATH=") for line in given)


def test_a_complete_environment_asks_nobody(checkout: Path) -> None:
    with_stamp(checkout)
    done = run(checkout, "setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_environment_of_another_lock_is_mended_and_one_whose_python_is_gone_made_anew(checkout: Path) -> None:
    environment = with_stamp(checkout)
    (checkout / "requirements" / "cpu.lock").write_text("changed")
    done = run(checkout, "setup")
    assert done.returncode == 1 and "pip could not install into .venv" in done.stderr  # It has no pip, by design.
    assert not (environment / ".installed").read_text().startswith("changed")

    (environment / "bin" / "python").unlink()
    (environment / "bin" / "python").symlink_to("/nowhere/python")  # Its Python was removed.
    (environment / "mark").touch()
    done = run(checkout, "setup", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert "the Python of .venv is gone" in done.stdout and "it is made anew" in done.stdout
    assert not (environment / "mark").exists() and (environment / "bin" / "python").exists()
    assert done.returncode == 1 and "run the same command again" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "thesis.tex").write_text("mine")
    done = run(checkout, "setup")
    assert done.returncode == 1 and "is no environment of Python's; move it away" in done.stderr
    assert (checkout / ".venv" / "thesis.tex").read_text() == "mine"


def test_gpu_environments_want_a_driver_and_their_python(checkout: Path) -> None:
    done = run(checkout, "gpu", PATH=str(checkout))
    expected = "nvidia-smi is missing" if sys.version_info[:2] == (3, 12) else "for Python 3.12, this is Python"
    assert done.returncode == 1 and expected in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_supported_pythons_are_those_of_the_table() -> None:
    """bootstrap.py repeats them, because an older Python can't read the table."""
    supported = runpy.run_path(str(BOOTSTRAP))["SUPPORTED"]
    assert tuple(f"{major}.{minor}" for major, minor in supported) == versions.PYTHONS
    assert sysconfig.get_python_version() in versions.PYTHONS


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here; every target runs without it")
def test_make_knows_every_target(checkout: Path) -> None:
    targets = runpy.run_path(str(BOOTSTRAP))["TARGETS"]
    listed = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TARGETS :="))
    assert listed.split()[2:] == list(targets)
    with_stamp(checkout)
    python = checkout.parent / "my python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_is_built_from_files_that_are_here() -> None:
    """Not built here, for want of a Docker engine: what can be held is that its lines name what exists."""
    text = (ROOT / "slurm" / "container" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line[:1] not in ("#", "")]
    copied = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    [call] = [line for line in lines if line[:1] == ["RUN"] and "tools/bootstrap.py" in line]
    asked = subprocess.run([sys.executable, str(BOOTSTRAP), "gpu", "--help"], capture_output=True, text=True)
    assert call[-1] in asked.stdout and call[-2] == "gpu"
    needed = {
        "setup.py",
        "requirements",
        "drpo_megatron/versions.py",
        "drpo_megatron/__init__.py",
        "tools/bootstrap.py",
    }
    assert needed <= set(copied)  # All that the set-up reads, before the sources.
