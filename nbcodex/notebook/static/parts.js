/* What our widgets have in common: words, icons, how nodes are made, and how a kernel is stopped.
 *
 * A widget's module has no address to import from, so this file is put before each of them. What a
 * server or a model says is put in as text, never as markup.
 */

// Lab's command mode would take a letter pressed here for an order to the notebook.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };
const KNOCKS_MS = [0, 250, 1000]; // Lab's first messages miss the subshell that it is still making
const GRACE_MS = 400; // for Python to say that it has heard a click
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

const PHASES = {
  queued: ["Queued", "Waiting for its turn to be sent"],
  held: ["Held back", "The model is closed for the moment: another request met its limit"],
  sending: ["Sent", "Waiting for the first word"],
  thinking: ["Thinking", "The model is reasoning before it answers"],
  streaming: ["Answering", "The answer is arriving"],
  waiting: ["Waiting to retry", "The server refused the last attempt; the next starts by itself"],
  done: ["Done", "The answer is complete"],
  parked: ["Parked", "Kept for later; nothing is lost"],
  interrupted: ["Interrupted", "You stopped the cell; the text so far is kept"],
  cancelled: ["Cancelled", "You cancelled this request"],
  failed: ["Failed", "No further attempt can help"],
};

// 16 × 16 line drawings, told apart by shape and not by colour.
const CLOCK = "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2M8 4.8V8l2.2 1.6";
const ICONS = {
  queued: "M3 4.5h10M3 8h10M3 11.5h6",
  held: "M6 3.5v9M10 3.5v9",
  sending: "M8 13V3.5M4.2 7 8 3.2 11.8 7",
  thinking: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  streaming: "M3 4h10M3 8h7M3 12h3M8.5 12h.01",
  waiting: CLOCK,
  done: "m3 8.5 3.5 3.5L13 4.5",
  parked: "M5 13.5v-11h3.8a3.3 3.3 0 0 1 0 6.6H5",
  interrupted: "M4 4h8v8H4z",
  cancelled: "m4 4 8 8M12 4l-8 8",
  failed: "M8 2.5 14.2 13.5H1.8zM8 6.5v3M8 11.6h.01",
};

// Label, label once pressed, visible words, the whole of it for the title, and the visible words once
// an attempt is under way, where they differ; ID is the request's.
const BUTTONS = {
  cancel: ["Cancel", "Cancelling…", "ends it, keeps any text", "End request ID now. The text so far stays below the cell, and in the variable of -o."],
  retry: ["Retry now", "Retrying…", "if refused: 1 request, no tokens", "Send it now, without waiting for the countdown. The server may refuse again: that costs no tokens, but counts as a request, and the countdown goes on as it was."],
  park: ["Park", "Parking…", "for later: %codex resume ID", "Put the request aside and free the cell; nothing is lost. It stays in the journal until you run %codex resume ID, which asks anew, and pays anew, where an answer had begun, unless it was asked for with --durable.", "asked anew: %codex resume ID"],
};
// Commands take any start of an id; where room is dear, this much of it is told. Rows of a map begin
// alike: their ids are told whole.
const short = (id) => (/^[0-9a-f]{12}$/.test(id) ? id.slice(0, 8) : id);
const aboutButton = (name, id) => BUTTONS[name][3].replaceAll("ID", id);

function make(tag, name, attributes = {}, ...children) {
  const node = document.createElement(tag);
  node.className = name && `nbcodex-${name}`;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
};

function span(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 59.95) return `${s.toFixed(1)} s`;
  const whole = Math.round(s), two = (n) => String(n).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

/* Ask the page's own server to interrupt the kernel; returns whether it did. */
async function interrupt(kernelId) {
  const config = document.querySelector("script#jupyter-config-data")?.textContent;
  const base = config ? JSON.parse(config).baseUrl : document.body.dataset.baseUrl;
  if (!base || !UUID.test(kernelId)) return false;
  const root = new URL(base.endsWith("/") ? base : `${base}/`, location.href);
  const url = new URL(`api/kernels/${kernelId}/interrupt`, root);
  if (url.origin !== location.origin) return false;
  const xsrf = document.cookie.match(/(?:^|;\s*)_xsrf=([^;]*)/);
  const headers = xsrf ? { "X-XSRFToken": decodeURIComponent(xsrf[1]) } : {};
  const answer = await fetch(url, {
    method: "POST", headers, credentials: "same-origin", redirect: "error",
  });
  return answer.ok;
}
