"""The process of one stage: python -m drpo_megatron.doctor.accept.worker MODULE RESULTS_FILE PARENT_PID < settings

Exit code 0 when the stage came to its end, whatever it found. It ends with its parent.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from drpo_megatron.doctor.accept.processes import die_with
from drpo_megatron.doctor.accept.stage import Results, Settings, Skip


def main() -> int:
    module, results_file, parent = sys.argv[1:]
    die_with(int(parent))
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # So that `finally` blocks run.
    faulthandler.enable()
    results = Results(Path(results_file))
    settings = Settings.from_json(sys.stdin.read())
    os.makedirs(settings.scratch, exist_ok=True)
    try:
        importlib.import_module(module).run(settings, results)
    except Skip as skip:
        results.finish(str(skip))
        return 0
    except Exception as error:  # Whatever it is, it is this stage's finding.
        traceback.print_exc()
        results.failed("stage", f"{type(error).__name__}: {str(error).strip()[-2000:]}")
    results.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
