"""Serves a GGUF with llama.cpp (xllamacpp); prints its address when it is loaded; SIGTERM ends it.

It answers at its port from the start: 503, while the model is loading.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import xllamacpp


def main(model: str, slots: int = 4, port: int = 0, template: str = "") -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    if template:
        params.chat_template, params.use_jinja = template, True
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
    words = sys.argv[1:]
    main(words[0], *map(int, words[1:3]), *words[3:])
