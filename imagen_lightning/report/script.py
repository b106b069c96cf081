"""The pages' script: theme, sorting, figures drawn when they come into view, runs ticked in a table, samples by step.

Texts reach the page by `textContent` and attributes alone, never as markup.
"""

SCRIPT = r"""
(() => {
"use strict";
const root = document.documentElement;
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const data = (id) => JSON.parse(document.getElementById(id).textContent);
const make = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

// ---- theme

const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const button = document.getElementById("theme");
const showTheme = () => {
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(isDark()));
  button.setAttribute("aria-label", `Change to the ${isDark() ? "light" : "dark"} theme`);
  for (const plot of drawn) Plotly.relayout(plot, colours());
};
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("imagen-lightning-theme", root.dataset.theme); } catch (error) { /* a private window */ }
  showTheme();
});
system.addEventListener("change", showTheme);

// ---- tables

const collator = new Intl.Collator(undefined, { numeric: true });
const sortBy = (header) => {
  const row = header.parentNode, place = [...row.children].indexOf(header);
  const body = row.closest("table").tBodies[0];
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const value = (line) => line.children[place].dataset.value;
  const compare = header.classList.contains("number") ? (a, b) => Number(a) - Number(b) : collator.compare;
  const lines = [...body.rows];
  const known = lines.filter((line) => value(line) !== undefined);
  const unknown = lines.filter((line) => value(line) === undefined);  // last, whichever way
  known.sort((a, b) => sign * compare(value(a), value(b)));
  body.append(...known, ...unknown);
  for (const other of row.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
};
for (const header of $$("table.sortable th[aria-sort]"))
  header.querySelector("button").addEventListener("click", () => sortBy(header));

// ---- figures

const drawn = new Set();
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const colours = () => {
  const [text, soft, line, card] = ["--text", "--soft", "--line", "--card"].map(css);
  const layout = {
    "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": text,
    "hoverlabel.bgcolor": card, "hoverlabel.font.color": text, "hoverlabel.bordercolor": line,
    "legend.font.color": text, "modebar.color": soft, "modebar.activecolor": text, "modebar.bgcolor": "rgba(0,0,0,0)",
  };
  for (const axis of ["xaxis", "yaxis"])
    Object.assign(layout, {
      [`${axis}.gridcolor`]: line, [`${axis}.zerolinecolor`]: line, [`${axis}.linecolor`]: line,
      [`${axis}.tickfont.color`]: soft, [`${axis}.title.font.color`]: soft,
    });
  return layout;
};
const nest = (flat, into) => {
  for (const [path, value] of Object.entries(flat)) {
    const names = path.split("."), last = names.pop();
    let place = into;
    for (const name of names) place = place[name] ??= {};
    place[last] = value;
  }
  return into;
};
const off = new Set();  // runs whose tick was taken away
const rawShown = (plot) =>
  plot.closest(".plot-box").querySelector("[data-switch=raw]")?.getAttribute("aria-pressed") !== "false";
const shown = (plot, trace) => !off.has(trace.meta?.run) && (trace.meta?.kind !== "raw" || rawShown(plot));
const draw = (plot) => {
  if (drawn.has(plot)) return;
  drawn.add(plot);
  const figure = data(plot.dataset.plot);
  for (const trace of figure.data) trace.visible = shown(plot, trace);
  nest(colours(), figure.layout);
  Plotly.newPlot(plot, figure.data, figure.layout, {
    responsive: true, displaylogo: false, showTips: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  });
};
const refresh = (plot) => Plotly.restyle(plot, { visible: plot.data.map((trace) => shown(plot, trace)) });
const drawAll = () => $$(".plot").filter((plot) => plot.offsetParent !== null).forEach(draw);
for (const toggle of $$("[data-switch]"))
  toggle.addEventListener("click", () => {
    const pressed = toggle.getAttribute("aria-pressed") !== "true";
    toggle.setAttribute("aria-pressed", String(pressed));
    const plot = toggle.closest(".plot-box").querySelector(".plot");
    draw(plot);
    if (toggle.dataset.switch === "log")
      Plotly.relayout(plot, {
        "yaxis.type": pressed ? "log" : "linear", "yaxis.nticks": pressed ? 3 : 6, "yaxis.autorange": true });
    else refresh(plot);
  });
window.addEventListener("beforeprint", drawAll);

// ---- runs

const ticks = $$("input[data-run]");
const watchers = [];  // of the ticks
const showRuns = () => {
  off.clear();
  for (const tick of ticks) {
    if (!tick.checked) off.add(tick.dataset.run);
    tick.closest("tr").classList.toggle("off", !tick.checked);
  }
  for (const all of $$("input[data-all]")) {
    all.checked = off.size === 0;
    all.indeterminate = off.size > 0 && off.size < ticks.length;
  }
  for (const plot of drawn) refresh(plot);
  for (const watcher of watchers) watcher();
};
for (const tick of ticks) tick.addEventListener("change", showRuns);
for (const all of $$("input[data-all]"))
  all.addEventListener("change", () => {
    for (const tick of ticks) tick.checked = all.checked;
    showRuns();
  });

// ---- samples by step

const showSamples = (box) => {
  const { runs, prompts, images, steps, most } = data(box.dataset.samples);
  const slider = box.querySelector("input[type=range]"), output = box.querySelector("output");
  const table = box.querySelector("table"), note = box.querySelector(".shown");
  const gallery = box.querySelector(".gallery");
  const show = () => {
    const step = steps[Number(slider?.value ?? 0)];
    const ticked = runs.filter((run) => !off.has(run.id));
    const some = ticked.slice(0, most);
    if (slider) slider.setAttribute("aria-valuetext", `step ${step}`);
    if (output) output.textContent = `step ${step.toLocaleString("en")}`;
    note.textContent = some.length < ticked.length
      ? `The first ${some.length} of ${ticked.length} ticked runs are shown; untick others in the table of runs.`
      : some.length ? "" : "No run with samples is ticked in the table of runs.";
    // Each run shows the newest pictures that it had by the slider's step.
    const places = some.map((run) => run.steps.findLastIndex((own) => own === null || own <= step));
    const words = (run, place) => place < 0 ? "none yet"
      : run.steps[place] === null ? run.note : `step ${run.steps[place].toLocaleString("en")}`;
    const picture = (run, place, number) => {
      const found = place < 0 ? null : run.images[number]?.[place];
      const caption = prompts[number].caption;
      return found === null || found === undefined
        ? make("div", { className: "blank", textContent: "not drawn" })
        : make("img", { src: images[found], alt: `${run.name}: ${caption}`,
                        className: box.dataset.pixelated ? "pixelated" : "" });
    };
    const shown = [...prompts.keys()].filter((number) => some.some((run) => run.images[number]));
    gallery.replaceChildren();
    table.tHead?.remove();
    table.tBodies[0]?.remove();
    table.parentNode.hidden = some.length === 1;
    if (some.length === 1) {
      if (!slider) note.textContent = words(some[0], places[0]);
      gallery.append(...shown.map((number) => make("figure", {}, picture(some[0], places[0], number),
        make("figcaption", {}, prompts[number].caption))));
      return;
    }
    const titles = some.map((run, i) => make("th", { scope: "col" }, run.name,
      make("small", { textContent: words(run, places[i]) })));
    const head = make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "Caption" }), ...titles));
    const lines = shown.map((number) => make("tr", {},
      make("th", { scope: "row" }, prompts[number].caption,
        make("small", { className: "hint", textContent: ` (${prompts[number].seed})` })),
      ...some.map((run, i) => make("td", {}, picture(run, places[i], number)))));
    table.append(head, make("tbody", {}, ...lines));
  };
  slider?.addEventListener("input", show);
  const play = box.querySelector("[data-play]");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play?.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Stop";
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 700);
  });
  const larger = box.querySelector("[data-larger]");
  larger?.addEventListener("click", () => {
    const pressed = larger.getAttribute("aria-pressed") !== "true";
    larger.setAttribute("aria-pressed", String(pressed));
    box.style.setProperty("--cell", pressed ? "240px" : "128px");
  });
  watchers.push(show);
  show();
};

// ---- when all of the page is there

document.addEventListener("DOMContentLoaded", () => {
  showTheme();
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries)
      if (isIntersecting) {
        seen.unobserve(target);
        if (target.dataset.samples) showSamples(target); else draw(target);
      }
  }, { rootMargin: "300px" });
  for (const place of $$(".plot, [data-samples]")) seen.observe(place);
  const links = new Map($$("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of $$("main > section")) inView.observe(section);
});
})();
"""
