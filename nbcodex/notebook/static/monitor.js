/* The monitor in the page: one feed for each widget (`model` is anywidget's), and any number of
 * views of it.
 *
 * `data` is described in monitor/view.py. Its instants are those of the kernel's clock; `now` and
 * `wall` are the kernel's clocks when it was sent. From its arrival on, the page counts.
 */

const TICK_MS = 250;
const NOTE_MS = 4000; // how long the note about a click is shown
const CONFIRM_MS = 4000; // in which a second click confirms the first one
const DOUBLE_CLICK_MS = 500; // a second click within this time is part of a double click

// The plot, in its own units.
const PLOT_WIDTH = 480;
const PLOT_HEIGHT = 90;
const PLOT_TOP = 12; // below the marks of limits that were reached
const MINUTE_WIDTH = PLOT_WIDTH / 60;

const UNITS = { tokens: "tokens (TPM)", requests: "requests (RPM)" };
const ALL_TITLES = {
  cancel: "End all open requests of this kernel; text so far is kept. Asks for confirmation.",
  park: "Put all open requests of this kernel aside for %codex resume. Asks for confirmation.",
};
const QUEUE_TITLE =
  "A lower bound, not a forecast: what this limit, its cooldown and the requests before it make certain at present.";
const LEGEND =
  "Cancel keeps any text · Retry now, if refused: 1 request, no tokens · Park: for %codex resume";
const NO_REQUESTS = "There are no open requests.";
const BUSY_KERNEL =
  "This kernel processes a button only when its cell has ended. The notebook's own Stop (■) works at once.";

function openFeed(model) {
  const feed = { data: {}, receivedAt: 0, views: new Set(), channel: openChannel(model) };

  function receiveData(isLive) {
    const data = (feed.data = model.get("data"));
    // The kernel's wall clock says how old stored data are, unless the page's clock disagrees with it.
    const age = Date.now() - data.wall;
    const wasStored = !isLive && age > 0 && age < 86_400_000;
    feed.receivedAt = Date.now() - (wasStored ? age : 0);
    feed.views.forEach((each) => each.update());
  }

  /* Return the present by the kernel's clock, in ms. */
  feed.now = () => feed.data.now + Date.now() - feed.receivedAt;
  model.on("change:data", () => receiveData(true));
  receiveData(false);
  feed.channel.start();
  return feed;
}

function formatWait(ms) {
  const seconds = Math.ceil(Math.max(0, ms) / 1000);
  return seconds < 60 ? `${seconds} s` : formatDuration(seconds * 1000);
}

/* Write a data attribute only if it differs: each write makes the browser compute styles anew. */
function setData(node, name, value) {
  if (node.dataset[name] !== String(value)) node.dataset[name] = value;
}

/* `queue.last`: the earliest time at which its last request can be sent; null if that is unknown. */
function queueText(queue, now) {
  if (!queue) return "queue empty";
  const ms = queue.last === null ? 0 : queue.last - now;
  const bound = ms > 0 ? ` · the last for at least ${formatWait(ms)}` : "";
  return `${formatNumber(queue.waiting)} queued for up to ${formatCount(queue.tokens, "token")}${bound}`;
}

/* Return a function that shows a list of items in `parent`, and returns their components: objects
 * with a `node` and an `update`, which `makeComponent` makes. An item keeps its component for as long
 * as it is in the list, so that focus and hover stay where they are. */
function makeList(parent, makeComponent) {
  const components = new Map();
  return (items, keyOf) => {
    const keys = new Set(items.map(keyOf));
    for (const [key, { node }] of components) {
      if (keys.has(key)) continue;
      const hadFocus = node.contains(node.getRootNode().activeElement);
      node.remove();
      components.delete(key);
      // Without this, the focus would fall to the top of the page.
      if (hadFocus) parent.closest("[tabindex]")?.focus({ preventScroll: true });
    }
    items.forEach((item, index) => {
      const key = keyOf(item);
      if (!components.has(key)) components.set(key, makeComponent(item));
      const { node, update } = components.get(key);
      if (parent.children[index] !== node) {
        parent.insertBefore(node, parent.children[index] ?? null);
      }
      update(item);
    });
    return [...components.values()];
  };
}

/* What is left of one limit. At the instant `at`, `left` of `size` were left; from then on it grows
 * by `rate` in each second, until the limit is full. */
function makeReading(feed) {
  const fill = makeNode("i", "gauge-fill");
  const gauge = makeNode("div", "gauge", { "aria-hidden": "true" }, fill);
  const text = makeNode("span", "reading-text");
  const until = makeNode("span", "secondary");
  const node = makeNode("div", "reading", {}, gauge, until, text);
  let reading;
  let width; // of the fill, in percent

  function tick() {
    const seconds = Math.max(0, feed.now() - reading.at) / 1000;
    const left = Math.min(reading.size, reading.left + reading.rate * seconds);
    const percent = Math.max(0, Math.round((1000 * left) / reading.size) / 10);
    if (percent !== width) {
      width = percent;
      fill.style.width = `${percent}%`;
    }
    const unit = UNITS[reading.kind] ?? reading.kind;
    setText(text, `~${formatNumber(Math.max(0, left))} of ${formatNumber(reading.size)} ${unit} left`);
    const fullInMs = (1000 * (reading.size - left)) / reading.rate;
    setText(until, left < reading.size ? `full in ${formatWait(fullInMs)}` : "full");
  }

  function update(item) {
    reading = item;
    tick();
  }

  return { node, tick, update };
}

/* The limits of one model, its cooldown and its queue. */
function makeModelLimits(feed) {
  const modelName = makeNode("strong", "name");
  const server = makeNode("span", "secondary");
  const readings = makeNode("div", "readings");
  const noReadings = makeNode("span", "secondary");
  const cooldown = makeNode("span", "cooldown");
  const queue = makeNode("span", "queue", { title: QUEUE_TITLE });
  const node = makeNode(
    "li",
    "model-limits",
    {},
    makeNode("div", "model-name", {}, modelName, server),
    makeNode("div", "model-readings", {}, readings, noReadings),
    makeNode("div", "model-state", {}, cooldown, queue),
  );
  const listReadings = makeList(readings, () => makeReading(feed));
  let limits;
  let shownReadings = [];

  function tick() {
    const left = limits.closed_until === null ? 0 : limits.closed_until - feed.now();
    const why = limits.why && ` · ${limits.why}`;
    setData(node, "closed", left > 0);
    setText(cooldown, left > 0 ? `closed for ${formatWait(left)}${why}` : "open");
    setText(queue, queueText(limits.queue, feed.now()));
    shownReadings.forEach((reading) => reading.tick());
  }

  function update(item) {
    limits = item;
    setText(modelName, item.model);
    setText(server, `at ${item.server}`);
    setText(noReadings, item.readings.length ? "" : "The server's answers state no limits.");
    shownReadings = listReadings(item.readings, (reading) => reading.kind);
    tick();
  }

  return { node, update, tick };
}

/* One open request, with its countdown and its buttons. `due` is the end of its wait, null if it does
 * not wait; `since` is the beginning of its phase. */
function makeRequestRow(feed, press, id) {
  const iconPath = makeSvg("path", {});
  const icon = makeSvg(
    "svg",
    { viewBox: "0 0 16 16", class: "nbcodex-icon", "aria-hidden": "true" },
    iconPath,
  );
  const [phase, time, used, prompt, why] = ["phase", "time", "used", "prompt", "why"].map((name) =>
    makeNode("span", `row-${name}`),
  );
  used.title = "Tokens of this attempt: in the prompt, and of the answer so far";
  let request;
  const buttons = Object.entries(BUTTONS).map(([action, { label }]) => {
    const attributes = { ...OWN_KEYS, type: "button", "aria-label": `${label} ${shortId(id)}` };
    const node = makeNode("button", "button", attributes, label);
    node.addEventListener("click", () => press(action, id, request.disabled[action]));
    return [action, node];
  });
  const node = makeNode(
    "li",
    "row",
    {},
    icon,
    makeNode("code", "id", { title: id }, shortId(id)),
    phase,
    time,
    prompt,
    makeNode("span", "row-details", {}, used, why),
    makeNode("span", "row-buttons", {}, ...buttons.map(([, button]) => button)),
  );

  function timeText() {
    if (request.due === null) return `for ${formatWait(feed.now() - request.since)}`;
    const left = request.due - feed.now();
    if (left <= 0) return request.phase === "queued" ? "soon" : "due now";
    // In a cooldown others may be sent first; in the queue the moment is an estimate.
    const before = { cooldown: "after ", queued: "in ~" }[request.phase] ?? "in ";
    return before + formatWait(left);
  }

  const tick = () => setText(time, timeText());

  function update(item) {
    request = item;
    const [label, description] = PHASES[item.phase] ?? [item.phase, ""];
    if (node.dataset.phase !== item.phase) {
      node.dataset.phase = item.phase;
      iconPath.setAttribute("d", ICONS[item.phase] ?? CLOCK_ICON);
      phase.title = description;
    }
    setData(node, "waits", item.due !== null);
    setText(phase, label);
    setText(prompt, item.prompt);
    prompt.title = item.prompt;
    setText(why, item.why);
    why.title = item.details;
    const attempt = item.attempt > 1 && `attempt ${item.attempt}`;
    setText(used, [attempt, item.tokens].filter(Boolean).join(" · "));
    for (const [action, button] of buttons) {
      const disabled = item.disabled[action];
      button.title = buttonTitle(action, id, disabled);
      button.setAttribute("aria-disabled", String(Boolean(disabled)));
    }
    tick();
  }

  return { node, update, tick };
}

/* A button for all open requests. The first click asks for confirmation, the second one confirms;
 * a double click and a key that is held down do not. */
function makeAllButton(action, press) {
  const label = `${BUTTONS[action].label} all`;
  const node = makeNode("button", "button", { ...OWN_KEYS, type: "button" }, label);
  let confirmTimer;
  let askedAt;
  let open = 0;

  const updateLabel = () => setText(node, confirmTimer ? `${label} ${formatNumber(open)}?` : label);
  function stopAsking() {
    clearTimeout(confirmTimer);
    confirmTimer = undefined;
    updateLabel();
  }

  node.addEventListener("keydown", (event) => event.repeat && event.preventDefault());
  node.addEventListener("click", (event) => {
    if (!open) {
      press(action, "all", NO_REQUESTS);
    } else if (!confirmTimer) {
      askedAt = event.timeStamp;
      confirmTimer = setTimeout(stopAsking, CONFIRM_MS);
      updateLabel();
    } else if (event.timeStamp - askedAt >= DOUBLE_CLICK_MS) {
      stopAsking();
      press(action, "all", "");
    }
  });

  function update(count) {
    // With many requests, the number keeps changing while the button asks for confirmation.
    open = count;
    node.title = open ? ALL_TITLES[action] : `${label} is not possible now. ${NO_REQUESTS}`;
    node.setAttribute("aria-disabled", String(!open));
    if (open) updateLabel();
    else stopAsking();
  }

  return { node, update };
}

/* Tokens in each minute of the last hour. A triangle marks a minute in which a limit was reached. */
function makePlot() {
  const bars = makeSvg("path", { class: "nbcodex-bars" });
  const hits = makeSvg("path", { class: "nbcodex-hits" });
  const lines = [PLOT_TOP, (PLOT_TOP + PLOT_HEIGHT) / 2, PLOT_HEIGHT];
  const grid = makeSvg("path", {
    class: "nbcodex-grid",
    d: lines.map((y) => `M0 ${y}H${PLOT_WIDTH}`).join(""),
  });
  const picture = makeSvg(
    "svg",
    { viewBox: `0 0 ${PLOT_WIDTH} ${PLOT_HEIGHT}`, role: "img", preserveAspectRatio: "none" },
    grid,
    bars,
    hits,
  );
  const peak = makeNode("span", "peak");
  const hitCount = makeNode("span", "key-hit");
  const axis = makeNode(
    "div",
    "axis",
    { "aria-hidden": "true" },
    makeNode("span", "", {}, "1 h ago"),
    hitCount,
    makeNode("span", "", {}, "now"),
  );
  const caption = makeNode("figcaption", "caption", {}, "Tokens per minute", peak);
  const node = makeNode("figure", "plot", {}, caption, picture, axis);

  /* `minutes`: of each minute, the tokens and how often a limit was reached. `hour`: a summary. */
  function update({ minutes, hour }) {
    const top = Math.max(1, ...minutes.map(([tokens]) => tokens));
    const totalHits = minutes.reduce((sum, [, count]) => sum + count, 0);
    let barPath = "";
    let hitPath = "";
    minutes.forEach(([tokens, count], index) => {
      const x = index * MINUTE_WIDTH;
      const height = (((PLOT_HEIGHT - PLOT_TOP) * tokens) / top).toFixed(1);
      if (tokens) barPath += `M${x + 1} ${PLOT_HEIGHT}v-${height}h${MINUTE_WIDTH - 2}v${height}z`;
      if (count) hitPath += `M${x} 1h${MINUTE_WIDTH}l${-MINUTE_WIDTH / 2} 8z`;
    });
    bars.setAttribute("d", barPath);
    hits.setAttribute("d", hitPath);
    picture.setAttribute("aria-label", hour);
    setText(peak, top > 1 ? `most: ${formatNumber(top)}` : "none so far");
    setText(hitCount, totalHits ? `▼ limit reached (${formatNumber(totalHits)})` : "no limit reached");
  }

  return { node, update };
}

function makeTotals() {
  // A table has these roles by itself, but loses them where the style changes its display.
  const makeCell = (tag, role, text, attributes = {}) =>
    makeNode(tag, "", { role, ...attributes }, text);
  const makeRow = (...cells) => makeNode("tr", "", { role: "row" }, ...cells);
  const head = makeNode("thead", "", { role: "rowgroup" });
  const body = makeNode("tbody", "", { role: "rowgroup" });
  const table = makeNode("table", "totals", { role: "table" }, head, body);
  let shown = "";

  /* `totals`: rows of a heading and a text for each of `columns`. */
  function update({ columns, totals }) {
    const json = JSON.stringify(totals);
    if (json === shown) return;
    shown = json;
    head.replaceChildren(
      makeRow(
        makeCell("td", "cell", ""),
        ...columns.map((name) => makeCell("th", "columnheader", name, { scope: "col" })),
      ),
    );
    const rows = totals.map(([name, ...figures]) =>
      makeRow(
        makeCell("th", "rowheader", name, { scope: "row" }),
        ...figures.map((figure) => makeCell("td", "cell", figure || "–")),
      ),
    );
    body.replaceChildren(...rows);
  }

  return { node: makeScrollArea("Totals", table), update };
}

/* An area that scrolls must be reachable by keyboard, and have a name. */
function makeScrollArea(label, ...children) {
  const attributes = { ...OWN_KEYS, tabindex: "0", role: "group", "aria-label": label };
  return makeNode("div", "scroll", attributes, ...children);
}

function makeSection(name, caption, ...children) {
  const node = makeNode("div", "caption", {}, ...[caption].flat());
  return makeNode("div", `part nbcodex-part-${name}`, {}, node, ...children);
}

function openView(feed, model, el) {
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const spans = ["open", "simulated", "other-kernels", "budget"];
  const [open, simulated, otherKernels, budget] = spans.map((name) => makeNode("span", name));
  const limits = makeNode("ul", "limits");
  const rows = makeNode("ul", "rows");
  const log = makeNode("ol", "entries");
  const [noLimits, noRows, noLog] = [1, 2, 3].map(() => makeNode("p", "empty"));
  const totals = makeTotals();
  const plot = makePlot();
  const allButtons = ["cancel", "park"].map((action) => makeAllButton(action, press));
  const note = makeNode("span", "note", { role: "status", hidden: "" });
  const live = makeNode("div", "live", { "aria-live": "polite" }); // for screen readers only
  const openCaption = [
    "Open requests",
    makeNode("span", "message", {}, note, makeNode("span", "legend", {}, LEGEND)),
    makeNode("span", "row-buttons", {}, ...allButtons.map(({ node }) => node)),
  ];
  const root = makeNode(
    "div",
    "monitor",
    { role: "group", "aria-label": "Codex monitor" },
    makeNode(
      "div",
      "top",
      {},
      makeNode("strong", "heading", {}, "Codex monitor"),
      open,
      makeNode("i", "line-break"),
      simulated,
      otherKernels,
      budget,
    ),
    makeSection("limits", "Limits", limits, noLimits),
    makeNode("div", "side-by-side", {}, makeSection("totals", "Used", totals.node), plot.node),
    makeSection("open", openCaption, makeScrollArea("Open requests", rows, noRows)),
    makeSection("log", "Retries", makeScrollArea("Retries", log, noLog)),
    live,
  );
  const listLimits = makeList(limits, () => makeModelLimits(feed));
  const listRows = makeList(rows, (request) => makeRequestRow(feed, press, request.id));
  const listLog = makeList(log, ([time, id, message]) => ({
    node: makeNode(
      "li",
      "entry",
      {},
      makeNode("time", "", {}, time),
      makeNode("code", "id", { title: id }, shortId(id)),
      makeNode("span", "", {}, message),
    ),
    update() {},
  }));
  let ticking = []; // the components that show times
  let announced = "";
  let noteTimer;

  function showNote(text, ms) {
    clearTimeout(noteTimer);
    setText(note, text);
    if (ms) noteTimer = setTimeout(() => setText(note, ""), ms);
  }

  /* `request`: an id, or "all". `disabled`: why the button would do nothing; empty if it does. */
  function press(action, request, disabled) {
    showNote(disabled, NOTE_MS);
    if (disabled) return;
    const what = `${BUTTONS[action].label} ${shortId(request)}`;
    feed.channel.send(
      { type: "action", name: action, request },
      {
        onReceived: () => showNote(`${what}: received.`, NOTE_MS),
        onLate: () => showNote(BUSY_KERNEL),
      },
    );
  }

  function update() {
    const data = feed.data;
    const waiting = data.phases.waiting ?? 0;
    const inCooldown = data.phases.cooldown ?? 0;
    const counts = [
      data.open ? formatCount(data.open, "open request") : "no open requests",
      waiting && `${formatNumber(waiting)} waiting to retry`,
      inCooldown && `${formatNumber(inCooldown)} in cooldown`,
    ];
    setText(open, counts.filter(Boolean).join(" · "));
    setText(simulated, data.simulated && "simulated: nothing is charged");
    setText(otherKernels, data.other_kernels && `other kernels: ${data.other_kernels}`);
    setText(budget, data.budget && `budget: ${data.budget}`);
    ticking = [
      ...listLimits(data.limits, (each) => `${each.model} ${each.server}`),
      ...listRows(data.requests, (request) => request.id),
    ];
    // All ids get the width of the longest, so that what follows them stands in columns.
    const idWidth = Math.max(8, ...data.requests.map(({ id }) => shortId(id).length));
    rows.style.setProperty("--id-chars", idWidth);
    allButtons.forEach((button) => button.update(data.open));
    listLog([...data.log].reverse(), (entry) => entry.join(" "));
    setText(noLimits, data.limits.length ? "" : "No answer has stated any limits yet.");
    const hidden = data.open - data.requests.length;
    setText(noRows, hidden > 0 ? `and ${formatNumber(hidden)} more` : data.open ? "" : NO_REQUESTS);
    setText(noLog, data.log.length ? "" : "No attempt has been refused.");
    totals.update(data);
    plot.update(data);
    // A screen reader announces only that waiting begins or ends, not each change of the numbers.
    const state = data.open ? "requests are open" : "no requests are open";
    const announcement = `${state}${waiting + inCooldown ? ", some wait" : ""}`;
    if (announcement !== announced) setText(live, (announced = announcement));
  }

  el.append(root);
  update();
  const view = { update };
  feed.views.add(view);
  const tick = () => document.hidden || ticking.forEach((component) => component.tick());
  const timer = setInterval(tick, reducedMotion ? 1000 : TICK_MS);
  return () => {
    clearInterval(timer);
    feed.views.delete(view);
  };
}

export default () => {
  let feed;
  return {
    initialize({ model }) {
      feed = openFeed(model);
    },
    render: ({ model, el }) => openView(feed, model, el),
  };
};
