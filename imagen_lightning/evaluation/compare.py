"""Two cascades' images of the same prompts and seeds, drawn into one folder and shown to a person who votes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.votes import Ballot

PLAN = "plan.json"
VOTES = "votes.jsonl"
RESULT = "result.json"
_LARGEST_BODY = 10_000


def image_path(folder: Path, cascade: str, prompt: int, number: int) -> Path:
    """Where an image lies: cascade "a" or "b", the prompt's number, and its own number among the prompt's."""
    return folder / cascade / f"{prompt:05d}-{number:02d}.png"


class BallotServer(ThreadingHTTPServer):
    """Serves the page, the images by side, and takes votes; reached from this machine alone.

    Args:
        folder: of the comparison, with the images.
        ballot: where votes go.
        prompts: the captions.
        num_images: of each prompt and cascade.
        page: the page's HTML.
        port: 0 takes a free one, see `url`.

    Raises:
        InputError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, ballot: Ballot, prompts: list[str], num_images: int, page: str, port: int = 0
    ) -> None:
        self.folder = folder
        self.ballot = ballot
        self.prompts = prompts
        self.num_images = num_images
        self.page = page
        self.lock = Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"--port {port} cannot be used ({error.strerror}); give another, or 0") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: BallotServer

    timeout = 60  # seconds that a request may stand still

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._vote)

    def _answer(self, method: Callable[[], None]) -> None:
        """Answer a request; whatever it holds, the server goes on and the terminal stays quiet."""
        try:
            method()
        except ConnectionError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:  # InputError is a ValueError
            self._send(HTTPStatus.BAD_REQUEST, str(error).encode(errors="replace"), "text/plain; charset=utf-8")
        except OSError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode(), "text/plain; charset=utf-8")

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_local():
            self._send(HTTPStatus.FORBIDDEN, b"", "text/plain")
        elif path == "/":
            self._send(HTTPStatus.OK, self.server.page.encode(), "text/html; charset=utf-8")
        elif path == "/ballot":
            self._json(self._ballot())
        else:
            self._image(path)

    def _vote(self) -> None:
        length = self.headers.get("Content-Length", "")
        wanted = self.path == "/vote" and self.headers.get_content_type() == "application/json"
        if not (wanted and self._is_local() and length.isdecimal() and int(length) <= _LARGEST_BODY):
            raise ValueError("this is not a vote")
        vote = json.loads(self.rfile.read(int(length)))
        if type(vote["prompt"]) is not int:
            raise ValueError("this is not a vote: its prompt is not a whole number")
        with self.server.lock:
            self.server.ballot.cast(vote["prompt"], str(vote["question"]), str(vote["side"]))
        self._json({"saved": True})

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is for the person."""

    def _is_local(self) -> bool:
        """Whether the page was asked for by this server's own name: other sites cannot vote through the browser."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        origin = self.headers.get("Origin")
        return host in ("127.0.0.1", "localhost") and (origin is None or urlsplit(origin).hostname == host)

    def _ballot(self) -> dict[str, Any]:
        ballot = self.server.ballot
        with self.server.lock:
            done = [prompt for prompt in ballot.order if ballot.is_done(prompt)]
        return {
            "prompts": self.server.prompts,
            "order": ballot.order,
            "done": done,
            "images": self.server.num_images,
        }

    def _image(self, path: str) -> None:
        parts = path.removesuffix(".png").split("/")
        valid = len(parts) == 5 and parts[1] == "image" and parts[3] in ("left", "right")
        prompt, number = (int(parts[place]) for place in (2, 4)) if valid else (-1, -1)
        if not (0 <= prompt < len(self.server.prompts) and 0 <= number < self.server.num_images):
            self._send(HTTPStatus.NOT_FOUND, b"", "text/plain")
            return
        cascade = self.server.ballot.shown(prompt, parts[3])
        file = image_path(self.server.folder, cascade, prompt, number)
        if file.is_file():
            self._send(HTTPStatus.OK, file.read_bytes(), "image/png")
        else:
            self._send(HTTPStatus.NOT_FOUND, b"", "text/plain")

    def _json(self, content: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


def draw(
    cascade: Any,
    captions: list[str],
    folder: Path,
    name: str,
    num_images: int,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Draws what is missing of one cascade's images; image k of prompt p takes its noise from (seed, p * num + k)."""
    from imagen_lightning.images import save_png, to_pil

    wanted = [(prompt, number) for prompt in range(len(captions)) for number in range(num_images)]
    for start in range(0, len(wanted), batch_size):
        rows = wanted[start : start + batch_size]
        paths = [image_path(folder, name, prompt, number) for prompt, number in rows]
        if not all(path.exists() for path in paths):
            chosen = [captions[prompt] for prompt, _ in rows]
            samples = cascade.sample(chosen, seed=seed, first_index=start, batch_size=batch_size, **settings)
            for path, image in zip(paths, samples.images):
                save_png(to_pil(image), path)
        progress(len(rows))
