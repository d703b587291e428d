"""A ``python`` that starts at once: programs are forked from a process that has imported everything.

``python`` here is a small client. It sends its words, environment, folder and open files to the server, which forks the
program; the client hands on signals, and ends as the program ends. If it is killed, so is the program with all that it
started. What an interpreter's start and imports do is thus left out, and nothing else: a launcher that starts
``sys.executable`` gets the client again.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
words = [word for word in sys.argv[1:] if word != "-u"] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
if not words or words[0].startswith("-") and words[0] not in ("-m", "-c"):
    os.execv("{python}", ["{python}", *sys.argv[1:]])  # --version and the like
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    request = json.dumps([words, dict(os.environ), os.getcwd(), sys.argv[0]]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    ended = server.recv(2)
if len(ended) < 2:
    sys.exit("the program was lost")
code, number = ended
if number:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
sys.exit(code)
"""


def make_clients(folder: Path, address: str) -> None:
    """Writes ``python``, ``python3`` and the environment's programs of Python packages, which begin with it."""
    real = Path(sys.executable)
    (folder / "python").write_text(CLIENT.format(python=real, address=address))
    (folder / "python").chmod(0o755)
    (folder / "python3").symlink_to("python")
    for name in ("deepspeed", "pytest"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{folder / "python"}" "{real.with_name(name)}" "$@"\n')
        (folder / name).chmod(0o755)


def serve(address: str) -> None:
    """Forks a program for each client, until the process that started this one ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while parent.sentinel not in select.select([listener, parent.sentinel], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _watch(client)
            client.close()


def _reap(number: int, frame: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(client: socket.socket) -> NoReturn:
    """Forks the program, hands signals on to it, and tells the client how it ended."""
    os.setsid()
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    words, environment, folder, executable = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    program = os.fork()
    if program == 0:
        client.close()
        _become(words, environment, folder, executable, files)
    for file in files:
        os.close(file)
    end = os.pidfd_open(program)
    while end not in select.select([client, end], [], [])[0]:
        if not (numbers := client.recv(1)):  # the client was killed
            os.killpg(0, signal.SIGKILL)
        os.kill(program, numbers[0])
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    client.sendall(bytes([max(status, 0), max(-status, 0)]))
    os._exit(0)


def _become(words: list[str], environment: dict[str, str], folder: str, executable: str, files: list[int]) -> NoReturn:
    """As an interpreter that was started with these words, from its imports to its end."""
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)  # the server's is none
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = executable
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    code = 1
    try:
        code = _run(words)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run(words: list[str]) -> int:
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            namespace: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(words[1], "<string>", "exec"), namespace)
        elif words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).parent.resolve())
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    return 0
