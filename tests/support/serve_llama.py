"""Serves a GGUF with llama.cpp (xllamacpp) on a free port; prints its address; SIGTERM ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading

import xllamacpp


def main(model: str, slots: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = 2048 * slots
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while not stop.wait(0.2):
        pass
    os._exit(0)  # the server's own way down may hang


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
