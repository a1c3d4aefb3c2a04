"""pip install .            the package and the `drpo-megatron` command
pip install '.[test]'    what the tests and linters need
pip install '.[gpu]'     Transformer Engine, on a machine with CUDA
pip install '.[data]'    to read public data sets

What is needed, and why, is in drpo_megatron/versions.py; exact versions of whole environments are in requirements/.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "drpo_megatron" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
VERSIONS = runpy.run_path(str(ROOT / "drpo_megatron" / "versions.py"))


class WithRecipe(build_py):
    """A wheel has the quickstart's recipe, too, which a checkout has beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "drpo_megatron", "examples")
            self.mkpath(str(target))
            self.copy_file(str(ROOT / "examples" / "quickstart.yaml"), str(target))


setup(
    name="drpo_megatron",
    version=VERSION,
    description="Reinforcement learning of mixture-of-experts LLMs: DRPO on Megatron-Core, with or without a GPU",
    license="Apache-2.0",
    python_requires=f">={VERSIONS['PYTHONS'][0]}",
    packages=find_packages(include=["drpo_megatron", "drpo_megatron.*"]),
    install_requires=[needed.specifier for needed in VERSIONS["REQUIRED"]],
    extras_require={name: [needed.specifier for needed in extra] for name, extra in VERSIONS["EXTRAS"].items()},
    cmdclass={"build_py": WithRecipe},
    entry_points={"console_scripts": ["drpo-megatron = drpo_megatron.cli:main"]},
)
