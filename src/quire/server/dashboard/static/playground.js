// Chat with streaming: parameters, a schema, log-probabilities under the pointer, two settings side by side, export.
import { word } from "/ui/words.js";

const FIELDS = { temperature: 0.7, topP: 1, maxTokens: 200, seed: "" };
const NAMES = { temperature: "temperature", topP: "top_p", maxTokens: "max_tokens", seed: "seed" };

const KEPT_ANSWERS = 40;

// `said`: the tokens of each answer by its name, for whom picks that request.
export function openPlayground(byId, headers, events, said) {
  const columns = [column("a"), column("b")];
  byId("columns").append(...columns.map((one) => one.place));
  let running = new AbortController();

  const shown = () => columns.slice(0, byId("twice").checked ? 2 : 1);
  const arrange = () => columns.forEach((one, at) => (one.place.hidden = at > 0 && !byId("twice").checked));
  byId("twice").onchange = arrange;
  arrange();

  byId("ask").onsubmit = async (event) => {
    event.preventDefault();
    const text = byId("question").value;
    byId("question").value = "";
    running = new AbortController();
    await Promise.all(shown().map((one) => ask(one, text, running.signal)));
  };
  byId("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  };
  byId("stop").onclick = () => running.abort();
  byId("clear").onclick = () => columns.forEach((one) => ((one.messages = []), one.log.replaceChildren()));
  byId("export-curl").onclick = () => exported((body) => curl(body, headers()));
  byId("export-python").onclick = () => exported(python);

  function exported(write) {
    const body = bodyOf(columns[0], [...columns[0].messages, { role: "user", content: byId("question").value || "Hi" }]);
    byId("exported").hidden = false;
    byId("exported").textContent = write(body);
  }

  async function ask(one, text, signal) {
    one.messages.push({ role: "user", content: text });
    line(one.log, "user", text);
    const place = line(one.log, "assistant", "");
    let answered = "";
    try {
      const body = { ...bodyOf(one, one.messages), stream: true, logprobs: true, top_logprobs: 3 };
      const answer = await fetch("/v1/chat/completions", {
        method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body), signal,
      });
      if (!answer.ok) throw new Error((await answer.json()).error?.message ?? answer.status);
      for await (const data of events(answer.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data), choice = chunk.choices?.[0];
        if (chunk.error) throw new Error(chunk.error.message);
        answered += choice?.delta?.content ?? "";
        for (const token of choice?.logprobs?.content ?? []) {
          if (choice.delta?.content || !choice.finish_reason) place.append(shownToken(token));  // not what ends it
          if (!said.has(chunk.id)) said.set(chunk.id, []);
          said.get(chunk.id).push(token);
        }
        if (said.size > KEPT_ANSWERS) said.delete(said.keys().next().value);
        if (choice?.delta?.content && !choice.logprobs?.content?.length) place.append(choice.delta.content);
        one.log.scrollTop = one.log.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") line(one.log, "error", error.message);
    }
    one.messages.push({ role: "assistant", content: answered });
  }
}

export function shownToken(token) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = token.token;
  span.title = [token, ...token.top_logprobs].map((item) => `${JSON.stringify(item.token)} ${(100 * Math.exp(item.logprob)).toFixed(1)} %`).join("\n");
  return span;
}

function line(log, role, text) {
  const place = document.createElement("div");
  place.className = role;
  place.textContent = text;
  log.append(place);
  return place;
}

function column(name) {
  const place = document.createElement("div"), settings = document.createElement("div"), log = document.createElement("div");
  settings.className = "settings";
  log.className = "log";
  log.id = `log-${name}`;
  log.tabIndex = 0;
  log.setAttribute("aria-live", "polite");
  const inputs = {};
  for (const [field, usual] of Object.entries(FIELDS)) {
    const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
    text.dataset.word = field;
    text.textContent = word(field);
    Object.assign(input, { type: "number", step: "any", value: usual, id: `${field}-${name}` });
    label.append(text, " ", input);
    settings.append(label);
    inputs[field] = input;
  }
  for (const field of ["system", "schema"]) {
    const area = document.createElement("textarea");
    Object.assign(area, { rows: 1, id: `${field}-${name}`, placeholder: word(field), ariaLabel: word(field) });
    area.dataset.placeholder = field;
    settings.append(area);
    inputs[field] = area;
  }
  place.append(settings, log);
  return { place, log, inputs, messages: [] };
}

function bodyOf(one, messages) {
  const system = one.inputs.system.value.trim(), schema = one.inputs.schema.value.trim();
  const model = new URLSearchParams(location.search).get("model");  // that the page is of, where there are several
  const body = { ...(model && { model }), messages: system ? [{ role: "system", content: system }, ...messages] : [...messages] };
  for (const [field, name] of Object.entries(NAMES)) if (one.inputs[field].value !== "") body[name] = Number(one.inputs[field].value);
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  return body;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(body, sent) {
  const key = sent.Authorization ? " \\\n  -H \"Authorization: Bearer $QUIRE_API_KEY\"" : "";
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body, null, 1))}`;
}

const constants = new Map([[true, "True"], [false, "False"], [null, "None"]]);

function literal(value) {
  if (constants.has(value)) return constants.get(value);
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item)}`).join(", ")}}`;
}

function python(body) {
  const { response_format: shape, model, ...rest } = body;
  const lines = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (shape) lines.push(`    response_format=${literal(shape)},`);
  return ["from openai import OpenAI", "", `client = OpenAI(base_url="${location.origin}/v1", api_key="none")`,
    "answer = client.chat.completions.create(", `    model=${model ? literal(model) : "client.models.list().data[0].id"},`, ...lines, ")", "print(answer.choices[0].message.content)"].join("\n");
}
