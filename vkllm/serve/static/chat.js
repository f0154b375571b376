// The chat: messages, streaming, settings. Text of a model only ever becomes text nodes.

const $ = id => document.getElementById(id);
const KEPT = ["key", "system", "temperature", "top_p", "max_tokens", "seed"]; // in sessionStorage: for this tab, until it closes

export const page = {model: "", headers: () => ($("key").value ? {Authorization: "Bearer " + $("key").value} : {})};

let messages = [];
let running = null; // the AbortController of the reply that streams now

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- text ---------------------------------------------------------------------------------------------------------------------

// Fenced blocks, `code` and **bold**; everything else stays as it was written.
function render(box, text) {
  const nodes = [];
  text.split(/^(```[^\n]*\n[\s\S]*?(?:^```[ \t]*$|$(?![\s\S])))/m).forEach((part, i, all) => {
    if (i % 2 === 0) return void nodes.push(...inline(beside(part, i > 0, i + 1 < all.length)));
    nodes.push(block(part.replace(/^```[^\n]*\n/, "").replace(/\n?^```[ \t]*$(?![\s\S])/m, "")));
  });
  box.replaceChildren(...nodes);
}

// Text without the empty lines next to a block, which has its own margin.
function beside(text, after, before) {
  const start = after ? text.replace(/^\n+/, "") : text;
  return before ? start.replace(/\n+$/, "") : start;
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, i) => {
    if (i % 2 === 0) return document.createTextNode(part);
    return part[0] === "`" ? element("code", "", part.slice(1, -1)) : element("strong", "", part.slice(2, -2));
  });
}

function block(code) {
  const pre = element("pre"), copy = element("button", "", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(code); copy.textContent = "Copied"; } catch { copy.textContent = "Not allowed"; }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  pre.append(element("code", "", code), copy);
  return pre;
}

// --- the log ------------------------------------------------------------------------------------------------------------------

const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

function show(role, text) {
  $("hello").hidden = true;
  const box = element("article", "message " + role), body = element("div", "body");
  body.textContent = text;
  box.append(body);
  $("log").append(box);
  toEnd();
  return {box, body};
}

function note(box, text) {
  box.querySelector(".meta")?.remove();
  box.append(element("p", "meta", text));
}

// What went wrong, in words, with a way on.
function complain(failure) {
  const box = element("article", "message notice" + (failure.wait ? " patience" : "")), words = element("p", "", failure.message);
  const again = element("button", "", "Try again");
  again.type = "button";
  box.append(words);
  if (failure.again) box.append(again);
  again.addEventListener("click", () => { if (!running && messages.at(-1)?.role === "user") { box.remove(); reply(); } });
  $("log").append(box);
  toEnd();
  if (failure.wait) countDown(again, failure.wait);
  if (failure.status === 401) { open("settings", true); $("key").focus(); }
}

function countDown(button, seconds) {
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
  if (seconds > 0) setTimeout(() => countDown(button, seconds - 1), 1000);
}

// --- the server ---------------------------------------------------------------------------------------------------------------

const number = id => ($(id).value.trim() === "" || !$(id).checkValidity() ? undefined : Number($(id).value));

function request() {
  const system = $("system").value.trim();
  return {
    model: page.model,
    messages: system ? [{role: "system", content: system}, ...messages] : messages,
    stream: true,
    stream_options: {include_usage: true},
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

async function failureOf(response) {
  const status = response.status, wait = Math.min(600, Math.ceil(Number(response.headers.get("Retry-After")) || 0));
  let told = `The server answered ${status}.`;
  try { told = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
  if (status === 401) return {status, message: "This server wants an API key. Put it into the settings.", again: true};
  if (status === 429) return {status, wait, message: "That was a lot of requests. Give it a moment.", again: true};
  if (status === 503) return {status, wait: wait || 5, message: `Not just now: ${told}.`, again: true};
  return {status, message: told, again: status >= 500};
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const data = held.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function said(result) {
  const n = result.usage?.completion_tokens, seconds = (result.last - result.first) / 1000, parts = [];
  if (n) parts.push(n === 1 ? "1 token" : `${n} tokens`);
  if (n > 8 && seconds > 0.1) parts.push(`${((n - 1) / seconds).toFixed(1)} tok/s`);
  if (result.usage?.prompt_tokens_details?.cached_tokens) parts.push(`${result.usage.prompt_tokens_details.cached_tokens} of the prompt from the cache`);
  if (result.reason === "length") parts.push("cut off at the most tokens");
  if (result.stopped) parts.push("stopped");
  return parts.join(" · ");
}

// Ask for the next message of the conversation, and show it as it comes.
async function reply() {
  const {box, body} = show("assistant", ""), result = {text: "", first: 0, last: 0};
  let failure = null, drawn = 0;
  const draw = () => { const follow = atEnd(); drawn = 0; render(body, result.text); if (follow) toEnd(); };
  running = new AbortController();
  box.classList.add("running");
  box.setAttribute("aria-busy", "true"); // it is read out when it is complete
  sending(true);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: {"Content-Type": "application/json", ...page.headers()},
      signal: running.signal,
      body: JSON.stringify(request()),
    });
    if (!response.ok) throw await failureOf(response);
    for await (const event of events(response)) {
      if (event.error) throw {message: event.error.message, again: true};
      const choice = event.choices?.[0];
      result.usage = event.usage ?? result.usage;
      result.reason = choice?.finish_reason ?? result.reason;
      if (choice?.delta?.content) {
        result.text += choice.delta.content;
        result.last = performance.now();
        result.first ||= result.last;
        drawn ||= requestAnimationFrame(draw);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") result.stopped = true;
    else if (error instanceof TypeError) failure = {message: "The server cannot be reached. Is it running?", again: true};
    else failure = error;
  }
  cancelAnimationFrame(drawn);
  if (!box.isConnected) return; // a new chat has begun
  draw();
  running = null;
  box.classList.remove("running");
  box.removeAttribute("aria-busy");
  sending(false);
  if (result.text || !failure && !result.stopped) {
    messages.push({role: "assistant", content: result.text});
    note(box, said(result));
  } else if (result.stopped) note(box, "stopped");
  else box.remove();
  if (failure) complain(failure);
}

function ask(text) {
  if (messages.at(-1)?.role === "user") messages.pop(); // the last one got no answer: this takes its place
  messages.push({role: "user", content: text});
  show("user", text);
  reply();
}

// --- the page -----------------------------------------------------------------------------------------------------------------

function sending(yes) {
  $("send").textContent = yes ? "Stop" : "Send";
  $("send").classList.toggle("stop", yes);
}

function open(name, yes) {
  const button = $(name + "-button");
  button.setAttribute("aria-expanded", String(yes));
  if (name === "settings") $(name).hidden = !yes; else $(name).classList.toggle("open", yes);
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + 2 + "px";
}

for (const name of ["settings", "live"]) {
  $(name + "-button").addEventListener("click", event => open(name, event.currentTarget.getAttribute("aria-expanded") !== "true"));
}
for (const id of KEPT) {
  $(id).value = sessionStorage.getItem("vkllm." + id) ?? $(id).value;
  $(id).addEventListener("input", () => sessionStorage.setItem("vkllm." + id, $(id).value));
}
$("settings").addEventListener("submit", event => event.preventDefault());
$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  grow();
  ask(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});
$("new").addEventListener("click", () => {
  running?.abort();
  running = null;
  sending(false);
  messages = [];
  $("log").replaceChildren($("hello"));
  $("hello").hidden = false;
  $("text").focus();
});
