/* Shared by all our widgets: labels, icons, functions that make nodes, and messages to the kernel.
 *
 * widget_base.py puts this file before the file of each widget. What a server or a model has sent is
 * inserted as text, never as markup.
 */

// In its command mode, JupyterLab would take a key pressed here for a shortcut of the notebook.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

// When a page asks for the present state. JupyterLab loses messages while it is still creating the
// subshell that serves them, so it asks again until Python has answered.
const SYNC_DELAYS_MS = [0, 250, 1000];

// A click that Python has not acknowledged within this time was not received.
const ACKNOWLEDGE_MS = 400;

// By phase: its label, and its description.
const PHASES = {
  queued: ["Queued", "Waiting for capacity before it is sent"],
  cooldown: ["Cooldown", "The model is closed until its limit resets"],
  sending: ["Sent", "Waiting for the start of the answer"],
  thinking: ["Thinking", "The model is reasoning before it answers"],
  streaming: ["Answering", "The answer is arriving"],
  waiting: ["Waiting to retry", "The server refused the last attempt; the next one starts by itself"],
  ended: ["Ended", "The output that follows, or the journal, says how"],
};

// SVG paths of 16 × 16 units. They differ in shape, as not every reader sees a difference in colour.
const CLOCK_ICON = "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2M8 4.8V8l2.2 1.6";
const ICONS = {
  queued: "M3 4.5h10M3 8h10M3 11.5h6",
  cooldown: "M6 3.5v9M10 3.5v9",
  sending: "M8 13V3.5M4.2 7 8 3.2 11.8 7",
  thinking: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  streaming: "M3 4h10M3 8h7M3 12h3M8.5 12h.01",
  waiting: CLOCK_ICON,
  ended: "M4 4h8v8H4z",
};

// ID stands for the id of the request. `hintWhileRunning` replaces `hint` once an attempt is running.
const BUTTONS = {
  cancel: {
    label: "Cancel",
    pressedLabel: "Cancelling…",
    hint: "ends it, keeps any text",
    title: "End request ID now. The text so far stays below the cell, and in the variable of -o.",
  },
  retry: {
    label: "Retry now",
    pressedLabel: "Retrying…",
    hint: "if refused: 1 request, no tokens",
    title:
      "Send it now instead of waiting for the countdown. The server may refuse again: that costs no " +
      "tokens, but counts as a request, and the countdown goes on as it was.",
  },
  park: {
    label: "Park",
    pressedLabel: "Parking…",
    hint: "for later: %codex resume ID",
    hintWhileRunning: "sent again: %codex resume ID",
    title:
      "Put the request aside and free the cell; nothing is lost. It stays in the journal until you " +
      "run %codex resume ID. If an answer had begun, that sends the request again and pays for it " +
      "again, unless it was sent with --durable.",
  },
};

// Commands accept any unique beginning of an id, so this much is shown. The rows of a map have equal
// beginnings: their ids, which are longer, are shown whole.
const shortId = (id) => (/^[0-9a-f]{12}$/.test(id) ? id.slice(0, 8) : id);

const buttonTitle = (action, id, disabled) => {
  const { label, title } = BUTTONS[action];
  return disabled ? `${label} is not possible now. ${disabled}` : title.replaceAll("ID", id);
};

/* Make an element with the class nbcodex-NAME, or without a class if the name is empty. */
function makeNode(tag, name, attributes = {}, ...children) {
  const node = document.createElement(tag);
  node.className = name && `nbcodex-${name}`;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function makeSvg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/* Set the text of a node if it differs, and hide a node without text. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
}

const formatNumber = (n) => Math.round(n).toLocaleString("en-US");
const formatCount = (n, noun) => `${formatNumber(n)} ${noun}${n === 1 ? "" : "s"}`;
const twoDigits = (n) => String(n).padStart(2, "0");

function formatDuration(ms) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${twoDigits(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${twoDigits(Math.floor((whole % 3600) / 60))} min`;
}

/* Messages to the kernel, each of which Python acknowledges.
 *
 * `send` calls `onReceived` when a message is acknowledged, and `onLate` if it is not within
 * `ACKNOWLEDGE_MS`; it may still be, when the cell ends. `onReached` is called with true when the
 * first acknowledgement arrives, and with false if none has arrived after `reachMs`.
 */
function openChannel(model, { reachMs = Infinity, onReached = () => {} } = {}) {
  const onAcknowledged = new Map(); // by the number of the message
  let sentCount = 0;
  let reached = null; // null: not known yet
  const timers = [];

  function setReached(value) {
    if (reached === value) return;
    reached = value;
    onReached(value);
  }

  model.on("msg:custom", (message) => {
    if (message.type !== "received") return;
    timers.forEach(clearTimeout);
    onAcknowledged.get(message.id)?.();
    onAcknowledged.delete(message.id);
    setReached(true);
  });

  return {
    /* Ask for the present state, until Python has answered. */
    start() {
      for (const ms of SYNC_DELAYS_MS) {
        timers.push(setTimeout(() => model.send({ type: "sync" }), ms));
      }
      if (reachMs < Infinity) timers.push(setTimeout(() => setReached(false), reachMs));
    },
    send(content, { onReceived = () => {}, onLate = () => {} }) {
      const id = ++sentCount;
      const lateTimer = setTimeout(onLate, ACKNOWLEDGE_MS);
      onAcknowledged.set(id, () => {
        clearTimeout(lateTimer);
        onReceived();
      });
      model.send({ ...content, id });
    },
  };
}

/* Ask the Jupyter server to interrupt the kernel, and return whether it did. This works where a
 * kernel cannot receive messages while a cell is running. */
async function interruptKernel(kernelId) {
  const config = document.querySelector("script#jupyter-config-data")?.textContent;
  // nbclassic keeps the address of the server in the body.
  const base = config ? JSON.parse(config).baseUrl : document.body.dataset.baseUrl;
  const isUuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(kernelId);
  if (!base || !isUuid) return false;
  const root = new URL(base.endsWith("/") ? base : `${base}/`, location.href);
  const url = new URL(`api/kernels/${kernelId}/interrupt`, root);
  if (url.origin !== location.origin) return false;
  const xsrf = document.cookie.match(/(?:^|;\s*)_xsrf=([^;]*)/);
  const headers = xsrf ? { "X-XSRFToken": decodeURIComponent(xsrf[1]) } : {};
  try {
    const response = await fetch(url, {
      method: "POST",
      headers,
      credentials: "same-origin",
      redirect: "error",
    });
    return response.ok;
  } catch {
    return false;
  }
}
