"""Processes and kernels that start warm: forked from one that has imported what they need and used none of it.

A start costs 0.1 s of processor time in place of 3, a kernel's 0.2 in place of 4; nothing else about them differs.
"""
import contextlib
import multiprocessing
import os
from multiprocessing import forkserver

from tests.conftest import ROOT

IMPORTS = ["torch.distributed", "torch._dynamo", "accelerate", "sklearn.metrics", "scipy.stats", "scipy.ndimage",
           "matplotlib.pyplot", "ipykernel.kernelapp", "facebook_nb.cli", "facebook_nb.training", "facebook_nb.dmf",
           "facebook_nb.fpr", "facebook_nb.local_relation", "tests.test_local_relation"]


def context(*more: str):
    """What starts processes. A process of pytest has one server of them, so all tests ask here.

    more: what else it shall import, where it has not begun yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS, *more])
    with contextlib.chdir(ROOT):        # where it finds these tests
        forkserver.ensure_running()
    return context


def _kernel(arguments, place, environment, ready) -> None:
    os.setsid()                         # its manager kills its group
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(place)
    multiprocessing.set_start_method(None, force=True)      # the platform's own, not how this one was started
    import matplotlib
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"      # as a kernel sets it before
    from ipykernel.kernelapp import launch_new_instance
    ready.send(None)
    launch_new_instance(arguments)


class Kernel:
    """A kernel's process, as jupyter_client's `launch_kernel` returns it."""
    stdin = stdout = stderr = None

    def __init__(self, command, cwd=None, env=None, **_):
        arguments = command[command.index("ipykernel_launcher") + 1:]
        told, ready = multiprocessing.Pipe(False)
        self.process = context().Process(target=_kernel, args=(
            arguments, cwd or os.getcwd(), dict(env or os.environ), ready))
        self.process.start()
        ready.close()
        told.recv()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def terminate(self):
        self.process.terminate()
