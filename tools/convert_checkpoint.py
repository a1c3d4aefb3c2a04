"""Checkpoints between Hugging Face and Megatron: the same as `drpo-megatron convert`.

python tools/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR
python tools/convert_checkpoint.py --help
"""

import sys

from drpo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
