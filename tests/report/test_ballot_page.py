"""The page on which a person votes, in a browser: blind, by key, saved as votes fall, gone on with."""

import json
import socket
import struct
import threading
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from imagen_lightning.evaluation.compare import BallotServer, image_path
from imagen_lightning.evaluation.votes import QUESTIONS, Ballot
from imagen_lightning.images import save_png, to_pil
from imagen_lightning.report.ballot_page import ballot_page

PROMPTS = ["a <b>red</b> star & more", "two", "three"]
COLOURS = {"a": (255, 0, 0), "b": (0, 0, 255)}


@pytest.fixture
def page(chromium):
    made = chromium.new_page()
    yield made
    made.close()


@pytest.fixture
def server(tmp_path):
    """A comparison in which cascade A draws red and cascade B blue, served."""
    for prompt in range(len(PROMPTS)):
        for name, colour in COLOURS.items():
            for number in range(2):
                image = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
                save_png(to_pil(image), image_path(tmp_path, name, prompt, number))
    ballot = Ballot(tmp_path / "votes.jsonl", len(PROMPTS), 5)
    with BallotServer(tmp_path, ballot, PROMPTS, 2, str(ballot_page())) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def colour_shown(page, side):
    """The cascade whose colour the side's first image has."""
    red = page.evaluate(
        """side => { const image = document.querySelector(`#${side} img`);
        const context = document.createElement('canvas').getContext('2d'); context.drawImage(image, 0, 0);
        return context.getImageData(1, 1, 1, 1).data[0]; }""",
        side,
    )
    return "a" if red > 128 else "b"


def press(page, key):
    before = page.inner_text("#question"), page.inner_text("#count")
    page.keyboard.press(key)
    page.wait_for_function(
        "([q, c]) => document.getElementById('question').textContent !== q || "
        "document.getElementById('count').textContent !== c",
        arg=list(before),
    )


def test_votes_go_to_the_cascade_that_is_seen(server, page):
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    votes = []
    for place in range(len(PROMPTS)):
        page.wait_for_function("() => [...document.images].length == 4 && [...document.images].every(i => i.complete)")
        prompt = server.ballot.order[place]
        assert page.inner_text("#prompt") == PROMPTS[prompt]
        assert page.inner_text("#question") == QUESTIONS["fidelity"]
        seen = colour_shown(page, "left")
        assert colour_shown(page, "right") != seen
        press(page, "ArrowLeft")
        votes.append((prompt, "fidelity", seen))
        assert page.inner_text("#question") == QUESTIONS["alignment"]
        if place == 1:  # a second thought
            press(page, "Backspace")
            press(page, "ArrowRight")
            votes[-1] = (prompt, "fidelity", "b" if seen == "a" else "a")
        press(page, "ArrowDown")
        votes.append((prompt, "alignment", "tie"))
        found = {(vote.prompt, vote.question, vote.choice) for vote in server.ballot.votes.values()}
        assert found == set(votes)
        assert json.loads(server.ballot.path.read_text().splitlines()[-1])["choice"] == "tie"
    assert page.is_visible("#finished")
    assert page.inner_text("#count") == "3 of 3 prompts"
    assert problems == []
    text = page.content()
    assert "cascade" not in text.lower()  # nothing tells which is which


def test_it_goes_on_with_the_first_prompt_without_votes(server, page):
    first = server.ballot.order[0]
    for question in QUESTIONS:
        server.ballot.cast(first, question, "tie")
    page.goto(server.url)
    page.wait_for_selector("#left img")
    assert page.inner_text("#prompt") == PROMPTS[server.ballot.order[1]]


def post(server, body, **headers):
    request = Request(server.url + "vote", data=body, headers={"Content-Type": "application/json", **headers})
    with urlopen(request) as answer:
        return answer.status


MALFORMED = [
    b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET /ballot HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n\r\n",
    b"GET /image/" + b"9" * 5000 + b"/left/0.png HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /image/x/left/y.png HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\xff\xfe\0\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    *(
        b"POST /vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
        for body in (
            b"[" * 9000,
            b'{"prompt": 1e999, "question": "fidelity", "side": "left"}',
            b'{"prompt": 0.5, "question": "fidelity", "side": "left"}',
            b'{"prompt": true, "question": "fidelity", "side": "left"}',
            b'{"prompt": ' + b"9" * 5000 + b', "question": "fidelity", "side": "left"}',
            b'{"prompt": "\xff"}',
            b"null",
        )
    ),
]


@pytest.mark.parametrize("request_bytes", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_answered_and_tell_the_terminal_nothing(server, request_bytes, capfd):
    with socket.create_connection(server.server_address, timeout=10) as client:
        client.sendall(request_bytes)
        answer = client.recv(100)
    assert answer.startswith((b"HTTP/1.0 4", b"<!DOCTYPE")), answer  # the latter to HTTP 0.9
    with socket.create_connection(server.server_address) as client:  # goes before it is answered
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with urlopen(server.url + "ballot") as answer:
        assert answer.status == 200
    assert not server.ballot.votes
    assert capfd.readouterr().err == ""


def test_votes_of_other_sites_and_other_things_are_refused(server):
    vote = json.dumps({"prompt": 0, "question": "fidelity", "side": "left"}).encode()
    for body, headers in (
        (vote, {"Origin": "http://elsewhere.example"}),
        (vote, {"Host": "elsewhere.example"}),
        (vote, {"Content-Type": "text/plain"}),
        (b"[]", {}),
        (b"{", {}),
        (json.dumps({"prompt": 9, "question": "fidelity", "side": "left"}).encode(), {}),
        (b" " * 20_000, {}),
    ):
        with pytest.raises(HTTPError) as refused:
            post(server, body, **headers)
        assert refused.value.code == 400
    assert not server.ballot.votes
    assert post(server, vote) == 200
    for path in (
        "image/0/left/9.png",
        "image/9/left/0.png",
        "image/0/..%2f/0.png",
        "votes.jsonl",
        "image/0/middle/0.png",
    ):
        with pytest.raises(HTTPError) as missing:
            urlopen(server.url + path)
        assert missing.value.code == 404
