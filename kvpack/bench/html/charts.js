"use strict";
// Vega-Lite specifications of the page's charts (https://vega.github.io/vega-lite/docs/). Each function takes plain data
// and a theme, and touches no document.

const SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross"];

// Figures on a logarithmic scale have no place for zero: it is drawn as far below the least as the scale has a decade.
function belowAll(values) {
  const positive = values.filter((value) => value > 0);
  return positive.length ? Math.min(...positive) / 3 : 1e-6;
}

function niceNumber(value) {
  if (value === "inf") return "infinite";
  if (value === null || value === undefined) return "not measured";
  if (value === 0) return "0";
  return Math.abs(value) < 0.001 || Math.abs(value) >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

function rateChart(rate, panel, axis, theme, width) {
  const shown = rate.rows.filter((row) => row.drawn && row.figures[axis] && row.figures[panel.name]);
  const least = belowAll([...shown.map((row) => row.figures[panel.name][0]), panel.floor || Infinity].filter(isFinite));
  const values = shown.map((row) => {
    const [mean, half] = row.figures[panel.name];
    return {
      codec: row.codec, family: row.family, kind: row.kind, row: row.row, tip: row.tip,
      x: row.figures[axis][0], y: Math.max(mean, least), zero: mean <= 0,
      low: Math.max(mean - (half || 0), least), high: Math.max(mean + (half || 0), least), half: half || 0,
    };
  });
  const top = Math.max(...values.map((value) => value.high));
  const families = [...new Set(values.map((value) => value.family))];
  const tips = Object.keys(Object.assign({}, ...shown.map((row) => row.tip)));
  for (const value of values) tips.forEach((name, i) => { value[`tip${i}`] = value.tip[name] || "–"; });
  const xs = [Math.min(...values.map((value) => value.x)), Math.max(...values.map((value) => value.x))];
  const x = {
    field: "x", type: "quantitative", title: axis === "bits" ? "bits an element, whole file" : "times smaller",
    scale: { type: "log", nice: false, padding: 16 },
    axis: { values: logTicks(xs[0] / 1.2, xs[1] * 1.2), format: "~g", labelOverlap: true, grid: true, labelFlush: false },
  };
  const y = (field) => ({
    field, type: "quantitative", title: panel.axis, scale: { type: "log", nice: false, padding: 10 },
    axis: { format: "~g", labelOverlap: true, values: logTicks(least, top) },
  });
  const legend = {
    title: null, orient: "bottom", direction: "horizontal", symbolOpacity: 1,
    columns: Math.max(2, Math.floor(width / 125)), labelLimit: 110,
  };
  const colour = {
    field: "family", type: "nominal", legend,
    scale: { domain: families, range: families.map((_, i) => theme.palette[i % theme.palette.length]) },
  };
  const shape = {
    field: "family", type: "nominal", legend,
    scale: { domain: families, range: families.map((_, i) => SHAPES[i % SHAPES.length]) },
  };
  const faded = { condition: { param: "family", value: 1, empty: true }, value: 0.12 };
  const best = frontier(values, axis);
  const layers = [
    {
      transform: [{ filter: "datum.zero === false" }],
      mark: { type: "line", strokeWidth: 1.5, clip: true },
      encoding: {
        x, y: y("y"), color: colour, opacity: faded,
        strokeDash: { condition: { test: "datum.kind === 'bound'", value: [4, 4] }, value: [1, 0] },
      },
    },
    {
      params: [{ name: "family", select: { type: "point", fields: ["family"] }, bind: "legend" }],
      mark: { type: "point", filled: true, size: 75, cursor: "pointer", aria: true },
      encoding: {
        x, y: y("y"), color: colour, shape, opacity: faded,
        tooltip: [
          { field: "codec", title: "codec" },
          ...tips.map((name, i) => ({ field: `tip${i}`, title: name })),
        ],
      },
    },
  ];
  for (const side of ["left", "right"]) {
    const named = best.filter((value) => (Math.log(value.x / xs[0]) > 0.8 * Math.log(xs[1] / xs[0])) === (side === "right"));
    if (!named.length) continue;
    layers.push({
      data: { values: named },
      mark: { type: "text", align: side, baseline: "bottom", dx: side === "left" ? 6 : -6, dy: -3, fontSize: 11, color: theme.ink },
      encoding: { x, y: y("y"), text: { field: "codec" } },
    });
  }
  if (values.some((value) => value.half > 0)) {
    layers.unshift({
      transform: [{ filter: "datum.half > 0" }],
      mark: { type: "rule", strokeWidth: 1 },
      encoding: { x, y: y("low"), y2: { field: "high" }, color: colour, opacity: faded },
    });
  }
  if (panel.floor > 0) {
    layers.unshift({
      data: { values: [{ y: panel.floor, words: `hardware noise ${niceNumber(panel.floor)}` }] },
      layer: [
        { mark: { type: "rule", strokeDash: [6, 4], color: theme.muted }, encoding: { y: y("y") } },
        {
          mark: { type: "text", align: "right", baseline: "bottom", dy: -3, fontSize: 11, color: theme.muted },
          encoding: { x: { value: "width" }, y: y("y"), text: { field: "words" } },
        },
      ],
    });
  }
  if (values.some((value) => value.zero)) {
    layers.push({
      data: { values: [{ y: least, words: "no loss at all" }] },
      mark: { type: "text", baseline: "bottom", dy: -2, fontSize: 11, color: theme.muted },
      encoding: { x: { value: { expr: "width / 2" } }, y: y("y"), text: { field: "words" } },
    });
  }
  return {
    description: `${panel.title}: ${panel.axis} of every codec against its rate`,
    width: "container", autosize: { type: "fit-x", contains: "padding" }, height: Math.min(Math.max(width * 0.7, 260), 380), data: { values }, layer: layers,
  };
}

// Powers of ten, and where they are few some numbers between them.
function logTicks(low, high) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const decades = Math.log10(high / low);
  const steps = decades > 3.5 ? [1] : decades > 1.5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const ticks = [];
  for (let power = from; power <= to; power++) for (const step of steps) ticks.push(Number(`${step}e${power}`));
  return ticks.filter((tick) => tick >= low && tick <= high);
}

// The codecs that no other beats in both rate and loss. Those that run the model to decode are named beside them.
function frontier(values, axis) {
  const better = axis === "bits" ? (a, b) => a.x - b.x : (a, b) => b.x - a.x;
  let least = Infinity;
  const replayed = values.filter((value) => value.kind === "replay");
  return values
    .filter((value) => value.kind === "codec")
    .sort((a, b) => better(a, b) || a.y - b.y)
    .filter((value) => value.y < least && ((least = value.y), true))
    .concat(replayed);
}

// The cells of one figure of a map: layer, range of tokens, and the figure or what it is instead.
function cellsOf(loss, name) {
  const cells = [];
  for (const layer of loss.layers) {
    const figures = layer[name] || [];
    const edges = name === "output_error" ? queryEdges(layer.query_positions) : null;
    figures.forEach((figure, i) => {
      const from = edges ? edges[i] : i * loss.bin_tokens;
      const to = edges ? edges[i + 1] : Math.min(from + loss.bin_tokens, loss.tokens);
      const state = figure === null ? "none" : figure === "inf" ? "infinite" : figure === 0 ? "zero" : "error";
      cells.push({ layer: layer.index, from, to, error: state === "error" ? figure : null, state, shown: niceNumber(figure),
        where: edges ? `queries ${from} to ${to - 1}` : `tokens ${from} to ${to - 1}` });
    });
  }
  return cells;
}

// A group of queries stands from behind the last query of the group before it to its own last query.
function queryEdges(positions) {
  const step = positions.length > 1 ? positions[1] - positions[0] : 1;
  return [Math.max(positions[0] + 1 - step, 0), ...positions.map((position) => position + 1)];
}

// The errors that the colours span: at most four decades below the greatest, and at least one decade in all, so that
// errors that hardly differ look alike.
function colourRange(errors) {
  const high = errors.length ? Math.max(...errors) : 1;
  const low = errors.length ? Math.max(Math.min(...errors), high / 1e4) : 1;
  const wider = Math.sqrt(Math.max(10 / (high / low), 1));
  return [low / wider, high * wider];
}

function mapChart(entry, needles, name, theme, width) {
  const cells = cellsOf(entry.loss, name).filter((cell) => cell.state !== "none");
  if (!cells.length) return null;
  const errors = cells.filter((cell) => cell.state === "error").map((cell) => cell.error);
  const domain = colourRange(errors);
  const layers = entry.loss.layers.map((layer) => layer.index);
  const every = Math.max(1, Math.ceil(layers.length / 8));
  const x = {
    field: "from", type: "quantitative", title: name === "output_error" ? "position of the query" : "token",
    scale: { domain: [0, entry.loss.tokens], nice: false, zero: false },
    axis: { grid: false, tickCount: Math.max(3, Math.floor(width / 90)), format: "d" },
  };
  const facts = needles.map((needle, i) => ({
    from: needle.position, text: needle.text, number: i + 1, fate: fate(needle, entry.found[i]),
  }));
  const layer = [
    {
      mark: { type: "rect", aria: false, strokeWidth: 0, invalid: null },
      encoding: {
        x, x2: { field: "to" },
        y: { field: "layer", type: "ordinal", title: "layer", scale: { paddingInner: 0 },
          axis: { values: layers.filter((_, i) => i % every === 0), grid: false, ticks: false } },
        color: {
          field: "error", type: "quantitative",
          condition: [
            { test: "datum.state === 'infinite'", value: theme.bad },
            { test: "datum.state === 'zero'", value: theme.quiet },
          ],
          scale: { type: "log", domain, clamp: true, range: theme.ramp,
            interpolate: "lab" },
          legend: errors.length ? { title: null, orient: "top", direction: "horizontal", format: "~g", tickCount: 4,
            gradientLength: Math.max(120, width * 0.5), gradientThickness: 10, labelOverlap: true } : null,
        },
        tooltip: [{ field: "layer", title: "layer" }, { field: "where", title: "at" }, { field: "shown", title: "error" }],
      },
    },
  ];
  const start = Math.min(...cells.map((cell) => cell.from));
  if (start > entry.loss.tokens / 8) {
    layer.push({
      data: { values: [{ from: start / 2, words: ["no probe queries", `before token ${start}`] }] },
      mark: { type: "text", color: theme.muted, fontSize: 12, lineBreak: "\n" },
      encoding: { x, y: { value: { expr: "height / 2" } }, text: { field: "words" } },
    });
  }
  if (facts.length) {
    const colour = {
      condition: { test: "datum.fate === 'lost'", value: theme.lost }, value: theme.ink,
    };
    const tooltip = [{ field: "number", title: "needle" }, { field: "text", title: "fact" }, { field: "fate", title: "fate" }];
    layer.push(
      { data: { values: facts.filter((fact) => fact.from >= start) }, mark: { type: "rule", strokeWidth: 1, opacity: 0.55, strokeDash: [2, 3] },
        encoding: { x, color: colour, tooltip } },
      { data: { values: facts }, mark: { type: "point", shape: "triangle-down", filled: true, size: 60, yOffset: -6, opacity: 1,
        clip: false },
        encoding: { x, y: { value: 0 }, color: colour, tooltip } },
    );
  }
  return {
    description: `${name} by layer and token`, width: "container",
    height: Math.min(Math.max(layers.length * 8, 60), 420), data: { values: cells }, layer,
    resolve: { scale: { color: "independent" } },
  };
}

function fate(needle, found) {
  if (found === undefined) return "not asked: no model was run";
  if (found) return "found";
  return needle.original === false ? "missed with the original cache too" : "lost";
}

const WHAT = ["keys", "values", "keys and values", "tokens"];

// What bytes belong to, in an order and colours that all charts share.
function belongs(entries) {
  const all = [...new Set(entries.flatMap((entry) => entry.bytes.pieces.map((piece) => piece.what)))];
  const rest = all.filter((what) => !WHAT.includes(what) && what !== "file");
  return [...WHAT.filter((what) => all.includes(what)), ...rest, ...(all.includes("file") ? ["file"] : [])];
}

function whatColour(order, theme, width) {
  return {
    field: "what", type: "nominal", scale: { domain: order, range: order.map((_, i) => theme.palette[i % theme.palette.length]) },
    legend: { title: null, orient: "top", direction: "horizontal", columns: Math.max(2, Math.floor(width / 125)),
      symbolType: "square", symbolOpacity: 1 },
  };
}

function piecesChart(entry, entries, theme, width) {
  const values = entry.bytes.pieces.map((piece) => ({ ...piece, share: piece.size / entry.bytes.size }));
  const streams = [...new Set(values.map((piece) => piece.stream))];
  return {
    description: "bytes of every kind of stream", width: "container", autosize: { type: "fit-x", contains: "padding" }, height: 22 * streams.length, data: { values },
    mark: { type: "bar" },
    encoding: {
      y: { field: "stream", type: "nominal", sort: streams, title: null, axis: { labelLimit: width < 500 ? 110 : 180 } },
      x: { field: "size", type: "quantitative", title: "bytes", axis: { format: "~s", tickCount: Math.floor(width / 110) } },
      color: whatColour(belongs(entries), theme, width),
      order: { field: "size", sort: "descending" },
      tooltip: [
        { field: "what", title: "belongs to" }, { field: "stream", title: "stream" },
        { field: "size", title: "bytes", format: "," }, { field: "share", title: "share", format: ".2%" },
      ],
    },
  };
}

function layersChart(entry, entries, theme, width) {
  if (!entry.bytes.layers.length) return null;
  const values = entry.bytes.layers.flatMap((row) => [
    { layer: row.layer, what: "keys", size: row.keys }, { layer: row.layer, what: "values", size: row.values },
  ]);
  const every = Math.max(1, Math.ceil((entry.bytes.layers.length * 22) / width));
  return {
    description: "bytes of every layer", width: "container", autosize: { type: "fit-x", contains: "padding" }, height: 220, data: { values }, mark: { type: "bar" },
    encoding: {
      x: { field: "layer", type: "ordinal", title: "layer", axis: { labelAngle: 0,
        values: entry.bytes.layers.map((row) => row.layer).filter((_, i) => i % every === 0) } },
      y: { field: "size", type: "quantitative", title: "bytes", axis: { format: "~s", tickCount: 5 } },
      color: whatColour(belongs(entries).filter((what) => what === "keys" || what === "values"), theme, width),
      tooltip: [
        { field: "layer", title: "layer" }, { field: "what", title: "of" }, { field: "size", title: "bytes", format: "," },
      ],
    },
  };
}

function sharesChart(entries, theme, width) {
  const values = entries.flatMap((entry) => {
    const sizes = {};
    for (const piece of entry.bytes.pieces) sizes[piece.what] = (sizes[piece.what] || 0) + piece.size;
    return Object.entries(sizes).map(([what, size]) => ({ name: entry.name, what, size, share: size / entry.bytes.size,
      all: entry.bytes.size }));
  });
  const order = belongs(entries);
  for (const value of values) value.rank = order.indexOf(value.what);
  return {
    description: "shares of what every file stores", width: "container", autosize: { type: "fit-x", contains: "padding" }, height: 22 * entries.length, data: { values },
    mark: { type: "bar", cursor: "pointer" },
    encoding: {
      y: { field: "name", type: "nominal", sort: { field: "all", op: "max", order: "descending" }, title: null },
      x: { field: "share", type: "quantitative", title: "share of the file", scale: { domain: [0, 1] },
        axis: { format: ".0%", tickCount: 5 } },
      color: whatColour(order, theme, width), order: { field: "rank" },
      tooltip: [
        { field: "name", title: "codec" }, { field: "what", title: "belongs to" },
        { field: "size", title: "bytes", format: "," }, { field: "share", title: "share", format: ".2%" },
        { field: "all", title: "whole file", format: "," },
      ],
    },
  };
}
