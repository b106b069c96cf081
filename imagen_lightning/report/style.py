"""The pages' style sheet: light and dark by the reader's system, or by the page's button."""

STYLE = """
:root {
  color-scheme: light;
  --back: #f6f7f9; --card: #ffffff; --text: #1c2330; --soft: #5a6577; --line: #dfe3ea; --accent: #1f5fd0;
  --hover: #eef2fa; --stripe: #fafbfc; --verdict: #e8f1ff; --problem: #fdf0e3; --problem-line: #c8640a;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-theme="light"]) {
    color-scheme: dark;
    --back: #10141b; --card: #181e28; --text: #e4e8ef; --soft: #9aa5b6; --line: #2c3544; --accent: #7fb0ff;
    --hover: #212a39; --stripe: #1b222d; --verdict: #16294a; --problem: #3a2812; --problem-line: #e8964a;
  }
}
:root[data-theme="dark"] {
  color-scheme: dark;
  --back: #10141b; --card: #181e28; --text: #e4e8ef; --soft: #9aa5b6; --line: #2c3544; --accent: #7fb0ff;
  --hover: #212a39; --stripe: #1b222d; --verdict: #16294a; --problem: #3a2812; --problem-line: #e8964a;
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
a { color: var(--accent); }
td code, th code { overflow-wrap: normal; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 20; display: flex; gap: 1rem; align-items: center;
  padding: 0.5rem max(1rem, calc(50vw - 640px)); background: var(--card); border-bottom: 1px solid var(--line); }
nav .links { display: flex; gap: 0.25rem; overflow-x: auto; flex: 1; scrollbar-width: none; }
nav a { padding: 0.25rem 0.7rem; border-radius: 999px; color: var(--soft); text-decoration: none; white-space: nowrap; }
nav a:hover, nav a.here { background: var(--hover); color: var(--text); }
main { max-width: 1312px; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
header { margin-bottom: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 0.75rem; }
h3 { font-size: 1rem; margin: 0; }
h4 { font-size: 0.95rem; margin: 1.25rem 0 0.5rem; color: var(--soft); font-weight: 600; }
.lead, .plot-note, footer, figcaption, .hint { color: var(--soft); }
.lead { margin: 0; }
.hint, .plot-note { font-size: 0.87rem; }
.plot-note { margin: 0.15rem 0 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem;
  margin-bottom: 1.25rem; }
section > p:first-of-type { margin-top: 0; }
footer { margin-top: 2rem; font-size: 0.87rem; }
button { font: inherit; color: inherit; cursor: pointer; }
#theme, .switches button, .samples button { border: 1px solid var(--line); background: var(--card);
  border-radius: 999px; padding: 0.2rem 0.75rem; font-size: 0.85rem; white-space: nowrap; }
#theme:hover, .switches button:hover, .samples button:hover { background: var(--hover); }
.switches { display: flex; gap: 0.4rem; }
.switches button[aria-pressed="true"], .samples button[aria-pressed="true"] { border-color: var(--accent);
  color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.notice { margin: 0 0 0.75rem; padding: 0.6rem 0.9rem; border-radius: 8px; border-left: 4px solid var(--line);
  background: var(--stripe); }
.notice p { margin: 0.2rem 0; }
.notice.verdict { background: var(--verdict); border-color: var(--accent); }
.notice.problem { background: var(--problem); border-color: var(--problem-line); }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px; margin: 0.75rem 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 0.9rem; }
caption { text-align: left; padding: 0.5rem 0.75rem; color: var(--soft); font-size: 0.87rem; position: sticky;
  left: 0; }
th, td { padding: 0.4rem 0.75rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--card); font-weight: 600; vertical-align: bottom; }
thead th button { border: 0; background: none; padding: 0; font-weight: 600; text-align: inherit; }
thead th button::after { content: "↕"; opacity: 0.3; margin-left: 0.3em; }
thead th[aria-sort="ascending"] button::after { content: "↑"; opacity: 1; }
thead th[aria-sort="descending"] button::after { content: "↓"; opacity: 1; }
tbody th { font-weight: 500; position: sticky; left: 0; z-index: 1; background: var(--card); }
thead th:first-child { left: 0; z-index: 3; }
tbody tr:hover > * { background: var(--hover); }
.number { text-align: right; }
td .range { display: block; color: var(--soft); font-size: 0.8rem; }
.same { color: var(--soft); }
sup { color: var(--accent); font-size: 0.75em; line-height: 0; margin-left: 0.15em; }
label.run { display: inline-flex; gap: 0.5rem; align-items: center; cursor: pointer; }
label.run input { margin: 0; }
tr.off > *, tr.off strong { color: var(--soft); font-weight: 400; }
tr.off .swatch { opacity: 0.3; }
.swatch { flex: none; display: inline-block; vertical-align: middle; }
.plot-box { margin: 1rem 0 0.5rem; }
.plot-head { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: baseline; justify-content: space-between; }
.plot { width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; }
.picture { margin: 0.75rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.picture img { display: block; max-width: 100%; border-radius: 6px; }
.picture img.wide { width: 100%; }
.pixelated { image-rendering: pixelated; }
figcaption { font-size: 0.87rem; margin-top: 0.35rem; }
dl.protocols { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 0.75rem; margin: 0.5rem 0;
  font-size: 0.87rem; }
dl.protocols dt { color: var(--accent); font-weight: 600; }
dl.protocols dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--accent); }
.samples .bar { display: flex; flex-wrap: wrap; gap: 0.75rem 1rem; align-items: center; margin: 0.5rem 0 0.75rem; }
.samples .bar label { display: flex; gap: 0.6rem; align-items: center; flex: 1; min-width: 16rem; }
.samples input[type="range"] { flex: 1; accent-color: var(--accent); }
.samples output { min-width: 7rem; font-variant-numeric: tabular-nums; }
.gallery { display: flex; flex-wrap: wrap; gap: 0.9rem; }
.gallery figure { margin: 0; width: var(--cell); }
.gallery figcaption { font-size: 0.8rem; line-height: 1.35; }
[hidden] { display: none; }
thead th input { margin: 0 0.6rem 0 0; }
.samples .scroll { max-height: 46rem; }
.samples table { width: auto; }
.samples th, .samples td { padding: 0.35rem 0.5rem; border-bottom: 0; }
.samples tbody th { white-space: normal; width: 13rem; min-width: 9rem; font-weight: 400; font-size: 0.87rem; }
.samples thead th { max-width: calc(var(--cell) + 2rem); overflow-wrap: anywhere; white-space: normal; }
.samples thead small { display: block; font-weight: 400; color: var(--soft); }
.samples img, .samples .blank { width: var(--cell); height: var(--cell); border-radius: 6px; display: block;
  object-fit: contain; }
.samples img { outline: 1px solid var(--line); outline-offset: -1px; }
.samples .blank { border: 1px dashed var(--line); color: var(--soft); font-size: 0.8rem; padding: 0.5rem;
  white-space: normal; }
@media (max-width: 640px) { section { padding: 0.9rem 0.8rem; } .samples tbody th { min-width: 7rem; } }
@media print { nav, .switches { display: none; } section { break-inside: avoid-page; } .scroll { max-height: none; } }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
"""
