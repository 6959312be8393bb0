// The live view: reads frames, keeps the state, draws what is seen.
import { cells, counts, drawBlocks, drawRate, drawSchedule, hue, lanes, memory, showMemory } from "/ui/views.js";
import { chosen, speak, word } from "/ui/words.js";
import { openPlayground } from "/ui/playground.js";

const KEPT_STEPS = 400, FLASH_MS = 700;
const byId = (id) => document.getElementById(id);
const tabs = ["blocks", "schedule", "machine", "playground"];

export const state = {
  frames: 0, step: -1, num_blocks: 0, block_size: 16, max_model_len: 0, requests: new Map(), ended: [], cached: [], steps: [], rates: [],
  last: null, picked: null, flashes: new Map(), explained: null, figures: null,
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
    drawBlocks(byId("blocks-canvas"), state, grid, state.flashes, state.picked);
    const found = counts(grid), held = memory(state, grid);
    state.figures = { ...found, ...held };
    byId("blocks-summary").textContent = `${word("own")} ${found.own}, ${word("shared")} ${found.shared}, ${word("cached")} ${found.cached}, ${word("free")} ${found.free}; ${word("waste")} ${(held.waste * 100).toFixed(1)} %`;
    showMemory(byId("memory").tBodies[0], held);
  } else if (view === "schedule") {
    const drawn = drawSchedule(byId("schedule-canvas"), state, state.picked);
    const why = new Map();
    for (const [, , , waits] of lanes(state, 200).steps) for (const [, reason] of waits) why.set(reason, (why.get(reason) ?? 0) + 1);
    const reasons = [...why].map(([reason, count]) => `${word(`why_${reason}`).replace("why_", "")} ${count}`).join(", ");
    byId("schedule-summary").textContent = `${drawn.steps} steps, ${drawn.lanes} ${word("requests")}${reasons ? `; ${word("stalled")}: ${reasons}` : ""}`;
    state.figures = drawn;
  } else if (view === "machine") {
    showFigures();
    drawRate(byId("rate-canvas"), state.rates);
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

function listRequests() {
  const list = byId("requests"), shown = [...state.requests.values(), ...[...state.ended].reverse()].slice(0, 80);
  const focused = document.activeElement?.dataset?.index;
  list.replaceChildren(...shown.map((request) => {
    const line = document.createElement("li"), button = document.createElement("button"), swatch = document.createElement("i");
    swatch.className = "swatch";
    swatch.style.background = `hsl(${hue(request.index)} 60% 45%)`;
    const why = request.reason ? ` (${word(`why_${request.reason}`).replace("why_", "")})` : "";
    button.append(swatch, `${request.state}${why} ${request.num_prompt}+${request.num_output} ${request.name}`);
    button.dataset.index = request.index;
    button.setAttribute("aria-pressed", String(state.picked === request.index));
    button.onclick = () => pick(state.picked === request.index ? null : request);
    line.append(button);
    return line;
  }));
  if (focused !== undefined) list.querySelector(`[data-index="${focused}"]`)?.focus();
  showRequest(shown.find((request) => request.index === state.picked));
}

async function pick(request) {
  state.picked = request?.index ?? null;
  state.explained = null;
  draw();
  if (!request) return;
  const name = request.name.replace(/ \[\d+\]$/, "").replace(/\/\d+$/, "");
  const answer = await fetch(`/v1/requests/${encodeURIComponent(name)}/explain`, { headers: headers() });
  if (answer.ok && state.picked === request.index) state.explained = (await answer.json()).data[0];
  draw();
}

function showRequest(request) {
  const place = byId("request");
  if (!request) return place.replaceChildren();
  const title = document.createElement("h2"), facts = document.createElement("p"), table = document.createElement("p");
  title.textContent = request.name;
  facts.textContent = `${request.state}; ${request.num_computed} ${word("tokens")} ${word("of")} ${request.num_prompt + request.max_tokens}`;
  table.textContent = `${word("blockTable")}: ${request.blocks?.join(" ") || "-"}`;
  place.replaceChildren(title, facts, table);
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
openPlayground(byId, headers, events);
show(tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : "blocks");
setInterval(compareStatic, 30000);
connect();
