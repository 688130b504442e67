# SPDX-License-Identifier: Apache-2.0

"""What the first images cost in a process of their own: seconds from the model's file to the result, and memory.

    python -m tests.benchmarks.first_image openvino_models/LAKE/fp32/weights/openvino/model.xml 1,3,250,250 cpu f32
    python -m tests.benchmarks.first_image openvino_models/LAKE/model.ckpt 1,3,250,250 cpu
    python -m tests.benchmarks.first_image inference_models/LAKE-4.pt 8,3,448,448 cuda

The other benchmarks start it. Counted is everything after the imports: reading the file, building or compiling the
model, and the first inference. Memory is how far that lifts the peak of the process' resident memory, or what torch
had allocated on the GPU. Linux only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np


def measure(action: Callable[[], object]) -> dict[str, float]:
    """Seconds that an action takes, and MiB that the peak of resident memory lies above what was there before it."""

    def memory(name: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": memory("VmHWM") - before}


def in_fresh_process(
    path: Path, shape: tuple[int, ...], device: str, *precision: str, threads: int
) -> dict[str, float]:
    """Measure a file in a process of its own."""
    command = [sys.executable, "-m", __name__, str(path), ",".join(map(str, shape)), device, *precision]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def load(path: str | Path) -> object:
    """A pickled model."""
    import torch
    from anomalib.models.components.base.buffer_list import BufferListDescriptor, BufferListMixin

    for name in ("masks", "_visual_embeddings"):  # WinCLIP's; the class knows them only once one has been built
        setattr(BufferListMixin, name, BufferListDescriptor(name, 2))
    return torch.load(path, weights_only=False)


def main() -> None:
    """Print seconds and memory as JSON."""
    path, shape, device, *precision = sys.argv[1:]
    pixels = np.random.default_rng(0).random([int(size) for size in shape.split(",")], dtype=np.float32)
    if path.endswith(".xml"):
        import openvino as ov

        config: dict[str, object] = {"INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"])}
        if precision:
            config["INFERENCE_PRECISION_HINT"] = precision[0]
        print(json.dumps(measure(lambda: ov.Core().compile_model(path, "CPU", config)(pixels))))
        return

    import torch

    for module in ("anomalib_lake", "anomalib_spg", "anomalib.models"):
        import_module(module)
    name = Path(path).parent.name

    def first() -> None:
        if path.endswith(".ckpt"):
            model = getattr(import_module(f"anomalib_{name.lower()}"), name).load_from_checkpoint(path)
        else:
            model = load(path)
        model.eval().to(device)(torch.from_numpy(pixels).to(device))
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        result = measure(first)
    if device == "cuda":
        result["mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(result))


if __name__ == "__main__":
    main()
