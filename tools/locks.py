"""Resolve requirements/*.lock anew with pip's own resolver, or check them: `make locks`.

    python tools/locks.py                  write every lock
    python tools/locks.py --check cpu      of this one, or of all: does pip find what it says, for every Python?

Nothing is installed, and of wheels only their metadata is read (from the index, or by range requests). One Python
resolves for all: markers are evaluated for the target, not for the machine that this runs on. A lock holds for the public
wheels and for a bare CPU build of torch alike: torch itself, and the CUDA packages that its public build brings, stand in
none for a machine without a GPU, and Triton is pinned to what that build pins.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = runpy.run_path(str(ROOT / "drpo_megatron" / "versions.py"))
PIP = "26.3"
"""Resolves; environments are installed by whatever pip they come with."""
MACHINES = ("x86_64", "aarch64")
BROUGHT_BY_TORCH = re.compile(r"(torch|nvidia-.*|cuda-.*)$")
"""In no lock for a machine without a GPU: what torch's public build brings, and a bare one doesn't."""
NOT_IN_SGLANG_CPU = re.compile(r"(sglang|torchvision)$")  # Installed without their dependencies.
SOURCE_ONLY = "transformer-engine-torch"
"""The one package without wheels: it is compiled against the torch that is there, and resolved by its own Python only."""
# Imported by a server on a CPU. SGLang's own list has CUDA packages by the dozen, which it never imports there.
SGLANG_CPU = (
    # fmt: off
    "transformers==5.19.0", "xgrammar==0.2.7", "aiohttp", "apache-tvm-ffi", "compressed-tensors", "dill",
    "einops", "fastapi", "gguf", "hf-xet", "huggingface_hub", "interegular", "IPython", "jsonschema", "loguru",
    "msgspec", "numpy", "openai==2.8.0", "openai-harmony==0.0.4", "orjson", "packaging",
    "partial_json_parser", "pillow", "prometheus-client", "psutil", "pybase64", "pydantic",
    "python-multipart", "pyzmq", "requests", "safetensors", "sentencepiece", "setproctitle", "soundfile", "tiktoken",
    "tqdm", "uvicorn", "uvloop", "watchfiles", "xxhash", "zstandard", "setuptools",
    # fmt: on
)
_ASK_PIP = """
import os, sys
from pip._vendor.packaging import markers
env = dict(markers.default_environment(), python_version={version!r}, python_full_version={version!r} + ".0",
           platform_machine={machine!r}, sys_platform="linux", platform_system="Linux", os_name="posix",
           implementation_name="cpython", platform_python_implementation="CPython")
markers.default_environment = lambda: env
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Lock:
    name: str
    wanted: tuple[str, ...]
    left_out: re.Pattern[str] | None
    title: str

    @property
    def path(self) -> Path:
        return ROOT / "requirements" / self.name

    @property
    def stack(self) -> object:
        return next(row for row in VERSIONS["STACKS"] if row.lock == self.name)


def locks() -> list[Lock]:
    required = [needed.specifier for needed in VERSIONS["REQUIRED"]]
    test, gpu = ([needed.specifier for needed in VERSIONS["EXTRAS"][extra]] for extra in ("test", "gpu"))
    cpu, sglang_cpu, trainer, sglang = VERSIONS["STACKS"]
    cpu_pins = (f"torch=={cpu.torch}", f"triton=={cpu.triton}")
    no_torch = re.compile(f"{BROUGHT_BY_TORCH.pattern}|{NOT_IN_SGLANG_CPU.pattern}")
    return [
        Lock(cpu.lock, (*required, *test, *cpu_pins, f"megatron-core=={cpu.megatron_core}"), no_torch, "trainer and tests"),
        Lock(sglang_cpu.lock, (*SGLANG_CPU, *cpu_pins), no_torch, f"SGLang {sglang_cpu.sglang}"),
        Lock(
            trainer.lock,
            (
                *(*required, *test, *gpu),
                f"torch=={trainer.torch}",
                f"megatron-core=={trainer.megatron_core}",
                f"transformer-engine[pytorch]=={trainer.transformer_engine}",
            ),
            None,
            "trainer on GPUs, tests included",
        ),
        Lock(sglang.lock, (f"sglang=={sglang.sglang}", f"torch=={sglang.torch}"), None, "SGLang on GPUs"),
    ]


def write(lock: Lock) -> None:
    """Resolve for the oldest Python; the others get the same versions, and what they need besides, by a marker."""
    stack = lock.stack
    pinned = resolve(lock.wanted, stack.pythons[0])
    markers: dict[str, str] = {}
    for version in stack.pythons[1:]:
        found = resolve((*lock.wanted, *(f"{name}=={pin}" for name, pin in pinned.items())), version)
        for name in found.keys() - pinned.keys():
            markers[name] = f'; python_version >= "{version}"'
        pinned = found | pinned
    if lock.left_out is not None:
        pinned = {name: pin for name, pin in pinned.items() if not lock.left_out.match(name)}
    how = "torch first, by its pin: see tools/bootstrap.py" if lock.left_out else "make gpu"
    head = (
        f"# {lock.title}: Python {', '.join(stack.pythons)}; Linux on {' and '.join(machines(lock))}.\n"
        f"# Resolved by pip {PIP} beside torch {stack.torch}, whose public build pins triton {stack.triton}. "
        f"Made by `make locks`; installed by {how}.\n"
    )
    lines = sorted(f"{name}=={pin}{markers.get(name, '')}" for name, pin in pinned.items())
    lock.path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{lock.path.relative_to(ROOT)}: {len(lines)} packages", flush=True)


def machines(lock: Lock) -> tuple[str, ...]:
    """SGLang's GPU packages have wheels for x86_64 in the index; for GH200 and GB200 it publishes container images."""
    return MACHINES if lock.left_out is not None else MACHINES[:1]


def check(lock: Lock) -> list[str]:
    """What is wrong with it, for each Python and machine; nothing when pip finds every pin, and they agree.

    Beside torch's public build, whose own pins are what a lock gets into conflict with.
    """
    lines = [line for line in lock.path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    named = {line.partition("==")[0] for line in lines}
    # By its wheel-less name no other Python can resolve it. That its pin exists is asked apart.
    source_only = [line for line in lines if line.startswith(f"{SOURCE_ONLY}==")]
    wanted = (*(line for line in lines if line not in source_only), f"torch=={lock.stack.torch}")
    wrong = []
    for version in lock.stack.pythons:
        for machine in machines(lock):
            target = f"{lock.name}, Python {version}, {machine}"
            try:
                found = resolve(wanted, version, machine)
            except ValueError as error:
                wrong.append(f"{target}: {error}")
                continue
            missing = {name for name in found.keys() - named if lock.left_out is None or not lock.left_out.match(name)}
            if missing:
                wrong.append(f"{target}: not in the lock, but needed: {', '.join(sorted(missing))}")
    for line in source_only:
        name, _, pin = line.partition("==")
        if pin not in _pip(["index", "versions", name], lock.stack.pythons[0], "x86_64"):
            wrong.append(f"{lock.name}: {line} is not in the index")
    return wrong


def resolve(wanted: tuple[str, ...], version: str, machine: str = "x86_64") -> dict[str, str]:
    """{normalised name: version} of all that pip would install for this Python. ValueError with pip's own reason."""
    with tempfile.TemporaryDirectory() as scratch:
        listed, report = Path(scratch, "wanted.txt"), Path(scratch, "report.json")
        listed.write_text("\n".join(wanted), encoding="utf-8")
        command = ["install", "--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
        command += ["--report", str(report), "-r", str(listed)]
        if not any("transformer-engine[pytorch]" in line for line in wanted):
            command += ["--only-binary=:all:", "--target", scratch, "--python-version", version]
            command += [part for tag in _platforms(machine) for part in ("--platform", tag)]
        elif sys.version_info[:2] != tuple(map(int, version.split("."))):
            raise ValueError(f"{SOURCE_ONLY} has no wheels, so Python {version} itself has to resolve it: run this with it")
        _pip(command, version, machine)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {_normalised(each["metadata"]["name"]): each["metadata"]["version"] for each in installs}


def _platforms(machine: str) -> list[str]:
    """What a wheel may be tagged with to run on Debian 12, RHEL 9 or Ubuntu 22.04: glibc 2.34 and older."""
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(34, 4, -1)), f"manylinux2014_{machine}"] + (
        [f"manylinux2010_{machine}", f"manylinux1_{machine}"] if machine == "x86_64" else []
    )


def _pip(arguments: list[str], version: str, machine: str) -> str:
    script = _ASK_PIP.format(version=version, machine=machine)
    # A machine's own wheels and limits are nobody else's: pip asks the index alone.
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": "", "PIP_EXTRA_INDEX_URL": ""}
    environment = {name: value for name, value in (os.environ | settings).items() if value or name not in settings}
    done = subprocess.run(
        [str(_pip_python()), "-I", "-c", script, *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "fast-deps" not in line]
        raise ValueError("\n".join(lines[-25:]))
    return done.stdout


def _pip_python() -> Path:
    """Of an environment that holds this pip and nothing else, made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "drpo-megatron" / f"pip-{PIP}-py{sys.version_info[0]}.{sys.version_info[1]}"
    python = directory / "bin" / "python"
    if not (directory / "made").exists():
        venv.create(directory, with_pip=True, clear=True)
        install = [str(python), "-I", "-m", "pip", "install", "--quiet", f"pip=={PIP}"]
        subprocess.run(install, check=True)
        (directory / "made").touch()
    return python


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="LOCK", help="cpu, sglang-cpu, gpu-py312, sglang-gpu-py312; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when pip disagrees with a lock")
    args = parser.parse_args()
    known = {lock.name.removesuffix(".lock"): lock for lock in locks()}
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; use {', '.join(known)}")
    chosen = [known[name] for name in args.names or known]
    try:
        _pip_python()
        with ThreadPoolExecutor(max_workers=2) as pool:
            if not args.check:
                list(pool.map(write, chosen))
                return 0
            wrong = [line for found in pool.map(check, chosen) for line in found]
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(wrong) or f"{', '.join(lock.name for lock in chosen)}: pip agrees, for every Python and machine")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
