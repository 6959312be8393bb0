// The words of the view. A word that a language lacks is English.
export const WORDS = {
  en: {
    blocks: "Blocks", schedule: "Schedule", machine: "Machine", playground: "Playground", key: "key", theme: "dark / light",
    own: "of one request", shared: "shared", cached: "cached, free", free: "free", requests: "Requests", contiguous: "In one piece",
    contiguousText: "What engines before PagedAttention would set aside for the requests that hold blocks now, in tokens.",
    prefill: "prefill", decode: "decode", stalled: "did not advance", static: "In static batches",
    staticText: "The last requests again, where a batch waits for its longest answer and memory is set aside for the longest sequence: the same cache, and steps that take what steps took here.",
    used: "tokens in the cache", paged: "in blocks", asked: "prompt and max_tokens", pow2: "answers to a power of two", longest: "the longest sequence",
    capacity: "the whole cache", continuous: "continuous", tokensPerS: "tokens a second", running: "running", waiting: "waiting",
    ttft: "time to first token", itl: "time per token", hits: "prompt tokens from the prefix cache", waste: "waste (held and empty)", fragmentation: "fragmentation (free, but not in one piece)",
    now: "now", then: "ended", wasted: "wasted", oracle: "the length it had (oracle)", step: "step", block: "block",
    spans: "Above in continuous batches, below in static ones. Thin: waiting. Grey: computed for nothing until the batch ends.",
    bandwidth: "Memory bandwidth of decode steps", reached: "reached", roof: "this machine's memory", unmeasured: "not measured here (quire plan does)",
    unsaid: "Tokens are shown of requests that this page's playground has asked.",
    send: "Send", stop: "Stop", clear: "Clear", twice: "two settings", ask: "Ask something", system: "system", temperature: "temperature",
    topP: "top_p", maxTokens: "max_tokens", seed: "seed", schema: "JSON schema, or nothing", connected: "live", lost: "no connection", refused: "refused",
    tooFew: "too few requests have ended yet", blockTable: "block table", tokens: "tokens", of: "of",
    why_no_row: "no row", why_no_blocks: "no blocks", why_budget: "budget taken", why_preempted: "preempted", why_in_flight: "in flight", why_grammar: "grammar compiles",
  },
  zh: {
    blocks: "區塊", schedule: "排程", machine: "機器", playground: "試驗場", key: "金鑰", theme: "深色／淺色",
    own: "單一請求", shared: "共用", cached: "已快取、可取用", free: "空閒", requests: "請求", contiguous: "連續配置",
    contiguousText: "PagedAttention 之前的引擎，會為目前持有區塊的請求保留多少記憶體（以詞元計）。",
    prefill: "預填", decode: "解碼", stalled: "未前進", static: "靜態批次",
    staticText: "把最近的請求重算一次：一批要等最長的回答結束，記憶體按最長序列保留。快取大小相同，每一步的時間也和這裡量到的一樣。",
    used: "快取中的詞元", paged: "以區塊配置", asked: "提示加 max_tokens", pow2: "回答取二的次方", longest: "最長序列",
    capacity: "整個快取", continuous: "連續批次", tokensPerS: "每秒詞元", running: "執行中", waiting: "等待中",
    ttft: "首個詞元時間", itl: "每詞元時間", hits: "來自前綴快取的提示詞元", waste: "浪費（持有而空著）", fragmentation: "碎片（空閒但不連續）",
    now: "現在", then: "已結束", wasted: "浪費", oracle: "實際長度（先知）", step: "步", block: "區塊",
    spans: "上為連續批次，下為靜態批次。細線：等待。灰色：批次結束前白算的部分。",
    bandwidth: "解碼步驟的記憶體頻寬", reached: "達到", roof: "本機記憶體", unmeasured: "尚未量測（quire plan 會量）",
    unsaid: "只顯示由本頁試驗場送出的請求的詞元。",
    send: "送出", stop: "停止", clear: "清除", twice: "兩組設定", ask: "問點什麼", system: "系統", temperature: "溫度",
    topP: "top_p", maxTokens: "max_tokens", seed: "種子", schema: "JSON 結構，或留空", connected: "即時", lost: "沒有連線", refused: "被拒絕",
    tooFew: "結束的請求還太少", blockTable: "區塊表", tokens: "詞元", of: "／",
    why_no_row: "沒有空列", why_no_blocks: "沒有區塊", why_budget: "預算用完", why_preempted: "被搶占", why_in_flight: "計算中", why_grammar: "文法編譯中",
  },
};

let language = localStorage.getItem("quire-language") || (navigator.language.startsWith("zh") ? "zh" : "en");

export const word = (name) => WORDS[language][name] ?? WORDS.en[name] ?? name;
export const chosen = () => language;

export function speak(next) {
  language = next;
  localStorage.setItem("quire-language", next);
  document.documentElement.lang = next === "zh" ? "zh-Hant-TW" : "en";
  for (const item of document.querySelectorAll("[data-word]")) item.textContent = word(item.dataset.word);
  for (const item of document.querySelectorAll("[data-placeholder]")) item.placeholder = word(item.dataset.placeholder);
}
