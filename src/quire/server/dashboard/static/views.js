// What is drawn of a state: it is computed first (cells, bars) and painted then, so that tests can compare the two.
import { word } from "/ui/words.js";

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
  return { side, perLine };
}

// Tokens that each way of keeping memory sets aside for the requests that hold blocks.
export function memory(state, grid) {
  const held = [...state.requests.values()].filter((request) => request.blocks.length);
  const sum = (of) => held.reduce((total, request) => total + of(request), 0);
  const powerOfTwo = (n) => (n <= 1 ? 1 : 2 ** Math.ceil(Math.log2(n)));
  const taken = grid.filter((cell) => cell.holders.length).length * state.block_size;
  const empty = sum((request) => Math.max(0, request.blocks.length * state.block_size - request.num_computed));
  return {
    used: Math.max(0, taken - empty),
    paged: taken,
    asked: sum((request) => Math.min(request.num_prompt + request.max_tokens, state.max_model_len)),
    pow2: sum((request) => Math.min(request.num_prompt + powerOfTwo(request.num_output), state.max_model_len)),
    longest: held.length * state.max_model_len,
    capacity: state.num_blocks * state.block_size,
    waste: taken ? Math.max(0, Math.min(1, empty / taken)) : 0,
  };
}

export function showMemory(body, found) {
  const names = ["used", "paged", "asked", "pow2", "longest", "capacity"];
  const most = Math.max(1, ...names.map((name) => found[name]));
  body.replaceChildren(...names.map((name) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    const cell = document.createElement("td"), bar = document.createElement("meter"), number = document.createElement("td");
    head.scope = "row";
    head.textContent = word(name);
    Object.assign(bar, { min: 0, max: most, value: found[name] });
    number.className = "number";
    number.textContent = found[name].toLocaleString();
    row.dataset.name = name;
    row.dataset.value = found[name];
    cell.append(bar);
    row.append(head, cell, number);
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
  const { steps, order } = lanes(state, 200);
  const step = width / Math.max(steps.length, 40), lane = Math.min(18, height / Math.max(order.size, 1));
  const bad = style("--bad");
  steps.forEach(([, , rows, waits], at) => {
    for (const [index, count, isDecode] of rows) {
      pen.globalAlpha = picked === null || picked === index ? 1 : 0.3;
      pen.fillStyle = colour(index, isDecode ? 72 : 42);
      const tall = isDecode ? lane * 0.6 : lane * Math.min(0.95, 0.6 + count / 512);
      pen.fillRect(at * step, order.get(index) * lane, Math.max(1, step - 0.5), Math.max(1, tall));
    }
    pen.globalAlpha = 1;
    pen.fillStyle = bad;
    for (const [index] of waits) pen.fillRect(at * step, order.get(index) * lane + lane * 0.35, Math.max(1, step - 0.5), Math.max(1, lane * 0.2));
  });
  return { steps: steps.length, lanes: order.size };
}

export function drawRate(canvas, rates) {
  const { pen, width, height } = prepared(canvas);
  const most = Math.max(1, ...rates);
  pen.strokeStyle = style("--mark");
  pen.beginPath();
  rates.forEach((rate, at) => pen.lineTo((at / Math.max(rates.length - 1, 1)) * width, height - 4 - (rate / most) * (height - 8)));
  pen.stroke();
}
