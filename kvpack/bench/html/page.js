// Draws the charts of the page, again where the colour scheme or the width changes or another codec is chosen.

const DATA = JSON.parse(document.getElementById("data").textContent);
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const state = { entry: 0, axis: "bits", width: window.innerWidth };

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    dark: DARK.matches, ink: colour("ink"), muted: colour("muted"), line: colour("line"), quiet: colour("quiet"),
    bad: colour("bad"), lost: colour("lost"),
    palette: DARK.matches
      ? ["#6cb0ff", "#ffb259", "#63d38a", "#ff8a80", "#c9a2ff", "#4fd5d5", "#f2d45c", "#ff9ad5", "#b8c0ca", "#d0a98f"]
      : ["#0b62c4", "#c65f00", "#1a7f37", "#b3261e", "#7a3fc4", "#0e7f86", "#8a6d00", "#b8327f", "#57606a", "#7a5540"],
    ramp: DARK.matches
      ? ["#1b2440", "#3d3a86", "#8a3f9c", "#d6527a", "#ff9a5c", "#ffe8a3"]
      : ["#f4f0fa", "#d5cdea", "#a79fd6", "#7a6cbf", "#5a3aa0", "#36136b"],
  };
}

function config(theme) {
  const text = { labelColor: theme.ink, titleColor: theme.muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: "transparent", font: "system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif",
    view: { stroke: "transparent" }, legend: text,
    axis: { ...text, gridColor: theme.line, gridOpacity: 0.6, domainColor: theme.line, tickColor: theme.line },
  };
}

function specOf(name, theme, width) {
  const entries = DATA.entries || [];
  const entry = entries[state.entry];
  const [kind, which] = name.split(":");
  if (kind === "rate") return rateChart(DATA.rate, DATA.rate.panels.find((p) => p.name === which), state.axis, theme, width);
  if (kind === "map") return entry.loss && mapChart(entry, DATA.needles, which, theme, width);
  if (kind === "pieces") return piecesChart(entry, entries, theme, width);
  if (kind === "layers") return layersChart(entry, entries, theme, width);
  return sharesChart(entries, theme, width);
}

async function draw(place) {
  const name = place.dataset.chart;
  const colours = theme();
  const spec = specOf(name, colours, place.clientWidth);
  place.closest("figure").hidden = !spec && name === "layers";
  place.classList.toggle("cells", name.startsWith("map:"));
  if (place.drawn) place.drawn.finalize();
  place.drawn = null;
  if (!spec) {
    place.textContent = "Not measured: this takes probe queries (kvpack capture --queries) of these layers.";
    return;
  }
  place.textContent = "";
  place.drawn = await window.vegaEmbed(place, spec, {
    renderer: "svg", ast: true, config: config(colours), tooltip: { theme: colours.dark ? "dark" : "light" },
    actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
    downloadFileName: `kvpack-${name.replace(":", "-")}`,
  });
  place.drawn.view.addEventListener("click", (event, item) => chosen(name, item && item.datum));
}

// A click on a point goes to its row; a click on a bar chooses its codec.
function chosen(name, datum) {
  if (!datum) return;
  if (name.startsWith("rate:") && datum.row) {
    const found = DATA.entries ? DATA.entries.findIndex((entry) => entry.name === datum.codec) : -1;
    if (found >= 0) choose(found);
    window.location.hash = datum.row;
  }
  if (name === "shares") choose(DATA.entries.findIndex((entry) => entry.name === datum.name));
}

function drawAll(which = () => true) {
  const places = [...document.querySelectorAll("[data-chart]")].filter((place) => which(place.dataset.chart));
  return Promise.all(places.map(draw));
}

function choose(index) {
  state.entry = index;
  for (const select of document.querySelectorAll("select.entry")) select.selectedIndex = index;
  document.querySelectorAll(".of").forEach((part, i) => { part.hidden = i !== index; });
  for (const details of document.querySelectorAll("details.cells")) fill(details);
  return drawAll((name) => !name.startsWith("rate:") && name !== "shares");
}

// The first file that lost something, which says more than one that lost nothing.
function first() {
  const lossy = (entry) => entry.loss && entry.loss.layers.some((layer) => (layer.keys_nmse || []).some((figure) => figure));
  return Math.max(DATA.entries.findIndex(lossy), 0);
}

// The heat maps' figures as tables, made when they are asked for.
function fill(details) {
  const place = details.querySelector("div");
  place.textContent = "";
  const loss = DATA.entries[state.entry].loss;
  if (!details.open || !loss) return;
  for (const figure of document.querySelectorAll("[data-chart^='map:']")) {
    const cells = cellsOf(loss, figure.dataset.chart.slice(4));
    const table = document.createElement("table");
    table.createCaption().textContent = figure.closest("figure").querySelector("strong").textContent;
    const columns = [...new Set(cells.map((cell) => cell.where))];
    const head = table.createTHead().insertRow();
    for (const title of ["layer", ...columns]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = title;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const layer of new Set(cells.map((cell) => cell.layer))) {
      const row = body.insertRow();
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = layer;
      row.append(name);
      const mine = new Map(cells.filter((cell) => cell.layer === layer).map((cell) => [cell.where, cell.shown]));
      for (const column of columns) row.insertCell().textContent = mine.get(column) || "–";
    }
    const wide = document.createElement("div");
    wide.className = "wide";
    wide.tabIndex = 0;
    wide.append(table);
    place.append(wide);
  }
}

for (const select of document.querySelectorAll("select.entry")) {
  select.addEventListener("change", () => choose(select.selectedIndex));
}
for (const details of document.querySelectorAll("details.cells")) details.addEventListener("toggle", () => fill(details));
const axis = document.getElementById("rate-axis");
if (axis) axis.addEventListener("change", () => { state.axis = axis.value; drawAll((name) => name.startsWith("rate:")); });
DARK.addEventListener("change", () => drawAll());
window.addEventListener("resize", () => {
  if (window.innerWidth === state.width) return;
  state.width = window.innerWidth;
  drawAll();
});
Promise.all([drawAll((name) => name.startsWith("rate:") || name === "shares"), DATA.entries && choose(first())]).then(() => {
  document.documentElement.dataset.ready = "yes";
});
