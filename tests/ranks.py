"""Processes of one group that tests run functions in, all of them at once."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import wait

TIMEOUT = 240  # seconds; what it bounds is a hang


class Ranks:
    """``count`` processes joined by gloo, or by NCCL with a GPU each.

    ``run(function, *args)`` calls ``function(*args)`` on each, of a module that they can import, and returns
    what each answered; an exception is answered as itself.
    """

    def __init__(self, count, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        self.count = count
        self.folder = tempfile.TemporaryDirectory()
        meet = os.path.join(self.folder.name, "meet")
        pairs = [context.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(backend, rank, count, meet, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = {}
        until = time.monotonic() + TIMEOUT
        while len(answers) < self.count:
            waiting = [pipe for pipe in self.pipes if pipe not in answers]
            ready = wait(waiting, until - time.monotonic())
            assert ready, f"of {self.count} ranks {len(waiting)} have not answered within {TIMEOUT} s"
            for pipe in ready:
                kind, answers[pipe] = pipe.recv()
                assert kind != "failed", f"rank {self.pipes.index(pipe)}: {answers[pipe]}"
        return [answers[pipe] for pipe in self.pipes]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(backend, rank, count, meet, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{meet}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(("answered", function(*args)))
        except BaseException:  # as those of checkpoints are
            pipe.send(("failed", traceback.format_exc()))
