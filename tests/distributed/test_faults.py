"""Processes that die or hang: others end with an error, and a restart goes on from the last checkpoint."""

import subprocess
import sys

import sharded
from processes import TIMEOUT
from ranks import Ranks

KILLED = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import sharded_training
from fastopt.distributed import latest

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def before_step(step):
    if first_time and dist.get_rank() == 1 and step == 7:
        while latest(sys.argv[1] + "/killed").name != "00000006":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

sharded_training.ROWS = {"user": 300, "item": 50, "country": 10}
killed = sharded_training.train(sys.argv[1] + "/killed", 10, 3, before_step)
whole = sharded_training.train(sys.argv[1] + "/whole", 10, 100)
assert not first_time and all(map(torch.equal, killed.parameters(), whole.parameters()))
print("the same")
"""


def test_a_killed_rank_is_started_again_and_nothing_is_lost(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", str(tmp_path / "killed.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=sharded.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2
    assert "going on from" in done.stdout and "00000006, step 6" in done.stdout


def test_the_others_do_not_wait_for_a_rank_that_hangs():
    ranks = Ranks(2)
    try:
        told, of_the_other = ranks.run(sharded.hanging)
    finally:
        ranks.close()
    assert of_the_other is None and "Timed out" in told
