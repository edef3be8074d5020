"""Pictures drawn by several ComfyUI servers at once, each by a worker of its own: a thread here, or through Ray an
actor on another machine. A server that is lost gives its picture back to the others.
"""

import contextlib
import http.client
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from ..tests import host
from ..tests.host import Client, HostError, PromptFailed

DRAWN, FAILED, LOST = "drawn", "failed", "lost"
PAUSES = 2, 4, 8  # seconds before each look whether a lost server has come back
CHANCES = 3  # how many servers a picture may cost before it is given up: it may be what kills them
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Job:
    """A picture to draw: an API prompt, the number of its node whose picture counts, and the pictures that it reads, as
    the contents of files under the names that the prompt has for them."""

    prompt: dict
    result: str
    files: dict


class Painter:
    """Draws jobs on one server. It may live in another process, so it takes and gives plain values only."""

    def __init__(self, url: str):
        self.client, self.name, self.there = Client(url), url, set()

    def draw(self, job: Job) -> tuple[str, bytes | str]:
        """(DRAWN, a PNG file), (FAILED, why the prompt did not run) or (LOST, why the server is thought to be)."""
        try:
            for name in set(job.files) - self.there:
                self.client.upload_image(name, job.files[name])
                self.there.add(name)
            entry = self.client.run(job.prompt, timeout=float("inf"))
            (picture,) = entry["outputs"][job.result]["images"]
            return DRAWN, self.client.view(picture)
        except PromptFailed as error:
            return FAILED, without_trace(str(error))
        # What breaks off a reply is no OSError, and half a reply is no JSON.
        except (HostError, OSError, http.client.HTTPException, ValueError) as error:
            self.there.clear()
            return LOST, f"{type(error).__name__}: {error}"

    def process(self) -> int:
        return os.getpid()

    def answers(self) -> bool:
        try:
            return bool(self.client.get("/prompt", timeout=30))
        except (OSError, http.client.HTTPException, ValueError):
            return False


def without_trace(message: str) -> str:
    """A message in one line, without the Python traceback behind it."""
    lines = message.splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith('  File "')), len(lines))
    return " ".join(line.strip() for line in lines[:end] if line.strip())


class Crew:
    """Workers that share tasks out among themselves.

    ``groups`` are lists of tasks in the order in which they are best done; a group stays with one worker, whose server
    has what its tasks have in common at hand, as long as the others have groups of their own. ``after`` is the task,
    if any, that must be done before another. ``make(task)`` gives its :class:`Job`, or raises PromptFailed; ``begun(
    task, worker's name)`` and ``done(task, worker's name, DRAWN or FAILED, PNG or reason, seconds)`` are told one at a
    time.
    """

    def __init__(
        self, groups: list[list[Hashable]], make: Callable, done: Callable,
        begun: Callable = lambda task, name: None, after: dict | None = None,
    ):  # fmt: skip
        self.groups = [list(group) for group in groups]
        self.home = {task: group for group in self.groups for task in group}
        self.make, self.done, self.begun, self.after = make, done, begun, after or {}
        self.open = set(self.home)  # neither drawn nor given up
        self.mine, self.losses, self.reasons = {}, {}, []
        self.stopped, self.error, self.changed = False, None, threading.Condition()

    def work(self, workers: list) -> None:
        """Draws everything. Returns early, within a picture, when it is interrupted; raises HostError when no worker is
        left, and whatever ``make`` and ``done`` raise."""
        threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            self._join(threads)
        except KeyboardInterrupt:
            self._stop()
            log.info("Stopping once the pictures at work are done; Ctrl-C again leaves them.")
            self._join(threads)
            raise
        if self.error:
            raise self.error
        if self.open and not self.stopped:
            why = self.reasons[-1] if self.reasons else "none was given"
            raise HostError(
                f"No ComfyUI server is left ({why}); {len(self.open)} pictures are still to be drawn, and the same "
                "command goes on with them."
            )

    def _join(self, threads):
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)

    def _stop(self, error=None):
        with self.changed:
            self.stopped, self.error = True, self.error or error
            self.changed.notify_all()

    def _work(self, worker):
        try:
            while (task := self._take(worker)) is not None:
                begin = time.monotonic()
                try:
                    kind, value = worker.draw(self.make(task))
                except PromptFailed as error:
                    kind, value = FAILED, str(error)
                if kind != LOST:
                    self._finish(task, worker.name, kind, value, time.monotonic() - begin)
                    continue
                self._give_back(task, worker.name, value)
                if not self._comes_back(worker):
                    return self._leave(worker, value)
        except BaseException as error:
            self._stop(error)

    def _take(self, worker):
        """A task, once there is one that can be begun; None when nothing is left to do."""
        with self.changed:
            while self.open and not self.stopped:
                task = self._next(worker)
                if task is not None:
                    self.begun(task, worker.name)
                    return task
                self.changed.wait()
        return None

    def _next(self, worker):
        """From the worker's own group, else from a new one, else from the end of the longest."""
        if not self.mine.get(worker):
            self.mine[worker] = next((g for g in self.groups if g and not any(g is m for m in self.mine.values())), [])
        for group in (self.mine[worker], *(group[::-1] for group in sorted(self.groups, key=len, reverse=True))):
            for task in group:
                if self.after.get(task) not in self.open:
                    self.home[task].remove(task)
                    return task
        return None

    def _finish(self, task, name, kind, value, seconds=0.0):
        with self.changed:
            self.done(task, name, kind, value, seconds)
            self.open.discard(task)
            self.changed.notify_all()

    def _give_back(self, task, name, why):
        log.warning("%s was lost: %s", name, why)
        self.losses[task] = self.losses.get(task, 0) + 1
        if self.losses[task] == CHANCES:
            return self._finish(task, name, FAILED, f"The server was lost {CHANCES} times while it drew this: {why}")
        with self.changed:
            self.home[task].insert(0, task)
            self.changed.notify_all()

    def _comes_back(self, worker):
        for pause in PAUSES:
            with self.changed:
                if self.changed.wait_for(lambda: self.stopped or not self.open, pause):
                    return True
            if worker.answers():
                return True
        return False

    def _leave(self, worker, why):
        log.warning("%s does not come back and is left out.", worker.name)
        with self.changed:
            self.mine.pop(worker, None)
            self.reasons.append(f"{worker.name}: {why}")
            self.changed.notify_all()


# ---- Ray ---------------------------------------------------------------------------------------------------------


class Remote:
    """A painter on another machine, which Ray starts again when it is lost."""

    def __init__(self, actor, name: str):
        self.actor, self.name = actor, name

    def draw(self, job: Job) -> tuple[str, bytes | str]:
        import ray

        try:
            return ray.get(self.actor.draw.remote(job))
        except ray.exceptions.RayError as error:
            return LOST, without_trace(str(error))

    def answers(self) -> bool:
        import ray

        try:
            return ray.get(self.actor.answers.remote())
        except ray.exceptions.RayError:
            return False


def find_cluster(address):
    """Ray itself would look for minutes."""
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise HostError(f'There is no Ray cluster at "{address}", given as host:port: {error}') from None


@contextlib.contextmanager
def on_ray(address: str, urls: list[str]) -> Iterator[list[Remote]]:
    """A worker for each node of a Ray cluster and each URL, which is meant as that node sees it.

    ``address`` is the cluster's, host:port, or "local" to start one on this machine alone. Raises HostError without
    Ray and where there is no cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise HostError("--ray needs the package ray, which is not installed; install it or leave --ray out.") from None
    if address != "local":
        find_cluster(address)
    # Only this process knows the pack by the name attune, so the code that its workers need travels with them.
    carried = sys.modules[__name__], host
    for module in carried:
        ray.cloudpickle.register_pickle_by_value(module)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address, **({"include_dashboard": False} if address == "local" else {}), **quiet)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=CHANCES, max_task_retries=CHANCES)(Painter)
        workers = []
        for node in (node for node in ray.nodes() if node["Alive"]):
            here = actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            for url in urls:
                workers.append(Remote(here.remote(url), f"{url} on {node['NodeManagerHostname']}"))
        yield workers
    finally:
        ray.shutdown()
        for module in carried:
            ray.cloudpickle.unregister_pickle_by_value(module)
