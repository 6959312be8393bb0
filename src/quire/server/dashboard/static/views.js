// What is drawn of a state: it is computed first (cells, bars) and painted then, so that tests can compare the two.
import { word } from "/ui/words.js";

export const SHOWN_STEPS = 200;

export const hue = (index) => (index * 137.508) % 360;
const colour = (index, light) => `hsl(${hue(index)} 60% ${light}%)`;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function prepared(canvas) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== width * scale || canvas.height !== height * scale) {
    canvas.width = width * scale;
    canvas.height = height * scale;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

// Of each block: the requests that hold it, and whether it is cached.
export function cells(state) {
  const found = Array.from({ length: state.num_blocks }, () => ({ holders: [], cached: false }));
  for (const request of state.requests.values()) for (const id of request.blocks) found[id]?.holders.push(request.index);
  for (const id of state.cached) if (found[id]) found[id].cached = !found[id].holders.length;
  return found;
}

export function counts(grid) {
  const found = { own: 0, shared: 0, cached: 0, free: 0 };
  for (const cell of grid) found[cell.holders.length > 1 ? "shared" : cell.holders.length ? "own" : cell.cached ? "cached" : "free"] += 1;
  return found;
}

export function drawBlocks(canvas, state, grid, flashes, picked) {
  const { pen, width, height } = prepared(canvas);
  const side = Math.max(2, Math.floor(Math.sqrt((width * height) / Math.max(grid.length, 1))) - 1);
  const perLine = Math.max(1, Math.floor(width / (side + 1)));
  const line = style("--line");
  grid.forEach((cell, id) => {
    const x = (id % perLine) * (side + 1), y = Math.floor(id / perLine) * (side + 1);
    const [first, second] = cell.holders;
    pen.globalAlpha = picked === null || cell.holders.includes(picked) || !cell.holders.length ? 1 : 0.25;
    if (first === undefined) {
      pen.fillStyle = cell.cached ? "hsl(210 10% 60% / .45)" : "transparent";
      pen.fillRect(x, y, side, side);
      pen.strokeStyle = line;
      pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
      return;
    }
    pen.fillStyle = colour(first, 45);
    pen.fillRect(x, y, side, side);
    if (second !== undefined) {  // stripes
      pen.fillStyle = colour(second, 60);
      for (let at = 0; at < side; at += 6) pen.fillRect(x + at, y, Math.min(3, side - at), side);
    }
    if (flashes.has(id)) {
      pen.strokeStyle = "gold";
      pen.lineWidth = 2;
      pen.strokeRect(x + 1, y + 1, side - 2, side - 2);
      pen.lineWidth = 1;
    }
  });
  pen.globalAlpha = 1;
  return { side: side + 1, perLine };
}

// Share of the free blocks outside the longest run of them: what one piece of memory could not have.
export function fragmentation(grid) {
  let free = 0, run = 0, longest = 0;
  for (const cell of grid) {
    run = cell.holders.length ? 0 : run + 1;
    free += cell.holders.length ? 0 : 1;
    longest = Math.max(longest, run);
  }
  return free ? 1 - longest / free : 0;
}

const powerOfTwo = (n) => (n <= 1 ? 1 : 2 ** Math.ceil(Math.log2(n)));

// Tokens that each way of keeping memory sets aside: `now` for the requests that hold blocks, `then` for those that have ended.
export function memory(state, grid) {
  const longest = state.max_model_len, size = state.block_size;
  const held = [...state.requests.values()].filter((request) => request.blocks.length);
  const ended = state.ended.filter((request) => request.num_output && ["stop", "length"].includes(request.state));
  const sum = (requests, of) => requests.reduce((total, request) => total + of(request), 0);
  const length = (request) => request.num_prompt + request.num_output;
  const ways = (requests) => ({
    asked: sum(requests, (request) => Math.min(request.num_prompt + request.max_tokens, longest)),
    pow2: sum(requests, (request) => Math.min(request.num_prompt + powerOfTwo(request.num_output), longest)),
    longest: requests.length * longest,
  });
  const taken = grid.filter((cell) => cell.holders.length).length * size;
  const empty = sum(held, (request) => Math.max(0, request.blocks.length * size - request.num_computed));
  const lengths = sum(ended, length);
  return {
    now: { used: Math.max(0, taken - empty), paged: taken, ...ways(held), capacity: state.num_blocks * size },
    then: { used: lengths, paged: sum(ended, (request) => Math.ceil(length(request) / size) * size), oracle: lengths, ...ways(ended) },
    ended: ended.length,
    waste: taken ? Math.max(0, Math.min(1, empty / taken)) : 0,
    fragmentation: fragmentation(grid),
  };
}

const NAMES = ["used", "paged", "oracle", "asked", "pow2", "longest", "capacity"];

export function showMemory(table, found) {
  const most = { now: Math.max(1, ...Object.values(found.now)), then: Math.max(1, ...Object.values(found.then)) };
  const heads = ["", word("now"), word("wasted"), `${word("then")} (${found.ended})`, word("wasted")];
  table.tHead.rows[0].replaceChildren(...heads.map((text) => Object.assign(document.createElement("th"), { scope: "col", textContent: text })));
  table.tBodies[0].replaceChildren(...NAMES.map((name) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = word(name);
    row.append(head);
    row.dataset.name = name;
    for (const when of ["now", "then"]) {
      const value = found[when][name], bar = document.createElement("meter"), cell = row.insertCell(), wasted = row.insertCell();
      row.dataset[when] = value ?? "";
      wasted.className = "number";
      if (value === undefined) continue;
      Object.assign(bar, { min: 0, max: most[when], value, ariaLabel: `${word(name)}, ${word(when)}` });
      cell.append(bar, ` ${value.toLocaleString()}`);
      if (name !== "used" && name !== "capacity") wasted.textContent = value ? `${(100 * Math.max(0, 1 - found[when].used / value)).toFixed(1)} %` : "-";
    }
    return row;
  }));
}

// Rows over time: the last steps, one line a request.
export function lanes(state, most) {
  const steps = state.steps.slice(-most), order = new Map();
  for (const [, , rows, waits] of steps) for (const [index] of [...rows, ...waits]) if (!order.has(index)) order.set(index, order.size);
  return { steps, order };
}

export function drawSchedule(canvas, state, picked) {
  const { pen, width, height } = prepared(canvas);
  const { steps, order } = lanes(state, SHOWN_STEPS);
  const step = width / Math.max(steps.length, 40), lane = Math.min(18, height / Math.max(order.size, 1));
  const bad = style("--bad"), out = style("--out");
  let preempted = 0;
  steps.forEach(([, , rows, waits], at) => {
    for (const [index, count, isDecode] of rows) {
      pen.globalAlpha = picked === null || picked === index ? 1 : 0.3;
      pen.fillStyle = colour(index, isDecode ? 72 : 42);
      const tall = isDecode ? lane * 0.6 : lane * Math.min(0.95, 0.6 + count / 512);
      pen.fillRect(at * step, order.get(index) * lane, Math.max(1, step - 0.5), Math.max(1, tall));
    }
    pen.globalAlpha = 1;
    for (const [index, reason] of waits) {
      const isOut = reason === "preempted";
      preempted += isOut ? 1 : 0;
      pen.fillStyle = isOut ? out : bad;
      const tall = isOut ? lane * 0.9 : lane * 0.2;
      pen.fillRect(at * step, order.get(index) * lane + (isOut ? 0 : lane * 0.35), Math.max(1, step - 0.5), Math.max(1, tall));
    }
  });
  return { steps: steps.length, lanes: order.size, preempted, step, lane };
}

// The same requests under two batchings: waiting is faint, running is full, and what is computed for nothing is grey.
export function drawSpans(canvas, found) {
  const { pen, width, height } = prepared(canvas);
  const modes = ["continuous", "static"], end = Math.max(1e-9, ...modes.flatMap((name) => found.spans[name].map(([, , last]) => last)));
  const x = (seconds) => (seconds / end) * width, line = (height - 12) / modes.reduce((total, name) => total + found.spans[name].length, 0);
  let y = 0, padded = 0;
  for (const name of modes) {
    const spans = found.spans[name], until = name === "static" ? batchEnds(spans) : spans.map(([, , last]) => last);
    spans.forEach(([arrival, first, last], at) => {
      pen.fillStyle = style("--line");
      pen.fillRect(x(arrival), y + line * 0.4, x(first - arrival), Math.max(1, line * 0.2));
      pen.fillStyle = colour(at, 50);
      pen.fillRect(x(first), y, Math.max(1, x(last - first)), Math.max(1, line - 1));
      pen.fillStyle = style("--faint");
      pen.fillRect(x(last), y + line * 0.25, x(until[at] - last), Math.max(1, line * 0.5));
      padded += until[at] - last;
      y += line;
    });
    y += 12;
  }
  return { spans: found.spans.static.length, padded_s: padded };
}

// Of each request: when the longest of its batch has ended. The next batch begins after that.
export function batchEnds(spans) {
  const order = spans.map((_, at) => at).sort((a, b) => spans[a][1] - spans[b][1]), ends = [];
  let batch = [], until = -1;
  for (const at of order) {
    if (spans[at][1] > until) batch = [];
    until = batch.length ? Math.max(until, spans[at][2]) : spans[at][2];
    batch.push(at);
    for (const one of batch) ends[one] = until;
  }
  return ends;
}

export function drawRate(canvas, rates) {
  const { pen, width, height } = prepared(canvas);
  const most = Math.max(1, ...rates);
  pen.strokeStyle = style("--mark");
  pen.beginPath();
  rates.forEach((rate, at) => pen.lineTo((at / Math.max(rates.length - 1, 1)) * width, height - 4 - (rate / most) * (height - 8)));
  pen.stroke();
}
