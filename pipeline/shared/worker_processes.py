"""Processes that stages spread their tasks over: of this machine, over pipes, or a Dask scheduler's.

Nothing listens for the processes of this machine: a port would let any user of it run code as this one. A pipe's two
ends are this process and its worker, and a worker whose pipe or parent is gone ends.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from tailrace.storage.errors import SettingsError, WorkerLostError

ATTEMPTS = 3
"""How many workers a task may cost before it is given up."""

Submit = Callable[..., "Future[Any]"]
"""Takes a function and its arguments, all picklable, and runs it in a worker."""

_SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def open_workers(n_workers: int, scheduler: str | None = None) -> Iterator[Submit]:
    """Yield what runs a task in one of ``n_workers`` processes, or at a scheduler by its address.

    The processes end with the block, at once if it raises. A task whose worker is lost runs again, in another one.
    """
    with _scheduler(scheduler) if scheduler else _processes(n_workers) as submit:
        yield submit


def completed(submit: Submit, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Yield what ``function`` returns for each task's arguments, in any order, while further tasks are asked for."""
    done: SimpleQueue[Future[Any]] = SimpleQueue()
    n_waiting = 0
    for arguments in tasks:
        submit(function, *arguments).add_done_callback(done.put)
        n_waiting += 1
        while not done.empty():
            n_waiting -= 1
            yield done.get().result()
    for _ in range(n_waiting):
        yield done.get().result()


@contextmanager
def _scheduler(address: str) -> Iterator[Submit]:
    """Yield what runs a task at a Dask scheduler. Raises SettingsError if it cannot be reached.

    ``distributed`` is untyped and slow to import, so it is loaded here only. It reports every step of a connection's
    life unless told before it is imported.
    """
    config: Any = importlib.import_module("dask").config
    config.set({"logging.distributed": "error"})
    distributed: Any = importlib.import_module("distributed")
    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        client: Any = distributed.Client(address)
    except (OSError, TypeError, ValueError) as error:
        raise SettingsError(
            f"--scheduler {address}: cannot be reached: {error}; check the address, and Dask's own configuration for "
            "the certificates of a tls:// one, or use --workers"
        ) from error
    with client:
        yield client.get_executor().submit


@contextmanager
def _processes(n_workers: int) -> Iterator[Submit]:
    """Yield what runs a task in a process of this machine; a thread waits for each of them."""
    workers = [WorkerProcess(number) for number in range(n_workers)]
    free: SimpleQueue[WorkerProcess] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        worker = free.get()
        try:
            return worker.run(function, arguments)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(n_workers)
    try:
        yield lambda function, *arguments: threads.submit(run, function, arguments)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class WorkerProcess:
    """A process that runs one task at a time, and this end of the pipe to it; started anew when it is lost."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        self._is_killed = False
        self._exit_code: int | None = None
        self._start()

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Return what the task returns or raise what it raises; WorkerLostError if it costs too many processes."""
        # not by `send`: torch would pass its tensors through a socket that it listens on
        task = pickle.dumps((function, arguments))
        for _ in range(ATTEMPTS):
            try:
                self._pipe.send_bytes(task)
                result, error = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                self._replace()
                continue
            if error is not None:
                raise error
            return result
        raise WorkerLostError(
            f"--workers: {ATTEMPTS} worker processes in a row were lost on the same task, the last with exit code "
            f"{self._exit_code}. {self._advice()}; what is finished is kept"
        )

    def _advice(self) -> str:
        if self._exit_code == -signal.SIGKILL:
            return "Most often the system ends them because memory runs out: use fewer workers, and run the same again"
        return (
            'What they wrote above says why. A script that starts workers needs `if __name__ == "__main__":` before '
            "its calls, since each worker imports it"
        )

    def kill(self) -> None:
        """End the process whatever it is doing; it is not started again."""
        with self._lock:
            self._is_killed = True
            self._process.kill()

    def close(self) -> None:
        """Let the process end when its task is done, and wait for that."""
        self._pipe.close()
        self._process.join()

    def _replace(self) -> None:
        with self._lock:
            if self._is_killed:
                raise WorkerLostError("the workers were told to end")
            self.close()
            self._exit_code = self._process.exitcode
            self._start()

    def _start(self) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, self._number), daemon=True)
        # Ctrl-C in a terminal goes to every process; only this one is to react. A mask is inherited, but the first
        # process starts the tracker, which would take it off.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _one_thread_each():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have processes that start inside begin with one thread: they share the cores, and a task may set more.

    A process reads it as it imports the user's script, and torch with it, before anything of ours runs there.
    """
    name, given = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    os.environ[name] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


_worker_number: int | None = None


def worker_number() -> int | None:
    """Return which of the ``n_workers`` processes this is, from 0; None in a process of another kind."""
    return _worker_number


def _serve(pipe: Connection, number: int) -> None:
    """Run the tasks that come through a pipe until its other end is closed."""
    global _worker_number
    _worker_number = number
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_outcome(task))


def _end_with_parent() -> None:
    """End this process, in the middle of a task as well, when its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(task: bytes) -> bytes:
    """Return the pickled (result, None) of a task, or (None, what it raised)."""
    try:
        function, arguments = pickle.loads(task)
        return pickle.dumps((function(*arguments), None))
    except BaseException as error:  # an interrupt of a task is not one of the command
        return pickle.dumps((None, _sendable(error)))


def _sendable(error: BaseException) -> Exception:
    """Return an error that arrives whole: itself, or a RuntimeError with its traceback if pickling would lose it."""
    trace = f"In a worker process:\n{traceback.format_exc()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class makes of it
        return RuntimeError(trace)
    if not isinstance(error, Exception):
        return RuntimeError(trace)
    error.add_note(trace)
    return error
