// The live view: the server's state, and ten minutes of /v1/homeostasis as graphs.

import {page} from "./chat.js";

const $ = id => document.getElementById(id);
const SPAN_S = 600, EVERY_MS = 2000, PATIENCE_MS = 6000, HEIGHT = 92, PLOT = {left: 4, right: 4, top: 14, bottom: 16};
const SVG = "http://www.w3.org/2000/svg";
const GRAPHS = [
  {name: "temperature", title: "Temperature", field: "temperature_c", unit: "°C", digits: 0, range: degrees},
  {name: "power", title: "Power", field: "power_w", unit: "W", digits: 0, range: (high, report) => [0, round(Math.max(high, report.state.power_limit_w ?? 0))]},
  {name: "duty", title: "Duty", field: "duty", scale: 100, unit: "%", digits: 0, range: () => [0, 100]},
  {name: "rate", title: "Throughput", field: "tok_s", unit: "tok/s", digits: 1, range: high => [0, round(high)]},
];

let samples = [], latest = null, cursor = null, wake = () => {};

// --- drawing ------------------------------------------------------------------------------------------------------------------

function degrees(high, report, low) {
  return [Math.min(low, report.target_c - 20), Math.max(high + 2, report.trip_c + 1)];
}

// The next round number: the top of a graph.
function round(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * power >= value);
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function build(graph) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const title = document.createElement("span");
  figure.className = "graph " + graph.name;
  title.textContent = graph.title;
  graph.output = document.createElement("output");
  graph.svg = shape("svg", {role: "img"});
  caption.append(title, graph.output);
  figure.append(caption, graph.svg);
  $("graphs").append(figure);
  graph.svg.addEventListener("pointermove", event => { cursor = event.offsetX / graph.svg.clientWidth; drawAll(); });
  graph.svg.addEventListener("pointerleave", () => { cursor = null; drawAll(); });
}

const told = (graph, value) => (value === null ? "–" : `${value.toFixed(value < 100 ? graph.digits : 0)} ${graph.unit}`);

// Curves of the stretches in which there are values: [[x, y], …] each.
function stretches(points) {
  const found = [[]];
  let before = null;
  for (const point of points) {
    if (point[1] === null || (before !== null && point[2] - before > 5)) found.push([]);
    if (point[1] !== null) found.at(-1).push(point);
    before = point[2];
  }
  return found.filter(points => points.length);
}

function draw(graph, report) {
  const width = graph.svg.clientWidth || 300, bottom = HEIGHT - PLOT.bottom, scale = graph.scale ?? 1;
  const values = samples.map(s => (s[graph.field] === null ? null : s[graph.field] * scale)), present = values.filter(v => v !== null);
  const last = values.at(-1) ?? null;
  graph.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  graph.svg.setAttribute("aria-label", `${graph.title} over the last ten minutes; now ${told(graph, last)}`);
  graph.svg.classList.toggle("empty", !present.length);
  if (!present.length) {
    graph.output.textContent = "not told by the device";
    graph.output.className = "past";
    return;
  }
  const [low, high] = graph.range(Math.max(...present), report, Math.min(...present));
  const x = time => PLOT.left + (width - PLOT.left - PLOT.right) * (1 - (report.now_s - time) / SPAN_S);
  const y = value => bottom - (bottom - PLOT.top) * (value - low) / (high - low);
  const parts = [];
  for (const minutes of [10, 5, 0]) {
    const at = x(report.now_s - minutes * 60), anchor = {10: "start", 5: "middle", 0: "end"}[minutes];
    parts.push(shape("line", {class: "grid", x1: at, x2: at, y1: PLOT.top, y2: bottom}));
    parts.push(shape("text", {x: at, y: HEIGHT - 3, "text-anchor": anchor}, minutes ? `−${minutes} min` : "now"));
  }
  parts.push(shape("line", {class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: PLOT.top, y2: PLOT.top}));
  parts.push(shape("line", {class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: bottom, y2: bottom}));
  for (const points of stretches(samples.map((s, i) => [x(s.time_s), values[i] === null ? null : y(values[i]), s.time_s]))) {
    const line = points.map(p => `${p[0].toFixed(1)},${p[1].toFixed(1)}`).join(" ");
    parts.push(shape("polygon", {class: "area", points: `${points[0][0].toFixed(1)},${bottom} ${line} ${points.at(-1)[0].toFixed(1)},${bottom}`}));
    parts.push(shape("polyline", {class: "curve", points: line}));
  }
  if (graph.name === "temperature" && report.mode !== "off") {
    parts.push(shape("line", {class: "mark", x1: PLOT.left, x2: width - PLOT.right, y1: y(report.target_c), y2: y(report.target_c)}));
    parts.push(shape("text", {x: PLOT.left + 2, y: y(report.target_c) - 3}, `target ${report.target_c} °C`));
  }
  parts.push(shape("text", {x: width - PLOT.right, y: PLOT.top - 4, "text-anchor": "end"}, `${+high.toFixed(0)} ${graph.unit}`));
  graph.output.textContent = told(graph, last);
  graph.output.className = cursor === null ? "" : "past";
  if (cursor !== null) {
    const time = report.now_s - SPAN_S * (1 - cursor), nearest = samples.reduce((a, b) => (Math.abs(b.time_s - time) < Math.abs(a.time_s - time) ? b : a));
    const value = nearest[graph.field] === null ? null : nearest[graph.field] * scale, ago = Math.round((report.now_s - nearest.time_s) / 6) / 10;
    parts.push(shape("line", {class: "cursor", x1: x(nearest.time_s), x2: x(nearest.time_s), y1: PLOT.top, y2: bottom}));
    graph.output.textContent = `−${ago.toFixed(1)} min: ${told(graph, value)}`;
  }
  graph.svg.replaceChildren(...parts);
}

function drawAll() {
  if (latest) for (const graph of GRAPHS) draw(graph, latest);
}

// --- facts --------------------------------------------------------------------------------------------------------------------

const CONDITIONS = {
  starting: () => "waiting for the first reading",
  regulating: report => `holding ${report.target_c} °C (${report.mode})`,
  lost: () => "sensor lost: small fixed duty",
  tripped: () => "too hot: resting",
  off: () => "not paced",
};

function facts(report) {
  const {state, engine} = report, rows = [];
  rows.push(["Controller", CONDITIONS[state.condition]?.(report) ?? state.condition]);
  if (engine) {
    rows.push(["Requests", `${engine.running} running, ${engine.waiting} waiting`]);
    rows.push(["KV cache", `${engine.kv_tokens_used.toLocaleString()} of ${engine.kv_tokens.toLocaleString()} tokens`, engine.kv_tokens_used / engine.kv_tokens]);
  }
  for (const [place, value] of Object.entries(state.temperatures_c)) if (place !== "core") rows.push([`At the ${place}`, `${value.toFixed(0)} °C`]);
  if (state.joules_per_token !== null) rows.push(["Energy per token", `${state.joules_per_token.toPrecision(3)} J`]);
  if (state.energy_j !== null) rows.push(["Energy in all", `${(state.energy_j / 3600).toPrecision(3)} Wh`]);
  rows.push(["Throttled, trips", `${state.throttle_s.toFixed(0)} s, ${state.trips}`]);
  rows.push(["Sensor", report.sensor ?? "none"]);
  $("facts").replaceChildren(...rows.flatMap(([name, value, share]) => {
    const term = document.createElement("dt"), detail = document.createElement("dd");
    term.textContent = name;
    detail.textContent = value;
    if (share !== undefined) {
      const bar = document.createElement("meter");
      bar.value = share;
      detail.append(bar);
    }
    return [term, detail];
  }));
}

function brief(report) {
  const {state, engine} = report, parts = [];
  if (engine) parts.push(`${engine.tok_s.toFixed(1)} tok/s`);
  if (state.temperature_c !== null) parts.push(`${state.temperature_c.toFixed(0)} °C`);
  if (state.power_w !== null) parts.push(`${state.power_w.toFixed(0)} W`);
  return parts.join(" · ");
}

// --- asking -------------------------------------------------------------------------------------------------------------------

function state(name) {
  $("state").dataset.state = name;
  $("state").textContent = name;
}

// Why there is nothing new to see; "": there is.
function quiet(text) {
  $("live-note").textContent = text;
  $("live-note").hidden = !text;
  $("live").classList.toggle("stale", text !== "");
}

function take(report) {
  if (samples.length && report.now_s < samples.at(-1).time_s) samples = []; // another boot of the machine
  samples = [...samples, ...report.history].filter(s => s.time_s > report.now_s - SPAN_S);
  latest = report;
  $("graphs").hidden = $("facts").hidden = false;
  quiet("");
  drawAll();
  facts(report);
  $("brief").textContent = brief(report);
}

async function poll() {
  let wait = EVERY_MS;
  try {
    const health = await (await fetch("health")).json();
    page.model = health.model ?? page.model; // while a model is loaded, there is none
    $("model").textContent = page.model;
    document.title = page.model ? `${page.model} · vkllm` : "vkllm";
    state(health.status);
    const since = samples.length ? `?since=${samples.at(-1).time_s}` : "";
    const response = await fetch("v1/homeostasis" + since, {headers: page.headers()});
    if (response.ok) take(await response.json());
    else {
      quiet(response.status === 401 ? "The live view needs the API key; it goes into the settings." : "This server has no live view.");
      wait = PATIENCE_MS;
    }
  } catch {
    state("unreachable");
    quiet("The server cannot be reached.");
    $("brief").textContent = "";
    wait = PATIENCE_MS;
  }
  await new Promise(done => { wake = done; setTimeout(done, wait); });
  if (document.hidden) await new Promise(done => document.addEventListener("visibilitychange", done, {once: true}));
  poll();
}

GRAPHS.forEach(build);
new ResizeObserver(drawAll).observe($("graphs"));
$("key").addEventListener("change", () => wake());
poll();
