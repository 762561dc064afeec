"""Whether a process of this machine still runs."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

from mpicomp.exchange.process import Process

SLEEPER = """
from mpicomp.exchange.process import Process
own = Process.own()
print(own.pid, own.began, flush=True)
import time
time.sleep(60)
"""


def test_a_process_lives_until_it_is_killed():
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True) as child:
        process = Process(*map(int, child.stdout.readline().split()))
        assert process.pid == child.pid and process.is_alive()
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_alive()  # its number is still taken
        child.wait()
        assert not process.is_alive()


def test_a_later_process_with_the_same_number_is_another_one():
    own = Process.own()
    assert own.is_alive()
    assert not replace(own, began=own.began - 1).is_alive()
