"""Environments, and what is run in them. `make` calls this; without make, call it yourself:

    python3 tools/bootstrap.py quickstart      what `make quickstart` does; likewise every other target
    python3 tools/bootstrap.py --help

It needs Python's standard library only, and looks before anything is downloaded whether this Python will do. An
environment that fits its lock already is left alone, and then nothing asks the network.
"""

import argparse
import hashlib
import os
import runpy
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VERSIONS = os.path.join(ROOT, "drpo_megatron", "versions.py")
TRAINER = ".venv"
SGLANG = ".venv-sglang"
SUPPORTED = ((3, 11), (3, 12), (3, 13))  # As in versions.py, which an older Python can't read.
STAMP = ".installed"
GIB = 2**30
ROOM = {"cpu.lock": 9, "sglang-cpu.lock": 9, "gpu-py312.lock": 14, "sglang-gpu-py312.lock": 22}
"""GiB that an environment may take, beside torch's public build and with what pip keeps in its cache."""
# Settings of the caller's that would make pip install elsewhere than into the environment.
REDIRECTS = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PYTHONHOME", "PYTHONPATH")


class SetupError(Exception):
    """What is wrong, and what to do."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="TARGET")
    for name, (run, text) in TARGETS.items():
        commands.add_parser(name, help=text).set_defaults(run=run)
    commands.choices["gpu"].add_argument(
        "--for-image", action="store_true", help="no driver is here, but will be where the image runs"
    )
    args = parser.parse_args()
    if args.command is None:
        parser.print_help()
        return 2
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # A rank; more only get into each other's way.
    try:
        check_python()
        args.run(args.for_image) if args.command == "gpu" else args.run()
    except SetupError as error:
        print("error: " + str(error), file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def check_python():
    """Take this Python, or go on with one on the PATH that will do."""
    if sys.version_info[:2] in SUPPORTED and _has_venv(sys.executable):
        return
    for version in reversed(SUPPORTED):
        other = shutil.which("python%d.%d" % version)
        # Not `other != sys.executable`: the one that was refused is refused again. pyenv's shims exist and then fail.
        if other and _answers(other, version) and _has_venv(other):
            print("%s can't be used here; going on with %s" % (_named(sys.executable), other), file=sys.stderr)
            sys.stderr.flush()
            os.execv(other, [other, os.path.abspath(__file__)] + sys.argv[1:])
    if sys.version_info[:2] in SUPPORTED:
        raise SetupError(
            "%s has no venv and ensurepip, which make environments; on Debian and Ubuntu: apt-get install "
            "python%d.%d-venv" % ((_named(sys.executable),) + sys.version_info[:2])
        )
    raise SetupError(
        "%s is not supported: Python %s is needed, and none is on the PATH; install one (apt, dnf, pyenv, "
        "`uv python install 3.12`) and name it: make ... PYTHON=/path/to/python3.12"
        % (_named(sys.executable), ", ".join("%d.%d" % version for version in SUPPORTED))
    )


def _named(python):
    return "Python %d.%d.%d (%s)" % (tuple(sys.version_info[:3]) + (python,))


def _answers(python, version):
    asked = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True,
    )  # fmt: skip
    return asked.stdout.strip() == "%d.%d" % version


def _has_venv(python):
    command = [python, "-c", "import ensurepip, venv"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


# --- environments ---------------------------------------------------------------------------------------------------


def setup():
    """The trainer's environment, without a GPU; one that `gpu` made stays."""
    if _is_made(TRAINER, "gpu-py312.lock"):
        return
    steps = [["torch==%s" % pins()["TORCH"]], ["-r", "requirements/cpu.lock"], IN_PLACE]
    make_environment(TRAINER, "cpu.lock", steps)


def sglang_cpu():
    """SGLang's, without a GPU. It and torchvision come without their dependencies: those bring another torch, and CUDA."""
    if _is_made(SGLANG, "sglang-gpu-py312.lock"):
        return
    without = ["--no-deps", "sglang==%s" % pins()["SGLANG"], "torchvision==%s" % pins()["TORCHVISION"]]
    steps = [["torch==%s" % pins()["TORCH"]], ["-r", "requirements/sglang-cpu.lock"], without]
    make_environment(SGLANG, "sglang-cpu.lock", steps)


def gpu(for_image):
    """Both environments of a machine with GPUs."""
    if sys.version_info[:2] != (3, 12):
        raise SetupError(
            "the environments for GPUs are for Python 3.12, this is %s; make gpu PYTHON=python3.12"
            % _named(sys.executable)
        )
    if not for_image and not _finds_gpus():
        raise SetupError(
            "nvidia-smi is missing or finds no GPU: install NVIDIA's driver (580 or newer, for CUDA 13), or go on "
            "without a GPU: make setup sglang-cpu"
        )
    # Transformer Engine's torch extension is compiled against the torch that is there already.
    torch = next(row.torch for row in pins()["STACKS"] if row.lock == "gpu-py312.lock")
    builders = ["torch==%s" % torch, "setuptools", "wheel", "pybind11", "ninja"]
    trainer = [builders, ["--no-build-isolation", "-r", "requirements/gpu-py312.lock"], IN_PLACE]
    make_environment(TRAINER, "gpu-py312.lock", trainer)
    make_environment(SGLANG, "sglang-gpu-py312.lock", [["-r", "requirements/sglang-gpu-py312.lock"]])


def _finds_gpus():
    asked = ["nvidia-smi", "--list-gpus"]
    return shutil.which(asked[0]) is not None and subprocess.run(asked, stdout=subprocess.DEVNULL).returncode == 0


IN_PLACE = ["--no-deps", "--no-build-isolation", "--editable", "."]  # An edit needs no new install.


def make_environment(directory, lock, steps):
    """Have `directory` be an environment of this Python in which every step of pip's has been done.

    Whatever it depends on is in its stamp; when that changes pip looks at all of it again. One that another supported
    Python made is kept with that Python. One whose Python is gone (the checkout or the Python was moved), or isn't
    supported, is made anew.
    """
    if _is_made(directory, lock):
        return
    python = _python_of(directory)
    if os.path.isdir(directory) and _version_of(directory) not in _takes(lock):
        if not os.path.exists(os.path.join(directory, "pyvenv.cfg")):
            raise SetupError("%s exists and is no environment of Python's; move it away" % os.path.abspath(directory))
        print("the Python of %s is gone, or not one that %s is for; it is made anew" % (directory, lock))
        shutil.rmtree(directory)
    _warn_of_little_room(lock)
    if not os.path.exists(python):
        print("making %s with %s" % (directory, _named(sys.executable)), flush=True)
        _run([sys.executable, "-m", "venv", directory])
    environment = {name: value for name, value in os.environ.items() if name not in REDIRECTS}
    for step in steps:
        print("pip install " + " ".join(step), flush=True)
        command = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"] + step
        try:
            _run(command, env=environment)
        except subprocess.CalledProcessError as error:
            raise SetupError(
                "pip could not install into %s (its own message stands above). What is there stays; with a network "
                "and room on the disk, run the same command again" % directory
            ) from error
    with open(os.path.join(directory, STAMP), "w") as stamp:
        stamp.write(_stamp(lock))


def _is_made(directory, lock):
    try:
        with open(os.path.join(directory, STAMP)) as stamp:
            return stamp.read() == _stamp(lock) and _version_of(directory) in _takes(lock)
    except OSError:
        return False


def _stamp(lock):
    digest = hashlib.sha256()
    for path in (os.path.join("requirements", lock), VERSIONS, "setup.py"):
        with open(path, "rb") as file:
            digest.update(file.read())
    return "%s %s\n" % (lock, digest.hexdigest())


def _takes(lock):
    return ((3, 12),) if "py312" in lock else SUPPORTED


def _python_of(directory):
    return os.path.join(directory, "bin", "python")


def _version_of(directory):
    """(3, 12) of an environment whose Python answers, else None."""
    try:
        asked = subprocess.run(
            [_python_of(directory), "-I", "-c", "import sys; print(*sys.version_info[:2])"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True,
        )  # fmt: skip
    except OSError:
        return None
    return tuple(map(int, asked.stdout.split())) or None


def _warn_of_little_room(lock):
    free = shutil.disk_usage(ROOT).free / GIB
    if free < ROOM[lock]:
        # No error: beside a bare CPU build of torch a third of it is enough.
        print(
            "warning: %.0f GiB are free under %s, and this may take up to %d" % (free, ROOT, ROOM[lock]),
            file=sys.stderr,
        )


def pins():
    return runpy.run_path(VERSIONS)


# --- what is run ------------------------------------------------------------------------------------------------------


def _run(command, **options):
    subprocess.run(command, check=True, **options)


def in_trainer(*arguments):
    _run([_python_of(TRAINER)] + list(arguments))


def quickstart():
    setup()
    in_trainer("tools/make_quickstart.py")
    in_trainer("-m", "drpo_megatron.cli", "train", "examples/quickstart.yaml")


def lint():
    setup()
    in_trainer("-m", "ruff", "check", ".")
    in_trainer("-m", "mypy")


def pytest(*arguments):
    # Files side by side, those that take long first (tests/conftest.py): most of a test's time is the start of a process,
    # which uses one core, or waiting.
    in_trainer("-m", "pytest", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", *arguments)


def unit():
    setup()
    pytest("-m", "not processes and not slow")


def test(*arguments):
    lint()
    sglang_cpu()
    # Once, into the user's cache. Where there is no network the tests of the pretended GPU are skipped, and say so.
    subprocess.run([_python_of(TRAINER), "-m", "tests.pretended_gpu.fetch", "--oldest"])
    pytest(*arguments)


def test_fast():
    test("-m", "not slow")


def gpu_check():
    in_trainer("-m", "drpo_megatron.cli", "doctor", "--accept", "--device", "gpu")


def locks():
    _run([sys.executable, "tools/locks.py"])


def clean():
    for directory in (TRAINER, SGLANG, "data", "runs", "build", "drpo_megatron.egg-info"):
        shutil.rmtree(directory, ignore_errors=True)


TARGETS = {
    "quickstart": (quickstart, "set up what is needed, then train the small MoE end to end"),
    "test": (test, "set up what is needed, then run every test that this machine can run"),
    "setup": (setup, "the trainer's environment, without a GPU, in .venv"),
    "sglang-cpu": (sglang_cpu, "SGLang for a machine without a GPU, in .venv-sglang"),
    "gpu": (gpu, "both environments on a machine with GPUs"),
    "gpu-check": (gpu_check, "what a new GPU machine should be asked first; writes gpu-report.md"),
    "test-fast": (test_fast, "all but the slow tests"),
    "unit": (unit, "the tests that start no process"),
    "lint": (lint, "ruff and mypy"),
    "locks": (locks, "resolve requirements/*.lock anew, for every Python"),
    "clean": (clean, "remove the environments and what the quickstart made"),
}

if __name__ == "__main__":
    sys.exit(main())
