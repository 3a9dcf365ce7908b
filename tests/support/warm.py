"""The command line, forked from one process that has imported everything: the same front door
(arguments, environment, folder, pipes, signals, exit code) without the start of an interpreter.

    python tests/support/warm.py SOCKET [models]     the process that is forked; `WarmCommand` asks it
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

LOCAL = ("hf", "modelscope")
"""Providers whose models run in the command's own process."""
MESSAGE = 1 << 20
WITHOUT_RIGHTS = "TEST_WITHOUT_RIGHTS"
"""The variable of commands that obey the permissions of files whoever runs them."""
_FD = array.array("i").itemsize


class WarmCommand(subprocess.Popen[str]):
    """`subprocess.Popen` of the command line with other means: `args` are its arguments."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        # In the order of CPython's own: executable, preexec_fn, close_fds, pass_fds, cwd, env, ...
        cwd, env = more[4], more[5]
        pipes = more[9:15]
        child_in, _, _, child_out, _, child_err = pipes
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.connect(_server(models=any(name in args for name in LOCAL)))
        asked = {"args": list(args), "cwd": str(cwd), "env": dict(env)}
        given = array.array("i", [child_in, child_out, child_err])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)]
        self._link.sendmsg([json.dumps(asked).encode()], rights)
        self.pid = json.loads(self._link.recv(MESSAGE))["pid"]
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._link], [], [], 0)[0]:
            return 0, 0
        told = self._link.recv(MESSAGE)
        self._link.close()
        return self.pid, json.loads(told)["status"] if told else signal.SIGKILL

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


_addresses: dict[bool, str] = {}


def _server(models: bool) -> str:
    """The address of this process's warm one, which is started when it is first asked for: one
    that has imported what local models need too, or one that has not."""
    if models not in _addresses:
        folder = tempfile.mkdtemp(prefix="warm-")
        address = str(Path(folder) / "socket")
        environment = {**os.environ, "HF_HOME": folder}
        # -m would show in the command's own name
        command = [sys.executable, __file__, address, *(["models"] if models else [])]
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        atexit.register(process.kill)
        _addresses[models] = address
    return _addresses[models]


def serve(address: str) -> list[str]:
    """Forks for each that connects, and tells it how that ended. Returns in the children only,
    with the arguments of the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    awake, alarm = os.pipe()
    for end in (awake, alarm):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    gc.collect()
    gc.freeze()  # or each child's first collection copies all that was imported
    print("ready", flush=True)
    links: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([listening, awake], [], [])
        if awake in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(awake, 4096)
            _tell_ended(links)
        if listening not in readable:
            continue
        link, _ = listening.accept()
        data, ancillary, _, _ = link.recvmsg(MESSAGE, socket.CMSG_LEN(3 * _FD))
        pipes = array.array("i", ancillary[0][2][: 3 * _FD])
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGCHLD):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
            for open_socket in (listening, link, *links.values()):
                open_socket.close()
            for end in (awake, alarm):
                os.close(end)
            return _become(json.loads(data), pipes)
        for pipe in pipes:
            os.close(pipe)
        links[pid] = link
        link.send(json.dumps({"pid": pid}).encode())


def _tell_ended(links: dict[int, socket.socket]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        with links.pop(pid) as link, contextlib.suppress(OSError):
            link.send(json.dumps({"status": status}).encode())


def _become(asked: dict[str, Any], pipes: array.array[int]) -> list[str]:
    for target, pipe in enumerate(pipes):
        os.dup2(pipe, target)
    os.closerange(3, 64)  # of other commands
    # As at the start of an interpreter: what these streams were told of the old ones is void.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path[1:1] = os.environ.get("PYTHONPATH", "").split(":")
    if WITHOUT_RIGHTS in os.environ:
        give_up_rights()
    return list(asked["args"])


def give_up_rights() -> None:
    """Obeys the permissions of files, also where the user is root (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    version, overrides = 0x20080522, 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(version, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice 32 of each
    assert libc.capget(header, data) == 0
    for index in range(2):
        data[index] &= ~overrides
    assert libc.capset(header, data) == 0


if __name__ == "__main__":
    import aiohttp
    import datasets
    import jinja2.sandbox
    import pyarrow.parquet
    import requests
    import rich.progress

    import fabe_ds.cli.main
    import fabe_ds.engine.batch
    import fabe_ds.engine.http
    import fabe_ds.formats.table
    import fabe_ds.pipeline
    import fabe_ds.tools.cache

    _ = (aiohttp, datasets, jinja2, pyarrow, requests, rich)
    if "models" in sys.argv[2:]:
        import gguf
        import torch
        import transformers.models.auto.modeling_auto
        import transformers.models.llama.modeling_llama
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        import fabe_ds.providers.transformers.chat
        import fabe_ds.providers.transformers.generation
        import fabe_ds.providers.transformers.hf
        import fabe_ds.providers.transformers.loading
        import fabe_ds.providers.transformers.modelscope

        get_checkpoint_conversion_mapping("llama")  # makes those of all
        torch.set_num_threads(1)  # others would not survive a fork
        _ = (gguf, transformers)
    sys.argv = ["fabe-ds", *serve(sys.argv[1])]
    try:
        fabe_ds.cli.main.main()
    except SystemExit as ended:
        if isinstance(ended.code, int):  # taking all that was imported apart takes a while
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise
