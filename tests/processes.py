"""Starts several gloo processes for tests."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the process that all others are forked from.
PRELOADED = ["tests.trainer.test_processes"]


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
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
