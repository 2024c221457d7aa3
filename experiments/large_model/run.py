"""Calibrate, factor, allocate and export a large model of which one block is in memory.

A checkpoint of Llama-2-7B's shape with random weights and few blocks is written, and then treated
as one with many would be: each step takes one block after the other, so that seconds per block
and peak memory are those of a deeper model, but for hidden states, embedding and head.

    python experiments/large_model/run.py --blocks 2 --tokens 4096
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from lazy import LazyModel, compress_mapped
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lrbo
from lrbo.allocation.allocate import allocate_by_loss, dense_cost
from lrbo.calibration.cache import CalibrationFolder, save_calibration
from lrbo.calibration.collect import CalibrationSettings, calibrate
from lrbo.checkpoints.export import save
from lrbo.factorization.cache import factor_model, load_factors, save_factors
from lrbo.factorization.registry import method_named
from lrbo.layers.options import Budget, Menu, account
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.headers import INDEX
from lrbo.models.model_map import map_model
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline.prepare import curve_needs

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
TINY = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4}


@dataclass
class Meter:
    """Seconds and peak memory of the steps.

    Attributes:
        blocks: To divide CPU seconds by.
        rows: Of the table.
    """

    blocks: int
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what happens inside; pages of mapped files are not counted, they can go."""
        process, peak, stop = psutil.Process(), [0.0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                memory = process.memory_info()
                peak[0] = max(peak[0], (memory.rss - memory.shared) / 2**30)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, used = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds, used = time.perf_counter() - start, time.process_time() - used
            stop.set()
            watcher.join()
        self.rows.append((name, seconds, used / self.blocks, peak[0]))
        print(f"{name}: {seconds:.1f} s, {used:.1f} s of CPU, {peak[0]:.1f} GiB", flush=True)

    def show(self) -> None:
        """Print the table."""
        print("| step | seconds | CPU seconds per block | peak GiB |\n|---|---:|---:|---:|")
        for name, seconds, each, peak in self.rows:
            print(f"| {name} | {seconds:.1f} | {each:.1f} | {peak:.2f} |")


def write_checkpoint(folder: Path, blocks: int) -> None:
    """Write random weights in bfloat16, a file per block, as a hub checkpoint is laid out."""
    folder.mkdir(parents=True)
    shape = TINY if SMOKE else LLAMA
    vocabulary = 300 if SMOKE else 32000
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=blocks, **shape)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    where = {}
    for name, parameter in model.named_parameters():
        shard = ".".join(name.split(".")[:3]) if "layers" in name else "rest"
        file = f"{shard}.safetensors"
        norm = "norm" in name
        tensor = torch.ones(parameter.shape) if norm else torch.randn(parameter.shape) * 0.02
        groups.setdefault(file, {})[name] = tensor.bfloat16()
        where[name] = file
    for file, tensors in groups.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")


def main() -> None:
    """Run every step once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--keep", type=float, default=0.8)
    options = parser.parse_args()
    if SMOKE:
        options.tokens = 256
    meter = Meter(options.blocks)
    with tempfile.TemporaryDirectory(prefix="lrbo-large-") as name:
        compress(Path(name), options, meter)
    meter.show()


def compress(room: Path, options: argparse.Namespace, meter: Meter) -> None:
    """Take a checkpoint from dense to compressed."""
    with meter.step("write a random checkpoint"):
        write_checkpoint(room / "dense", options.blocks)
    lazy = LazyModel(room / "dense", dtype=torch.float32)
    layers, method = map_model(lazy.model), method_named("loss_aware")
    window = 64 if SMOKE else 1024
    ids = torch.randint(lazy.model.config.vocab_size, (options.tokens // window, window))
    with meter.step("calibrate, with gradients"):
        body = BlockwiseBody(lazy.model, lazy.open_block)
        settings = CalibrationSettings(batch_windows=1)
        calibration = calibrate(body, layers, ids, curve_needs(method), settings)
        save_calibration(room / "calibration", calibration, "large")
    with meter.step("factor"):
        statistics = CalibrationFolder(room / "calibration", "large")
        made = factor_model(lazy.model, layers, method, statistics, open_block=lazy.open_block)
        save_factors(room / "factors", made, "large")
    factors = load_factors(room / "factors", "large")
    with meter.step("allocate"):
        menus = {}
        for unit in layers.compressible:
            menu = Menu.of(
                unit,
                ["pivoted"],
                bias=method.adds_bias or unit.has_bias,
                itemsize=torch.bfloat16.itemsize,
                multiple=1 if SMOKE else 8,
            )
            losses = factors[unit.name].losses(menu.sections[0])
            assert losses is not None, "calibration took gradients"
            menus[unit.name] = menu.with_losses([losses])
        dense = dense_cost(menus)
        budget = Budget.keeping(options.keep, dense)
        allocation = allocate_by_loss(menus, budget)
    counted = account(layers, allocation.cost, itemsize=torch.bfloat16.itemsize).model
    keep_ratio = allocation.cost.parameters / dense.parameters
    with meter.step("pivot and export"):
        own = LazyModel(room / "dense")
        save(
            room / "compressed",
            compress_mapped(own, allocation, factors, room / "layers"),
            byte_tokenizer(),
            allocation,
            {"method": method.name, "keep_ratio": keep_ratio},
            costs={name: allocation.costs[name] for name in allocation.compressed},
            parameters=counted.parameters,
        )
    with meter.step("open and run 16 tokens"):
        model = lrbo.load(room / "compressed")
        with torch.inference_mode():
            logits = model(ids[:1, :16], use_cache=False).logits
        assert bool(logits.isfinite().all())
    sizes = {
        part: sum(f.stat().st_size for f in (room / part).rglob("*") if f.is_file()) / 2**30
        for part in ("dense", "calibration", "factors", "compressed")
    }
    print(", ".join(f"{part} {size:.2f} GiB" for part, size in sizes.items()), "on disk")
    print(f"{layers.parameters:,} parameters, {counted.parameters:,} kept: {keep_ratio:.4f}")


if __name__ == "__main__":
    main()
