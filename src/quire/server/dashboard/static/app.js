// The live view: reads frames, keeps the state, draws what is seen.
import { SHOWN_STEPS, cells, counts, drawBlocks, drawRate, drawSchedule, drawSpans, hue, lanes, memory, showMemory } from "/ui/views.js";
import { chosen, speak, word } from "/ui/words.js";
import { openPlayground, shownToken } from "/ui/playground.js";

const KEPT_STEPS = 400, FLASH_MS = 700;
const byId = (id) => document.getElementById(id);
const tabs = ["blocks", "schedule", "machine", "playground"];

export const state = {
  frames: 0, step: -1, num_blocks: 0, block_size: 16, max_model_len: 0, requests: new Map(), ended: [], cached: [], steps: [], rates: [],
  last: null, picked: null, flashes: new Map(), explained: null, figures: null, places: null, said: new Map(), rates_read: null, compared: null,
};
window.quire = state;  // what is drawn, for tests and for the curious

export function headers() {
  const key = byId("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function take(frame) {
  if (frame.step < state.step) Object.assign(state, { requests: new Map(), steps: [], cached: [] });  // another core
  const known = state.requests, next = new Map();
  for (const request of frame.requests) {
    const before = known.get(request.index);
    request.blocks ??= before?.blocks ?? [];
    if (before && request.blocks.length && !before.blocks.length || !before) flash(request, frame);
    next.set(request.index, request);
  }
  state.requests = next;
  state.cached = frame.cached ?? state.cached;
  for (const [at, step] of frame.steps.entries()) step[2] ??= frame.steps[at - 1][2];  // the rows of the step before
  state.steps = [...state.steps, ...frame.steps].slice(-KEPT_STEPS);
  state.rates = [...state.rates, frame.tokens_per_s].slice(-300);
  for (const name of ["num_blocks", "block_size", "max_model_len", "ended", "step"]) state[name] = frame[name];
  state.last = frame;
  state.frames += 1;
  draw();
}

// Blocks that a request finds in the prefix cache when it enters.
function flash(request, frame) {
  const held = new Set([...state.requests.values()].flatMap((other) => (other.index === request.index ? [] : other.blocks)));
  const cached = new Set(state.cached), until = performance.now() + FLASH_MS;
  for (const id of request.blocks) if (frame.prefix_hits > (state.last?.prefix_hits ?? 0) && (held.has(id) || cached.has(id))) state.flashes.set(id, until);
}

let due = false;
function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    paint();
  });
}

function paint() {
  if (!state.last) return;
  const now = performance.now();
  for (const [id, until] of state.flashes) if (until < now) state.flashes.delete(id);
  byId("model").textContent = state.last.model;
  const view = tabs.find((name) => !byId(name).hidden);
  const grid = cells(state);
  if (view === "blocks") {
    state.places = { grid, ...drawBlocks(byId("blocks-canvas"), state, grid, state.flashes, state.picked) };
    const found = counts(grid), held = memory(state, grid), percent = (share) => `${(share * 100).toFixed(1)}\u00a0%`;
    state.figures = { ...found, ...held };
    byId("blocks-summary").textContent = `${word("own")} ${found.own}, ${word("shared")} ${found.shared}, ${word("cached")} ${found.cached}, ${word("free")} ${found.free}; ${word("waste")} ${percent(held.waste)}; ${word("fragmentation")} ${percent(held.fragmentation)}`;
    showMemory(byId("memory"), held);
  } else if (view === "schedule") {
    const drawn = drawSchedule(byId("schedule-canvas"), state, state.picked);
    const found = new Map();
    for (const [, , , waits] of lanes(state, SHOWN_STEPS).steps) for (const [, reason] of waits) found.set(reason, (found.get(reason) ?? 0) + 1);
    const reasons = [...found].map(([reason, count]) => `${why(reason)} ${count}`).join(", ");
    byId("schedule-summary").textContent = `${drawn.steps} steps, ${drawn.lanes} ${word("requests")}${reasons ? `; ${word("stalled")}: ${reasons}` : ""}`;
    state.figures = state.places = drawn;
    if (state.compared) drawSpans(byId("static-canvas"), state.compared);
  } else if (view === "machine") {
    showFigures();
    drawRate(byId("rate-canvas"), state.rates);
    showRoofline();
  }
  listRequests();
}

const milliseconds = (seconds) => (seconds === undefined ? "-" : `${(seconds * 1e3).toFixed(1)} ms`);

function showFigures() {
  const frame = state.last;
  const shown = {
    [word("tokensPerS")]: frame.tokens_per_s.toFixed(1), [word("running")]: frame.num_running, [word("waiting")]: frame.num_waiting,
    [word("hits")]: frame.prefix_queries ? `${((100 * frame.prefix_hits) / frame.prefix_queries).toFixed(0)} %` : "-",
  };
  for (const p of ["p50", "p90", "p99"]) {
    shown[`${word("ttft")} ${p}`] = milliseconds(frame.ttft_s[p]);
    shown[`${word("itl")} ${p}`] = milliseconds(frame.itl_s[p]);
  }
  byId("figures").replaceChildren(...Object.entries(shown).map(([name, value]) => {
    const box = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    box.append(term, text);
    return box;
  }));
}

// Bytes that decode steps read in a second, beside what this machine's memory gives.
function showRoofline() {
  const frame = state.last, points = state.rates_read ?? [], roof = points.find(([bytes]) => bytes >= frame.weight_bytes)?.[1] ?? points.at(-1)?.[1];
  const reached = frame.read_bytes_per_s, giga = (rate) => `${(rate / 1e9).toFixed(1)} GB/s`, bar = byId("roofline");
  bar.hidden = !roof || !reached;
  if (roof && reached) Object.assign(bar, { min: 0, max: Math.max(roof, reached), value: reached });
  const share = roof && reached ? ` (${((100 * reached) / roof).toFixed(0)} %)` : "";
  byId("roofline-text").textContent = `${word("reached")} ${reached ? giga(reached) : "-"}; ${word("roof")} ${roof ? giga(roof) : word("unmeasured")}${share}`;
  state.figures = { reached, roof: roof ?? null };
}

async function fetchRates() {
  const answer = await fetch("/ui/machine", { headers: headers() });
  state.rates_read = answer.ok ? (await answer.json()).read : null;
}

const why = (reason) => word(`why_${reason}`).replace("why_", "");

// What is under the pointer, or under the place that the arrow keys have moved to.
function tellSchedule(at, row) {
  const { steps, order } = lanes(state, SHOWN_STEPS), step = steps[at], index = [...order.keys()][row];
  if (!step || index === undefined) return "";
  const done = step[2].find(([one]) => one === index), wait = step[3].find(([one]) => one === index);
  const name = [...state.requests.values(), ...state.ended].find((one) => one.index === index)?.name ?? `#${index}`;
  const what = wait ? `${word("stalled")}: ${why(wait[1])}` : done ? `${word(done[2] ? "decode" : "prefill")} ${done[1]} ${word("tokens")}` : "-";
  return `${word("step")} ${step[0]}, ${name}: ${what}`;
}

function tellBlock(column, row) {
  const id = row * state.places.perLine + column, cell = state.places.grid?.[id];
  if (!cell || column >= state.places.perLine) return "";
  const holders = cell.holders.map((index) => state.requests.get(index)?.name ?? `#${index}`).join(", ");
  return `${word("block")} ${id}: ${holders || word(cell.cached ? "cached" : "free")}`;
}

function pointed(name, size, tell) {
  const canvas = byId(`${name}-canvas`), place = byId(`${name}-at`), cursor = [0, 0];
  const say = () => (place.textContent = state.places ? tell(...cursor) : "");
  canvas.onmousemove = (event) => {
    if (!state.places) return;
    const [wide, high] = size();
    cursor.splice(0, 2, Math.floor(event.offsetX / wide), Math.floor(event.offsetY / high));
    canvas.title = say();
  };
  canvas.onkeydown = (event) => {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!move) return;
    event.preventDefault();
    cursor.forEach((value, axis) => (cursor[axis] = Math.max(0, value + move[axis])));
    say();
  };
}

const lines = new Map();

// A line of the list stays while its request is listed: it may be under the pointer, or have the focus.
function lineOf(request) {
  if (!lines.has(request.index)) {
    const place = document.createElement("li"), button = document.createElement("button"), swatch = document.createElement("i"), text = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `hsl(${hue(request.index)} 60% 45%)`;
    button.append(swatch, text);
    button.dataset.index = request.index;
    place.append(button);
    lines.set(request.index, { place, button, text });
  }
  const { place, button, text } = lines.get(request.index), reason = request.reason ? ` (${why(request.reason)})` : "";
  const label = `${request.state}${reason} ${request.num_prompt}+${request.num_output} ${request.name}`;
  if (text.textContent !== label) text.textContent = label;
  button.setAttribute("aria-pressed", String(state.picked === request.index));
  button.onclick = () => pick(state.picked === request.index ? null : request);
  return place;
}

function listRequests() {
  const list = byId("requests"), shown = [...state.requests.values(), ...[...state.ended].reverse()].slice(0, 80);
  const places = shown.map(lineOf), known = new Set(shown.map((request) => request.index));
  if (places.length !== list.children.length || places.some((place, at) => list.children[at] !== place)) {
    const focused = document.activeElement;
    list.replaceChildren(...places);
    if (list.contains(focused)) focused.focus();
  }
  for (const index of lines.keys()) if (!known.has(index)) lines.delete(index);
  showRequest(shown.find((request) => request.index === state.picked));
}

const publicName = (request) => request.name.replace(/ \[\d+\]$/, "").replace(/\/\d+$/, "");

async function pick(request) {
  state.picked = request?.index ?? null;
  state.explained = null;
  draw();
  if (!request) return;
  const name = publicName(request);
  const answer = await fetch(`/v1/requests/${encodeURIComponent(name)}/explain`, { headers: headers() });
  if (answer.ok && state.picked === request.index) state.explained = (await answer.json()).data[0];
  draw();
}

function showRequest(request) {
  const place = byId("request");
  const tokens = request && state.said.get(publicName(request));
  const key = JSON.stringify(request && [request, tokens?.length, state.explained, document.documentElement.lang]) ?? "";
  if (place.dataset.key === key) return;  // what is under the pointer stays
  place.dataset.key = key;
  if (!request) return place.replaceChildren();
  const title = document.createElement("h2"), facts = document.createElement("p"), table = document.createElement("p");
  title.textContent = request.name;
  facts.textContent = `${request.state}; ${request.num_computed} ${word("tokens")} ${word("of")} ${request.num_prompt + request.max_tokens}`;
  table.textContent = `${word("blockTable")}: ${request.blocks?.join(" ") || "-"}`;
  place.replaceChildren(title, facts, table);
  const said = document.createElement("p");
  said.className = "said";
  if (tokens) said.append(...tokens.map(shownToken));
  else said.textContent = word("unsaid");
  place.append(said);
  if (!state.explained) return;
  const sentence = document.createElement("p"), bars = document.createElement("table"), body = document.createElement("tbody");
  sentence.textContent = state.explained.sentence;
  for (const [name, seconds] of Object.entries(state.explained.parts)) {
    if (!seconds) continue;
    const row = body.insertRow(), bar = document.createElement("meter");
    row.insertCell().textContent = name.replaceAll("_", " ");
    Object.assign(bar, { min: 0, max: Math.max(state.explained.total_s, 1e-9), value: seconds });
    row.insertCell().append(bar);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = milliseconds(seconds);
  }
  bars.append(body);
  place.append(sentence, bars);
}

async function compareStatic() {
  if (byId("schedule").hidden) return;
  const answer = await fetch(`/ui/static${location.search}`, { headers: headers() });
  const body = byId("static").tBodies[0];
  body.replaceChildren();
  const found = answer.ok ? await answer.json() : null;
  if (!found) return void (body.insertRow().insertCell().textContent = word("tooFew"));
  for (const [name, head] of [["continuous", word("continuous")], ["static", word("static")]]) {
    const row = body.insertRow(), bar = document.createElement("meter"), number = document.createElement("td");
    row.insertCell().textContent = head;
    Object.assign(bar, { min: 0, max: Math.max(found.continuous, found.static), value: found[name] });
    row.insertCell().append(bar);
    number.className = "number";
    number.textContent = `${found[name].toFixed(1)} ${word("tokensPerS")}`;
    row.append(number);
  }
  state.compared = found;
  draw();
}

let stream = new AbortController();
async function connect() {
  stream.abort();
  const mine = (stream = new AbortController());
  const status = byId("status");
  while (!mine.signal.aborted) {
    try {
      const answer = await fetch(`/ui/frames${location.search}`, { headers: headers(), signal: mine.signal });
      if (!answer.ok) throw new Error(`${word("refused")}: ${(await answer.json()).error?.message ?? answer.status}`);
      status.className = "";
      status.textContent = word("connected");
      state.step = -1;
      state.steps = [];
      for await (const text of events(answer.body)) take(JSON.parse(text));
      throw new Error(word("lost"));
    } catch (error) {
      if (mine.signal.aborted) return;
      status.className = "bad";
      status.textContent = error instanceof TypeError ? word("lost") : error.message;
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }
}

export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) for (const line of part.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

function show(name) {
  for (const other of tabs) {
    byId(other).hidden = other !== name;
    const tab = byId(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
  }
  location.hash = name;
  draw();
  compareStatic();
  if (name === "machine") fetchRates();
}

for (const name of tabs) {
  const tab = byId(`tab-${name}`);
  tab.onclick = () => show(name);
  tab.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(tabs.indexOf(name) + move + tabs.length) % tabs.length];
    show(next);
    byId(`tab-${next}`).focus();
  };
}
const theme = (name) => {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("quire-theme", name);
  draw();
};
byId("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
theme(localStorage.getItem("quire-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("language").onchange = (event) => {
  speak(event.target.value);
  draw();
};
byId("language").value = chosen();
speak(chosen());
byId("key").value = sessionStorage.getItem("quire-key") ?? "";
byId("key").onchange = () => {
  sessionStorage.setItem("quire-key", byId("key").value);
  connect();
};
addEventListener("resize", draw);
pointed("schedule", () => [state.places.step, state.places.lane], tellSchedule);
pointed("blocks", () => [state.places.side, state.places.side], tellBlock);
openPlayground(byId, headers, events, state.said);
show(tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : "blocks");
setInterval(compareStatic, 30000);
connect();
