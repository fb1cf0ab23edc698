"""Running a module in as many processes as asked for: `NGPU=2 python -m tools.launch detection.train_net ...`.

The environment says how many: `NGPU` processes here (default: one a GPU, or one without GPUs), `NNODES` machines
of which this is number `NODE_RANK`, meeting at `DIST_URL` (tcp://host:port of machine 0). What is not set comes from
SLURM, where `srun` starts one task a machine. One process runs in place; several run through torch's own launcher,
`torch.distributed.run`; one that an outer launcher has started (`RANK` is set) runs as it is. Without GPUs several
processes speak gloo.

This module imports the standard library alone, so that Ctrl-C finds `main` at work and ends in one line.
"""

import atexit
import ctypes
import logging
import os
import re
import runpy
import signal
import sys

from common.errors import UserError, exits_on_user_error
from common.threads import share_cores

# What torch's launcher hands on to the processes; Windows has but two of them.
HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
PORT = 29500  # torch's own; jobs of one cluster add their number to it, so that two on one machine do not meet


def whole_number(name: str, default: int, least: int) -> int:
    """What a variable of the environment says, or a default where it is not set or empty.

    Raises:
        UserError: it is no whole number, or less than the least.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name}={value}: expected a whole number, {least} or more")
    return int(value)


def _run_here(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_without_teardown(module: str, arguments: list[str]) -> None:
    """Runs a module in this process, which then exits without tearing the interpreter down.

    gloo's threads live as long as anything holds the process group, as Detectron2's cache does. If the interpreter is
    torn down under them, a process whose work is done may abort.
    """
    codes: list[int] = []

    def end() -> None:
        if codes:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])

    atexit.register(end)  # before what the module registers, so called after it
    try:
        _run_here(module, arguments)
        codes.append(0)
    except SystemExit as stop:
        if isinstance(stop.code, int):
            codes.append(stop.code)
        raise
    except BaseException:
        codes.append(1)
        raise


def end_with_parent() -> None:
    """Asks the kernel to kill this process when the one that started it is killed: nobody else would stop it then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _take_from_slurm(gpus: int) -> None:
    """Sets what is not set yet from the variables of SLURM, if this is one of its jobs.

    Args:
        gpus: how many can be used here; without one, those that SLURM gives do not count.

    Raises:
        UserError: SLURM has started several tasks a machine.
    """
    slurm = {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}
    nodes = slurm.get("SLURM_STEP_NUM_NODES") or slurm.get("SLURM_NNODES")
    if not nodes or os.environ.get("NNODES"):
        return
    tasks = slurm.get("SLURM_STEP_NUM_TASKS") or slurm.get("SLURM_NTASKS") or nodes
    if int(tasks) > int(nodes):
        raise UserError(f"SLURM: {tasks} tasks on {nodes} machines; expected one a machine: srun --ntasks-per-node=1")
    hosts = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST") or "localhost"
    # Such as node[03-05,7], rack[1-2]node[3-4]-ib, or node03,node07.
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", hosts)[0])
    port = PORT + int(slurm.get("SLURM_JOB_ID", 0)) % 10_000
    found = {"NNODES": nodes, "NODE_RANK": slurm.get("SLURM_NODEID", "0"), "DIST_URL": f"tcp://{host}:{port}"}
    if gpus and "SLURM_GPUS_ON_NODE" in slurm:
        found["NGPU"] = slurm["SLURM_GPUS_ON_NODE"]
    for name, value in found.items():
        if not os.environ.get(name):
            os.environ[name] = value


def launch(module: str, arguments: list[str]) -> None:
    """Reads the environment, checks it against the machine and runs `module` as a command line.

    Raises:
        UserError: the environment is malformed, or asks for more GPUs than the machine has.
        SystemExit: one of several processes failed.
    """
    if "RANK" in os.environ:
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            rank = f"RANK={os.environ['RANK']}"
            raise UserError(f"{rank}: is set without {', '.join(missing)}; expected all of them or none: unset RANK")
        if "LAUNCHER_PID" in os.environ:  # another launcher may start processes from a thread that ends before them
            end_with_parent()
            if os.getppid() != int(os.environ["LAUNCHER_PID"]):
                sys.exit("the launcher was killed meanwhile")
        _run_without_teardown(module, arguments)
        return

    from common.runtime import gpu_count  # here, since it imports torch

    gpus = gpu_count()
    _take_from_slurm(gpus)
    processes = whole_number("NGPU", max(gpus, 1), 1)
    nodes = whole_number("NNODES", 1, 1)
    node_rank = whole_number("NODE_RANK", 0, 0)
    if gpus and processes > gpus:
        raise UserError(f"NGPU={processes}: this machine has {gpus} GPU(s); expected at most that: give NGPU={gpus}")
    if node_rank >= nodes:
        raise UserError(f"NODE_RANK={node_rank}: expected 0 to {nodes - 1} with NNODES={nodes}")

    if processes * nodes == 1:
        _run_here(module, arguments)
        return

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # After Ctrl-C the first process ends its evaluation and saves. What nohup has switched off stays so; Ctrl-C, which
    # a shell script switches off in what it runs in the background, is heeded, as it is where one process trains.
    handled = [each.name for each in HANDLED if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN]
    options = [f"--nproc-per-node={processes}", f"--signals-to-handle={','.join(handled)}", "--shutdown-timeout=3600"]
    if nodes == 1:
        options += ["--standalone", "--local-addr=127.0.0.1"]  # on a free port
    else:
        url = os.environ.get("DIST_URL", "")
        address = re.fullmatch(r"tcp://(.+):(\d+)", url)
        if not address:
            raise UserError(f"DIST_URL={url}: expected tcp://HOST:PORT of machine 0 with NNODES={nodes}")
        options += [f"--nnodes={nodes}", f"--node-rank={node_rank}"]
        options += [f"--master-addr={address[1]}", f"--master-port={address[2]}"]
    share_cores(processes)  # or each would take all of them, and they would fight
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # the process that failed says why itself
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["LAUNCHER_PID"] = str(os.getpid())
    try:
        parsed = get_args_parser().parse_args([*options, "--module", "common.launch"])
        parsed.training_script_args = [module, *arguments]  # given apart: torch's parser would take --start for its own
        run(parsed)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in codes & {2, 130}:
            sys.exit(code)  # the process that failed has said why
        sys.exit(str(error))
    except SignalException as stop:
        sys.exit(128 + stop.sigval)


@exits_on_user_error
def main() -> None:
    """Runs the module named first on the command line with the arguments that follow."""
    launch(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
