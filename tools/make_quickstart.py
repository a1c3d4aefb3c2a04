"""Make what the quickstart trains on. See drpo_megatron/data/quickstart.py.

python tools/make_quickstart.py [--out data/quickstart] [--seed 0] [--force]
"""

import sys

from drpo_megatron.data.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
