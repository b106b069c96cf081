"""The page on which a person votes between two cascades, blind."""

from __future__ import annotations

from imagen_lightning.evaluation.votes import QUESTIONS
from imagen_lightning.report.markup import Html, element, embedded_json
from imagen_lightning.report.style import STYLE

_LAYOUT = """
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.25rem; }
.side { border: 2px solid var(--line); border-radius: 12px; padding: 0.75rem; background: var(--card); }
.side h2 { text-align: center; }
.set { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 0.4rem; }
.set img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; }
.answers { display: flex; gap: 0.75rem; justify-content: center; margin: 1rem 0; flex-wrap: wrap; }
.answers button { border: 1px solid var(--line); background: var(--card); border-radius: 999px;
  padding: 0.5rem 1.2rem; }
.answers button:hover { background: var(--hover); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 0.35em; font: inherit; color: var(--soft); }
#prompt { font-size: 1.25rem; text-align: center; margin: 0.5rem 0; }
#question { text-align: center; font-weight: 600; }
"""

_SCRIPT = """
const questions = JSON.parse(document.getElementById("questions").textContent);
const show = id => document.getElementById(id);
let ballot = null, place = 0, question = 0, busy = false;

async function ask(path, body) {
  const headers = {"Content-Type": "application/json"};
  const options = body ? {method: "POST", headers, body: JSON.stringify(body)} : {};
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function fill(side) {
  const set = show(side);
  set.replaceChildren(...Array.from({length: ballot.images}, (_, number) => {
    const image = new Image();
    image.src = `/image/${ballot.order[place]}/${side}/${number}.png`;
    image.alt = `${side} set, image ${number + 1}`;
    return image;
  }));
}

function draw() {
  const done = place >= ballot.order.length;
  show("voting").hidden = done;
  show("finished").hidden = !done;
  show("count").textContent = `${Math.min(place, ballot.order.length)} of ${ballot.order.length} prompts`;
  if (done) return;
  show("prompt").textContent = ballot.prompts[ballot.order[place]];
  show("question").textContent = questions[question].text;
  if (question === 0) ["left", "right"].forEach(fill);
}

async function vote(side) {
  if (busy || place >= ballot.order.length) return;
  busy = true;
  try {
    await ask("/vote", {prompt: ballot.order[place], question: questions[question].name, side});
    show("problem").hidden = true;
    question += 1;
    if (question === questions.length) { question = 0; place += 1; }
    draw();
  } catch (error) {
    show("problem").textContent = `The vote was not saved: ${error.message}. Is the program still running?`;
    show("problem").hidden = false;
  } finally { busy = false; }
}

function back() {
  if (question > 0) question -= 1;
  else if (place > 0) { place -= 1; question = questions.length - 1; ["left", "right"].forEach(fill); }
  draw();
}

document.querySelectorAll("[data-side]").forEach(button => button.onclick = () => vote(button.dataset.side));
show("back").onclick = back;
document.addEventListener("keydown", event => {
  const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", "1": "left", "2": "tie", "3": "right"};
  const side = keys[event.key];
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (side) { event.preventDefault(); vote(side); }
  if (event.key === "Backspace") { event.preventDefault(); back(); }
});

ask("/ballot").then(found => {
  ballot = found;
  place = ballot.order.findIndex(prompt => !ballot.done.includes(prompt));
  if (place < 0) place = ballot.order.length;
  draw();
});
"""


def ballot_page() -> Html:
    """The page; what it shows it asks of the program that serves it, which never says which cascade is which."""
    questions = [{"name": name, "text": text} for name, text in QUESTIONS.items()]

    def side(name: str, title: str) -> Html:
        return element("div", element("h2", title), element("div", class_="set", id=name), class_="side")

    def answer(side: str, text: str, key: str) -> Html:
        return element("button", text, " ", element("kbd", key), type="button", data_side=side)

    voting = element(
        "div",
        element("p", id="prompt"),
        element("p", id="question"),
        element(  # above the images: however many these are, the answers are in sight
            "div",
            answer("left", "Left", "←"),
            answer("tie", "No difference", "↓"),
            answer("right", "Right", "→"),
            element("button", "Back ", element("kbd", "⌫"), type="button", id="back"),
            class_="answers",
        ),
        element("div", side("left", "Left"), side("right", "Right"), class_="sides"),
        id="voting",
        hidden=True,
    )
    finished = element(
        "p",
        "That was the last prompt. Every vote is saved; end the program for the result.",
        id="finished",
        hidden=True,
    )
    body = element(
        "main",
        element("header", element("h1", "Which is better?"), element("p", id="count", class_="lead")),
        element("p", id="problem", class_="notice problem", hidden=True),
        voting,
        finished,
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", "Which is better?"),
        element("style", Html(STYLE + _LAYOUT)),
    )
    script = element("script", Html(_SCRIPT))
    page = element("html", head, element("body", body, embedded_json("questions", questions), script), lang="en")
    return Html("<!doctype html>\n" + page)
