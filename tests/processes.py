"""Starts processes for tests: one, or several that are connected by gloo."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the process that all others are forked from.
PRELOADED = ["tests.trainer.test_processes", "tests.faults.harness", "bissl_hf.cli.align"]


def start_forked(function: Callable[..., None], *arguments: Any, errors: Path | None = None) -> BaseProcess:
    """Calls `function(*arguments)` in a process, and a group, of its own. It is forked from a process in which
    everything is imported.

    Args:
        function (`Callable`): of a module, so that it can be found there.
        errors (`Path`, *optional*): file for what the process writes to stderr.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_as_group, args=(function, arguments, errors))
    process.start()
    return process


def _as_group(function: Callable[..., None], arguments: tuple[Any, ...], errors: Path | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for the workers of its loaders, as in a script
    if errors is not None:
        with errors.open("w") as stream:
            os.dup2(stream.fileno(), 2)
    _call(function, *arguments)


def _call(function: Callable[..., None], *arguments: Any) -> None:
    gc.freeze()  # as in the tests: the end of a training need not look at all that is imported
    torch.set_num_threads(1)
    function(*arguments)


def run_in_processes(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Calls `function(*arguments)` in that many processes, with the environment that `torchrun` would give them.

    An error in one of them ends the others and is raised here.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _as_rank, args=(processes, port, function, arguments), nprocs=processes, start_method="forkserver"
    )


def _as_rank(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    _call(function, *arguments)
    dist.barrier()
    dist.destroy_process_group()
