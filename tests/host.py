"""ComfyUI as a server process and an HTTP client, for dev.py and for the tests. Standard library only."""

import base64
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The server ends when its standard input closes, so it cannot outlive us, however we die.
LAUNCH = """
import os, runpy, sys, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TEXT_FRAME = bytes([0, 0, 0, 3])  # how ComfyUI marks what a node says while it works


class HostError(RuntimeError):
    """Something about ComfyUI that the developer should read as one message."""


class PromptFailed(HostError):
    """ComfyUI refused a prompt or could not finish it; the server itself is well."""


@dataclass(frozen=True)
class Host:
    """One ComfyUI folder, the Python that runs it and an optional folder of packages that go first there."""

    path: Path
    python: str = sys.executable
    overlay: str = ""

    @classmethod
    def current(cls) -> "Host":
        if "ATTUNE_HOST" not in os.environ:
            raise HostError("ATTUNE_HOST is not set: run the tests with `python3 dev.py test`.")
        return cls(Path(os.environ["ATTUNE_HOST"]))

    @classmethod
    def every(cls) -> list["Host"]:
        """The current host, then the oldest one that the pack supports if dev.py made it."""
        if "ATTUNE_OLD_HOST" not in os.environ:
            return [cls.current()]
        overlay = os.environ.get("ATTUNE_OLD_HOST_PYTHONPATH", "")
        return [cls.current(), cls(Path(os.environ["ATTUNE_OLD_HOST"]), overlay=overlay)]

    def __str__(self) -> str:
        try:
            text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            return self.path.name
        return text.split('"')[1]


def open_modules(host: Host) -> None:
    """Make ComfyUI's own modules importable in this process, set up like the test server's."""
    sys.path.insert(0, str(host.path))
    import torch
    from comfy.cli_args import args

    # Without this folder_paths makes its folders inside ComfyUI. The object deletes the folder when Python ends.
    open_modules.base = tempfile.TemporaryDirectory(prefix="attune-")
    args.base_directory = open_modules.base.name
    args.cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    args.use_pytorch_cross_attention = True


def stop_cleanly_on_signals() -> None:
    """Turn a polite kill into Ctrl-C, so that `with Server(...)` gets to stop its process."""

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)


class Client:
    """A ComfyUI that runs at a URL such as http://127.0.0.1:8188, wherever and by whomever it was started."""

    PATIENCE = 60  # seconds in which a server must answer that is asked whether it is still there

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.asked = 0.0
        # Proxies from the environment must not see requests to this machine.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def check_alive(self) -> None:
        """Raises if the server is gone; asks it now and then, since a broken line looks like a long silence."""
        if time.monotonic() - self.asked > 10:
            self.get("/prompt", timeout=self.PATIENCE)
            self.asked = time.monotonic()

    def log_tail(self) -> str:
        """The end of the server's log where it can be read, to put behind an error."""
        return ""

    # -- HTTP ---------------------------------------------------------------------------------------------------

    def request(self, path: str, data: bytes | None = None, kind: str = "application/json", timeout: float = 120):
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": kind} if data else {})
        with self.opener.open(request, timeout=timeout) as reply:
            return reply.read()

    def get(self, path: str, timeout: float = 120):
        return json.loads(self.request(path, timeout=timeout))

    def post(self, path: str, value: dict) -> dict:
        reply = self.request(path, json.dumps(value).encode())
        return json.loads(reply) if reply else {}

    def object_info(self) -> dict:
        return self.get("/object_info")

    def history(self, prompt_id: str) -> dict | None:
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def view(self, image: dict) -> bytes:
        """The bytes of one entry of a node's `images` output."""
        return self.request("/view?" + urllib.parse.urlencode(image))

    def upload_image(self, name: str, content: bytes) -> str:
        """Put an image in ComfyUI's input folder; returns the name for LoadImage."""
        boundary = secrets.token_hex(16)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        tail = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        body = head.encode() + content + tail.encode()
        return json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))["name"]

    # -- prompts ------------------------------------------------------------------------------------------------

    def queue(self, prompt: dict, client_id: str = "") -> str:
        """Post an API prompt and return its id. Any node error is an error here, though ComfyUI may run the rest."""
        try:
            reply = self.post("/prompt", {"prompt": prompt, "client_id": client_id})
        except urllib.error.HTTPError as error:
            raise PromptFailed(explain_refusal(prompt, error.read())) from None
        if reply.get("node_errors"):
            raise PromptFailed(explain_refusal(prompt, json.dumps(reply).encode()))
        return reply["prompt_id"]

    def run(
        self, prompt: dict, on_progress: Callable[[str, int, int], None] | None = None, timeout: float = 1800,
        on_text: Callable[[str, str], None] | None = None,
    ):  # fmt: skip
        """Run an API prompt and return its history entry.

        `on_progress` gets node id, step and number of steps; `on_text` node id and what a node says while it works.
        """
        client_id = uuid.uuid4().hex
        deadline = time.monotonic() + timeout
        with WebSocket(f"{self.url}/ws?clientId={client_id}") as socket_:
            prompt_id = self.queue(prompt, client_id)
            while True:
                if time.monotonic() > deadline:
                    self.interrupt(prompt_id)
                    raise PromptFailed(f"The prompt did not finish within {timeout:.0f} s.{self.log_tail()}")
                self.check_alive()
                message = socket_.receive(1.0)
                if isinstance(message, bytes) and message[:4] == TEXT_FRAME and on_text:
                    end = 8 + int.from_bytes(message[4:8], "big")
                    on_text(message[8:end].decode(), message[end:].decode())
                if not isinstance(message, str):
                    continue
                event = json.loads(message)
                data = event.get("data", {})
                if data.get("prompt_id") != prompt_id:
                    continue
                if event["type"] == "progress" and on_progress:
                    on_progress(data["node"], int(data["value"]), int(data["max"]))
                elif event["type"] == "executing" and data.get("node") and on_progress:
                    on_progress(data["node"], 0, 0)
                elif event["type"] == "execution_error":
                    where = f"{data.get('node_type')} (node {data.get('node_id')})"
                    trace = "".join(data.get("traceback") or [])
                    raise PromptFailed(f"{where} failed: {data.get('exception_message', '').strip()}\n{trace}")
                elif event["type"] == "execution_interrupted":
                    raise PromptFailed("The prompt was interrupted.")
                elif event["type"] == "execution_success":
                    return self.wait_for_history(prompt_id)

    def wait_for_history(self, prompt_id: str, timeout: float = 60) -> dict:
        """The history entry may come a moment after the last socket event."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            entry = self.history(prompt_id)
            if entry:
                return entry
            time.sleep(0.1)
        raise HostError(f"Prompt {prompt_id} never appeared in the history.{self.log_tail()}")


class Server(Client):
    """A running ComfyUI whose only custom node is this checkout. Use it as a context manager."""

    def __init__(
        self, host: Host, *, base: Path | None = None, port: int = 0, cpu: bool | None = None,
        options: tuple[str, ...] = (), show_log: bool = False, start_timeout: float = 300,
    ):  # fmt: skip
        self.port = port or free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.host = host
        self.keep_base = base is not None
        self.base = base
        self.cpu = cpu
        self.options = options
        self.show_log = show_log
        self.start_timeout = start_timeout
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        if self.cpu is None:
            self.cpu = not has_accelerator(self.host.python)
        self.base = Path(self.base or tempfile.mkdtemp(prefix="attune-"))
        try:
            self._start()
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        link_pack(self.base)
        command = [
            self.host.python, "-c", LAUNCH, str(self.host.path / "main.py"),
            "--base-directory", str(self.base), "--port", str(self.port), "--disable-auto-launch",
            "--database-url", "sqlite:///:memory:", "--use-pytorch-cross-attention", *self.options,
        ]  # fmt: skip
        if self.cpu:
            command.append("--cpu")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        environment.pop("PYTHONPATH", None)
        if self.host.overlay:
            environment["PYTHONPATH"] = self.host.overlay
        own_group = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        )
        log = None if self.show_log else self.log_path.open("wb")
        try:
            self.process = subprocess.Popen(
                command, cwd=self.base, env=environment, stdin=subprocess.PIPE,
                stdout=log, stderr=subprocess.STDOUT if log else None, **own_group,
            )  # fmt: skip
        finally:
            if log:
                log.close()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                return self.get("/system_stats", timeout=5)
            except OSError:
                time.sleep(0.2)
        raise HostError(f"ComfyUI did not answer within {self.start_timeout:.0f} s.{self.log_tail()}")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process and process.poll() is None:
            end_group(process)
        if process:
            process.stdin.close()
        if not self.keep_base and self.base:
            shutil.rmtree(self.base, ignore_errors=True)

    @property
    def log_path(self) -> Path:
        return self.base / "server.log"

    def log_tail(self, lines: int = 30) -> str:
        if self.show_log or not self.log_path.exists():
            return ""
        text = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["\nThe end of its log:", *("  " + line for line in text[-lines:])])

    def check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else "none"
            raise HostError(f"ComfyUI ended by itself (exit code {code}).{self.log_tail()}")


class WebSocket:
    """Just enough of RFC 6455 to read a server's messages."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http":
            raise HostError(f"{url} is not an http address.")
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=60)
        path = f"{parts.path}?{parts.query}"
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise HostError(f"ComfyUI refused the web socket: {head.decode(errors='replace').splitlines()[0]}")

    def __enter__(self) -> "WebSocket":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise HostError("ComfyUI closed the web socket.")
            data += part
        return data

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message, or None if there is none in time."""
        if not select.select([self.socket], [], [], timeout)[0]:
            return None
        message, kind, final = b"", 0, False
        while not final:
            first, second = self._read(2)
            final, opcode, length = bool(first & 0x80), first & 0x0F, second & 0x7F
            if length > 125:
                length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
            payload = self._read(length)
            if opcode == 8:
                raise HostError("ComfyUI closed the web socket.")
            if opcode == 9:
                # A pong must be masked; the all-zero mask leaves the payload as it is.
                self.socket.sendall(bytes([0x8A, 0x80 | len(payload)]) + bytes(4) + payload)
            if opcode > 7:
                if not kind:
                    return None
                final = False
                continue
            kind = kind or opcode
            message += payload
        return message.decode() if kind == 1 else message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_accelerator(python: str) -> bool:
    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    try:
        reply = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    except OSError as error:
        raise HostError(f"{python} cannot be started: {error}") from None
    if reply.returncode:
        raise HostError(f"{python} cannot import torch: {(reply.stderr.splitlines() or ['no reason given'])[-1]}")
    return "True" in reply.stdout


def link_pack(base: Path) -> None:
    """Attach this checkout to a base folder under the pack's own name, whatever the checkout is called."""
    link = base / "custom_nodes" / "attune"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads its own group together with its children; ask first, then insist."""
    for force in (False, True):
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        else:
            os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue


def explain_refusal(prompt: dict, body: bytes) -> str:
    """ComfyUI's reasons for refusing a prompt, one line each, with the names of the nodes."""
    try:
        reply = json.loads(body)
    except ValueError:
        return f"ComfyUI refused the prompt: {body[:500].decode(errors='replace')}"
    error = reply.get("error") or {}
    lines = [error.get("message", "some nodes are wrong") if isinstance(error, dict) else str(error)]
    for node, found in (reply.get("node_errors") or {}).items():
        for item in found.get("errors", []):
            kind = prompt.get(node, {}).get("class_type", "?")
            lines.append(f"  {kind} (node {node}): {item.get('message')}: {item.get('details')}")
    return "ComfyUI refused the prompt: " + "\n".join(lines)
