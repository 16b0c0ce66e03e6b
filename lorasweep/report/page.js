"use strict";
// Draws the figures in the page's colours, light or dark, and sorts tables. Nothing is loaded from anywhere.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

/* Return a copy of a figure's part in which colours "@name" are the page's. */
function painted(part, key = "") {
  if (typeof part === "string") return part[0] === "@" && /color$/.test(key) ? css(part.slice(1)) : part;
  if (Array.isArray(part)) return part.some((p) => p && typeof p === "object") ? part.map((p) => painted(p, key)) : part;
  if (part && typeof part === "object") {
    return Object.fromEntries(Object.entries(part).map(([k, v]) => [k, painted(v, k)]));
  }
  return part;
}

async function plotly() {
  const packed = document.getElementById("plotly").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, // a finger has no use for it
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
};

async function draw(figures) {
  for (const figure of figures) {
    await new Promise((next) => setTimeout(next)); // let the page answer between two figures
    const place = document.getElementById("chart-" + figure.id);
    await Plotly.react(place, painted(figure.traces), painted(figure.layout), config);
  }
  document.documentElement.dataset.drawn = "yes";
}

async function start() {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  if (!("DecompressionStream" in window)) {
    document.querySelectorAll(".chart").forEach((c) => { c.textContent = "This browser is too old to draw the charts (2023 or later)."; });
    return;
  }
  await plotly();
  await draw(figures);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(figures));
}

/* Order a table's rows by a column: numbers as numbers, what is no number last. */
function sort(button) {
  const head = button.closest("th"), table = button.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  const number = (row) => Number(row.cells[column].textContent.replaceAll(",", "") || NaN);
  const text = (row) => row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [number(a), number(b)], sign = down ? -1 : 1;
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return sign * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
  });
  table.tBodies[0].append(...rows);
  table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sort(button);
});
start();
