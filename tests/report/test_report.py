"""The report in a browser: it renders, it sorts, it slides, it stays offline."""

import json
import time

import pytest

from imagen_lightning.report.report import build
from imagen_lightning.report.sources import read_sources

EVIL = "<script>document.title='run'</script><img src=x onerror=alert(1)>"
CAPTIONS = ("a red star", EVIL, "a blue circle")


@pytest.fixture(scope="module")
def report(make, tmp_path_factory):
    """A page of three base stages, a super-resolution stage, a matrix and a sweep."""
    top = tmp_path_factory.mktemp("runs")
    for number in range(3):
        metrics = {"scale": 3 - number, "seed": number, "num": 200 + 20 * number}
        samples = {"captions": CAPTIONS, "steps": tuple(range(500, 2001 + 500 * number, 500))}
        config = make.configuration(lr=(1 + number) / 1000)
        make.run(top / f"base{number}", config=config, metrics=metrics, samples=samples)
    make.run(top / "sr", config=make.configuration(64, low_res_size=16), metrics={"aug": True}, samples={"stage": 1})
    for number in range(3):  # the third is measured on more images
        num, steps = (500 if number == 2 else 200), range(1000, 5000, 1000)
        values = [make.value("FD-random", number + 2000 / step, num_samples=num, image_size=16) for step in steps]
        make.values(top / f"base{number}", list(zip(steps, ["base/fd-random"] * 4, values)))
    (top / "base1" / "verdict.json").write_text(json.dumps({"step": 9000, "verdict": ["text is ignored"]}))
    make.matrix(top / "matrix")
    make.sweep(top / "sweep")
    sources = read_sources([top])
    build(sources).write(top / "report.html")
    assert sources.problems.lines == []
    return top / "report.html"


def until(page, expression, seconds=30):
    """Waits in Python: the page's policy forbids the browser to evaluate a text again and again."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def draw_all(page):
    """Scrolls to every figure and waits for the last to be drawn."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
    until(page, "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")


def column(page, section, number):
    """The texts of a table's column, top to bottom."""
    return (
        page.locator(f"#{section} table.sortable").first.locator(f"tbody tr > :nth-child({number})").all_inner_texts()
    )


def box(page, kind):
    """The samples under a heading."""
    found = page.locator("#samples .samples").nth(kind)
    found.scroll_into_view_if_needed()
    until(page, f"document.querySelectorAll('#samples .samples')[{kind}].querySelector('img, .shown:not(:empty)')")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_has_points(visit, report, scheme):
    page = visit(report, color_scheme=scheme)
    draw_all(page)
    plots = page.locator(".plot").all()
    titles = page.locator(".plot-head h3").all_inner_texts()
    assert titles == [
        *("FD-random against caption accuracy", "Training loss", "Validation loss", "Training loss", "Validation loss"),
        *("Loss by noise level", "Loss by noise level", "Loss by augmentation level"),
        *("FD-random, base 16 px, X0", "FD-random, base 16 px, X0"),
        *("base/caption_accuracy, base 16 px, X0", "base/caption_accuracy, super-resolution 16 → 64 px, X0"),
    ]
    for title, plot in zip(titles, plots):
        lines = plot.locator(".scatterlayer path.js-line").all()
        assert lines, title
        for line in lines:
            assert line.get_attribute("d").count(",") >= 2, title  # points joined
        assert plot.locator(".scatterlayer .trace").count() >= 1
    points = plots[0].locator(".points path")
    assert points.count() == 8
    assert plots[0].locator(".textpoint").count() == 8
    assert "guidance 1.5, steps 25" in plots[0].locator(".textpoint").all_text_contents()


def test_sections_and_contents(visit, report):
    page = visit(report)
    links = page.locator("nav a").all_inner_texts()
    wanted = [
        "Runs",
        "Evaluation",
        "Pareto",
        "Samples",
        "Loss",
        "Noise levels",
        "Metrics",
        "Configuration",
        "Environment",
    ]
    assert links == wanted
    assert page.locator("main > section > h2").all_inner_texts() == wanted
    page.locator("nav a", has_text="Metrics").click()
    until(page, "document.querySelector('#metrics').getBoundingClientRect().top < innerHeight")
    verdicts = page.locator(".notice.verdict p").all_inner_texts()
    assert verdicts == [
        "matrix: base costs the most",
        "sweep: guidance 2 is best",
        "base1: text is ignored (step 9000)",
    ]


def test_sorting(visit, report):
    page = visit(report)
    headers = page.locator("#runs thead th")
    titles = headers.all_inner_texts()
    loss = next(place for place, title in enumerate(titles, start=1) if title.startswith("train/loss"))
    button = headers.nth(loss - 1).locator("button")
    assert column(page, "runs", 1) == ["base0", "base1", "base2", "sr"]
    assert headers.nth(loss - 1).get_attribute("aria-sort") == "none"
    button.click()
    assert headers.nth(loss - 1).get_attribute("aria-sort") == "ascending"
    assert column(page, "runs", 1) == [
        "base2",
        "base1",
        "base0",
        "sr",
    ]  # sr has no value there
    button.press("Enter")
    assert headers.nth(loss - 1).get_attribute("aria-sort") == "descending"
    assert column(page, "runs", 1) == ["base0", "base1", "base2", "sr"]
    values = [float(text.split("\n")[0]) for text in column(page, "runs", loss)[:3]]
    assert values == sorted(values, reverse=True)
    headers.first.locator("button").click()
    headers.first.locator("button").click()
    assert column(page, "runs", 1) == ["sr", "base2", "base1", "base0"]
    assert headers.nth(loss - 1).get_attribute("aria-sort") == "none"


def test_columns_hold_one_protocol_each(visit, report):
    page = visit(report)
    titles = page.locator("#runs thead th").all_inner_texts()
    assert [title[:-1] for title in titles if "loss" in title] == ["train/loss"] * 2 + ["val/loss"] * 2
    protocols = page.locator("#runs dl.protocols dd").all_inner_texts()
    assert "mean of the last logged values, at most 20; 1 standard error of the mean of 20" in protocols[0]
    assert "1 standard error" in protocols[0]
    assert protocols[1].startswith("train/loss: as a, but 64 px, reference: super-resolution 16 → 64 px, X0, ")
    assert "Lower is better: train/loss, val/loss, FD-random. Higher" in page.locator("#runs").inner_text()
    assert [title for title in titles if title.startswith("FD-random")] == ["FD-randome", "FD-randomf"]
    assert "FD-random: as e, but 500 samples; 95% bootstrap" in protocols
    tables = page.locator("#evaluation h3").all_inner_texts()
    assert tables == ["matrix", "sweep", "Pictures"]
    matrix = page.locator("#evaluation table").first
    titles = matrix.locator("thead th").all_inner_texts()
    # At 16 px and at 64 px; guidance and steps stand beside the values.
    assert titles[:5] == ["Stage", "Given", "caption accuracya", "caption accuracyb", "PSNRb"]
    assert titles[-3:] == ["Guidance", "Steps", "Seed"]
    evaluation = page.locator("#evaluation dl.protocols").first.locator("dd").all_inner_texts()
    assert evaluation == [
        "caption accuracy: 16 px, 200 samples, captions ababababab, ema weights; 95% bootstrap",
        "caption accuracy, PSNR: as a, but 64 px; 95% bootstrap",
    ]
    assert "0.9100 – 0.9500" in matrix.locator("tbody tr").first.inner_text()


def sources_of(samples):
    return samples.locator("img").evaluate_all("images => images.map(image => image.src)")


def test_the_slider_goes_through_the_steps(visit, report):
    page = visit(report)
    samples = box(page, 0)
    slider = samples.locator("input[type=range]")
    assert slider.get_attribute("max") == "5"
    titles = samples.locator("thead th").all_inner_texts()
    assert titles == ["Caption", "base0\nstep 2,000", "base1\nstep 2,500", "base2\nstep 3,000"]
    assert samples.locator("output").inner_text() == "step 3,000"
    assert samples.locator("tbody th").first.inner_text() == "a red star (seed 0, image 0)"
    last = sources_of(samples)
    assert len(last) == 9
    assert samples.locator("img").evaluate_all("images => images.every(image => image.naturalWidth == 32)")
    slider.press("Home")
    assert samples.locator("output").inner_text() == "step 500"
    assert slider.get_attribute("aria-valuetext") == "step 500"
    first = sources_of(samples)
    assert first != last
    assert first[0] == first[1] == first[2]  # the runs drew the same at the same step
    slider.press("ArrowRight")
    assert sources_of(samples) not in (first, last)
    samples.locator("button", has_text="Play").click()
    until(page, "document.querySelector('#samples output').textContent === 'step 3,000'")
    assert sources_of(samples) == last
    assert samples.locator("button", has_text="Play").count() == 1  # it stops by itself


def test_one_run_alone_is_a_gallery(visit, report):
    page = visit(report)
    samples = box(page, 1)
    assert samples.locator(".gallery figcaption").all_inner_texts() == ["a red star", "a blue circle"]
    assert not samples.locator("table").is_visible()
    before = samples.locator("img").first.bounding_box()["width"]
    samples.locator("button", has_text="Larger").click()
    assert samples.locator("img").first.bounding_box()["width"] > 1.5 * before


def visible_traces(page, place):
    return page.locator(".plot").nth(place).evaluate("plot => plot.data.filter(trace => trace.visible).length")


def test_ticks_choose_runs_everywhere(visit, report):
    page = visit(report)
    draw_all(page)
    assert visible_traces(page, 1) == 6  # raw and smoothed of three runs
    page.locator("#runs label", has_text="base1").locator("input").uncheck()
    until(page, "document.querySelectorAll('.plot')[1].data.filter(trace => trace.visible).length === 4")
    assert "base1" not in " ".join(box(page, 0).locator("thead th").all_inner_texts())
    page.locator("input[data-all]").click()
    assert visible_traces(page, 1) == 6
    page.locator("input[data-all]").click()
    assert visible_traces(page, 1) == 0
    assert "No run with samples is ticked" in box(page, 0).inner_text()


def test_switches_of_the_axis_and_of_raw_values(visit, report):
    page = visit(report)
    draw_all(page)
    training = page.locator(".plot-box").nth(1)
    log, raw = training.locator("[data-switch=log]"), training.locator("[data-switch=raw]")
    axis = "plot => plot.layout.yaxis.type"
    assert (log.get_attribute("aria-pressed"), training.locator(".plot").evaluate(axis)) == ("true", "log")
    log.click()
    assert (log.get_attribute("aria-pressed"), training.locator(".plot").evaluate(axis)) == ("false", "linear")
    raw.click()
    assert visible_traces(page, 1) == 3
    raw.click()
    assert visible_traces(page, 1) == 6


def test_light_and_dark(visit, report):
    def colours(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor"), page.locator(".plot").first.evaluate(
            "plot => plot.layout.font.color"
        )

    light, dark = (visit(report, color_scheme=scheme) for scheme in ("light", "dark"))
    for page in (light, dark):
        draw_all(page)
    assert sum(map(int, colours(light)[0][4:-1].split(","))) > 700
    assert sum(map(int, colours(dark)[0][4:-1].split(","))) < 100
    assert colours(light)[1] != colours(dark)[1]
    light.locator("#theme").click()
    assert colours(light) == colours(dark)
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"
    light.reload()
    draw_all(light)
    assert colours(light) == colours(dark)  # it is remembered


def test_configurations_and_environment(visit, report):
    page = visit(report)
    tables = page.locator("#configuration table")
    between_bases = [
        cell.strip() for cell in tables.first.locator("tbody tr").first.locator("th, td").all_inner_texts()
    ]
    assert between_bases == ["model.optimization.optimizer.lr", "0.001", "0.002", "0.003"]
    assert tables.first.locator("tbody tr").count() == 1
    page.locator("#configuration summary").click()
    assert "model.low_res_size" in tables.nth(1).inner_text()
    environment = page.locator("#environment tbody tr").first.inner_text()
    assert "0123456789 with changes" in environment
    assert "bf16-mixed" in environment


def test_names_do_not_run(make, visit, tmp_path):
    """Whatever a folder, a caption, a configuration or an evaluation says stays text."""
    folder = tmp_path / EVIL.replace("/", "∕")
    config = make.configuration()
    config["model"]["init_args"][EVIL] = config["model"]["init_args"]["network"]["class_path"] = EVIL
    config["model"]["init_args"]["diffusion"] = {"parametrization": {"class_path": EVIL}}
    info = {"git": EVIL, "command": EVIL, "versions": {EVIL: EVIL}, "created": EVIL}
    for name in ("a", f"b{EVIL}".replace("/", "∕")):
        run = make.run(folder / name, config=config, samples={"captions": (EVIL,)}, info=info)
        config["seed_everything"] = EVIL
    (run / "verdict.json").write_text(json.dumps({"step": EVIL, "verdict": [EVIL]}))
    make.values(run, [(500, EVIL, make.value(EVIL, 1.0, extractor=EVIL, reference_name=EVIL))])
    text = (run / "metrics.csv").read_text().replace("base/caption_accuracy", f'"{EVIL}"')
    (run / "metrics.csv").write_text(text)
    make.sweep(folder / EVIL.replace("/", "∕"))
    sources = read_sources([folder, tmp_path / EVIL.replace("/", "∕") / "missing"])
    build(sources).write(tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    draw_all(page)
    assert page.title() == folder.name
    assert page.locator("main img:not([src^='data:'])").count() == 0
    assert page.locator("main script").count() == 0
    assert EVIL in page.locator("#runs .verdict").inner_text()
    assert EVIL in box(page, 0).inner_text()
    hover = page.locator(".plot").nth(1)
    assert hover.locator("text=document.title").count() >= 1  # in the legend, as text


def test_an_injected_script_is_blocked(chromium, report, tmp_path):
    """Were a text ever left unescaped, the page's policy would still not run it."""
    path = tmp_path / "report.html"
    path.write_text(report.read_text().replace("</h1>", "</h1><script>document.title='injected'</script>", 1))
    page = chromium.new_page()
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(path.as_uri())
    assert page.title() != "injected"
    assert any("Content Security Policy" in message for message in messages)
    page.close()


def test_problems_are_named_on_the_page(make, visit, tmp_path):
    whole = make.run(tmp_path / "whole", samples={"steps": (500, 1000)})
    (whole / "samples/0000500/00001.png").write_bytes(b"broken")
    broken = make.run(tmp_path / "broken")
    (broken / "config.yaml").write_text("model: [")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/evaluation.json").write_text('{"format": 1, "rows": [')
    build(read_sources([tmp_path, tmp_path / "gone"])).write(tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    draw_all(page)
    named = page.locator(".notice.problem").inner_text()
    for name in ("00001.png", "broken/config.yaml", "half/evaluation.json", "gone"):
        assert name in named
    assert column(page, "runs", 1) == ["broken", "whole"]
    samples = box(page, 0)
    samples.locator("input[type=range]").press("Home")
    assert "not drawn" in samples.inner_text()


def test_fifty_runs_are_drawn_whole(make, visit, tmp_path):
    captions = [f"a {size} {colour} star" for size in ("small", "large") for colour in ("red", "blue", "green", "pink")]
    for number in range(50):
        config = make.configuration(lr=round(1e-4 * (number + 1), 5))
        metrics = {"num": 400, "seed": number, "scale": 1 + number / 25}
        samples = {"captions": captions, "steps": (2000, 10_000, 20_000), "size": 64, "seed": 0}
        make.run(tmp_path / f"run{number:02d}", config=config, metrics=metrics, samples=samples)
    make.sweep(tmp_path / "sweep")
    build(read_sources([tmp_path])).write(tmp_path / "report.html")
    page = visit(tmp_path / "report.html")
    draw_all(page)
    box(page, 0)
    until(page, "document.querySelectorAll('#samples img').length === 64")
    # from the first byte to the last figure and picture; shown by -s
    print(f"a page of 50 runs: {page.evaluate('performance.now()') / 1000:.2f} s")
