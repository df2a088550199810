"""Runs clex-train in two processes of one group, as torchrun does: ``python -m helpers.sharded_training JSON``."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from typing import Any

from helpers.workers import free_port


def shard_on_cpus() -> None:
    """Let accelerate take FSDP and DeepSpeed on CPUs, which both know: it passes by what it is told there."""
    import transformers.training_args
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    begin, prepare = AcceleratorState.__init__, PartialState._prepare_backend

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    def prepared(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        backend, kind = prepare(self, cpu, *args, **kwargs)
        return "gloo" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not cpu else backend, kind

    AcceleratorState.__init__, PartialState._prepare_backend = patched, prepared
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def begin(arguments: list[str], rank: int, port: int) -> None:
    """One process of a training; with ``--interrupt N`` the first presses Ctrl-C once step N is reported."""
    from clex_train import cli

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    if "--interrupt" in arguments:
        at = arguments.index("--interrupt")
        step, say = arguments[at + 1], cli.say
        arguments = arguments[:at] + arguments[at + 2 :]

        def interrupt(line: str) -> None:
            say(line)
            if line.startswith(f"step {step}/"):
                os.kill(os.getpid(), signal.SIGINT)

        cli.say = interrupt
    cli.main(arguments)


def run(trainings: list[list[str]]) -> int:
    """Trains with each of the lists of arguments, one after the other; how many failed."""
    import clex_train.train  # noqa: F401, once for all

    context, failed = multiprocessing.get_context("fork"), 0
    for arguments in trainings:
        port = free_port()
        group = [context.Process(target=begin, args=(arguments, rank, port)) for rank in range(2)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        failed += any(process.exitcode != 0 for process in group) and "--interrupt" not in arguments
    return failed


if __name__ == "__main__":
    shard_on_cpus()
    sys.exit(run(json.loads(sys.argv[1])))
