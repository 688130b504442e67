# SPDX-License-Identifier: Apache-2.0

"""What the plugin hook adds to ``import torch``.

    python -m tests.benchmarks.import_time

Runs ``import torch`` in new processes with and without torch's backend autoload, which is where the hook is, in turn,
and prints the medians of the processor time; and the time of the hook itself inside one process.
"""

import os
import statistics
import subprocess
import sys

RUNS = 15
IMPORT = "import time; start = time.process_time(); import torch; print(time.process_time() - start)"
HOOK = """
import os, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
start = time.perf_counter()
from anomalib_spg.plugin import autoload
autoload()
print(time.perf_counter() - start)
"""


def seconds(code: str, autoload: str = "1") -> float:
    """What a new process prints."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    return float(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))


def main() -> None:
    """Print the table."""
    pairs = [(seconds(IMPORT, "1"), seconds(IMPORT, "0")) for _ in range(RUNS)]
    with_hook, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    hook = statistics.median(seconds(HOOK) for _ in range(RUNS))
    print(f"import torch: {with_hook:.3f} s with the plugin, {without:.3f} s without")
    print(f"the hook itself: {hook * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
