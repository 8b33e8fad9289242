/* The panel of a request in the page: one feed for each widget (`model` is anywidget's), and any
 * number of views of it.
 *
 * Python sends the remaining and the elapsed time. From then on the page counts, by its monotonic
 * clock, which no user can set. `data` and the text messages are described in widget_views.py.
 */

// If the page's clock and the wall clock drift apart by this much, one of them was set, or the
// machine slept.
const CLOCK_DRIFT_MS = 1000;
// Within this time Python answers, if it can receive messages while its cell runs.
const REACH_MS = 2000;
// Of a longer answer, only the end is shown. The same as MAX_LIVE_CHARS in Python.
const MAX_CHARS = 400_000;
// The log begins a new block after this many characters: the browser lays out only the last one anew.
const BLOCK_CHARS = 4000;
// The log counts as scrolled to its end if no more than this is left.
const END_TOLERANCE_PX = 12;

const RUNNING_PHASES = new Set(["sending", "thinking", "streaming"]);
const BUSY_KERNEL = "This kernel cannot process buttons while a cell is running.";

const now = () => performance.now();

/* The state of a request, as far as this page has received it. It updates its views, and keeps the
 * text for views that are opened later. */
function openFeed(model) {
  const feed = {
    data: {},
    text: "",
    seq: 0, // the number of the last text
    receivedAt: 0, // when the times in `data` were right
    dueAt: null, // when the countdown ends; null: there is none
    reached: null, // whether Python receives messages now; null: not known yet
    views: new Set(),
  };
  const updateViews = () => feed.views.forEach((view) => view.update());
  let syncedAt = -Infinity;
  let clockOffset = Date.now() - now(); // of the wall clock from the monotonic one

  feed.channel = openChannel(model, {
    reachMs: REACH_MS,
    onReached: (reached) => {
      feed.reached = reached;
      updateViews();
    },
  });

  function requestSync() {
    if (now() - syncedAt < ACKNOWLEDGE_MS) return;
    syncedAt = now();
    model.send({ type: "sync" });
  }

  /* The page's clock stands still while the machine sleeps; the kernel knows what time is left. */
  feed.checkClocks = () => {
    const before = clockOffset;
    clockOffset = Date.now() - now();
    if (Math.abs(clockOffset - before) > CLOCK_DRIFT_MS) requestSync();
  };

  function receiveText({ seq, text, whole, changes }) {
    // A number is missing: the server drops messages when there are too many.
    if (!whole && seq !== feed.seq + 1) return requestSync();
    feed.text = (whole ? text : feed.text + text).slice(-MAX_CHARS);
    feed.seq = seq;
    feed.views.forEach((view) => view.addText({ text, whole }));
    if (!changes) return;
    feed.data = { ...feed.data, ...changes };
    updateViews();
  }

  function receiveData(isLive) {
    const data = (feed.data = model.get("data"));
    if (data.phase === "ended") feed.text = ""; // no view shows it now
    const waits = data.remaining_ms !== null;
    // The times in data that have just arrived are right now, whatever the kernel's clock says. Those
    // of stored data are older. Their age is what they say is left, minus what is left until its
    // deadline by the page's clock. If that is not a possible age, the clocks of kernel and page differ,
    // and the stored times are used as they are.
    const left = data.deadline_ms - Date.now();
    const wasStored = !isLive && waits && left > 0 && left < data.remaining_ms;
    feed.receivedAt = now() - (wasStored ? data.remaining_ms - left : 0);
    feed.dueAt = waits ? feed.receivedAt + data.remaining_ms : null;
    updateViews();
    if (data.seq > feed.seq) requestSync();
  }

  model.on("msg:custom", (message) => message.type === "text" && receiveText(message));
  model.on("change:data", () => receiveData(true));
  receiveData(false);
  feed.channel.start();
  return feed;
}

/* The number and the unit that stand in the ring. */
function countdownText(ms, reducedMotion) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 9.95 && !reducedMotion) return [seconds.toFixed(1), "s left"];
  const whole = Math.ceil(seconds);
  if (whole < 60) return [String(whole), "s left"];
  if (whole < 3600) return [`${Math.floor(whole / 60)}:${twoDigits(whole % 60)}`, "min left"];
  return [
    `${Math.floor(whole / 3600)}:${twoDigits(Math.floor((whole % 3600) / 60))}`,
    "h left",
  ];
}

/* How full the limit is, and how much of this request does not fit. `keys` are the legend. */
function makeMeter() {
  const names = ["used", "requested", "limit"];
  const [used, requested, limitMark] = names.map((name) => makeNode("i", `meter-${name}`));
  const labels = names.map((name) => makeNode("span", `key nbcodex-key-${name}`));
  const excess = makeNode("strong", "excess");
  const bar = makeNode("div", "meter", { "aria-hidden": "true" }, used, requested, limitMark);
  const keys = makeNode("div", "keys", {}, ...labels, excess);
  const node = makeNode("div", "usage", {}, bar, keys);

  /* `isOwn`: this request was refused. Otherwise it waits because another one was. */
  function update(cause, isOwn) {
    const numbers = [cause.limit, cause.used, cause.requested];
    node.hidden = !numbers.every((n) => Number.isFinite(n) && n >= 0) || !cause.limit;
    if (node.hidden) return false;
    const sum = cause.used + cause.requested;
    const barSize = Math.max(cause.limit, sum);
    used.style.width = `${(100 * cause.used) / barSize}%`;
    requested.style.width = `${(100 * cause.requested) / barSize}%`;
    limitMark.style.left = `${(100 * cause.limit) / barSize}%`;
    const whose = isOwn ? "this" : "that";
    const meaning = cause.resource === "tokens" ? " (prompt + the output it may use)" : "";
    setText(labels[0], `used ${formatNumber(cause.used)}`);
    setText(labels[1], `${whose} request ${formatNumber(cause.requested)}${meaning}`);
    setText(labels[2], `limit ${formatNumber(cause.limit)}`);
    const over = isOwn && sum > cause.limit ? formatNumber(sum - cause.limit) : "";
    setText(excess, over && `${over} too many when it was sent`);
    return true;
  }

  return { node, update };
}

/* The countdown of a wait: `left` and `total` are in ms. */
function makeRing() {
  const circle = { cx: 40, cy: 40, r: 35, pathLength: 100 };
  const arc = makeSvg("circle", { ...circle, class: "nbcodex-arc" });
  // The wedge shows what is left of the wait, as on a kitchen timer; so does the arc around it.
  const wedge = makeSvg("circle", { ...circle, r: 15, class: "nbcodex-wedge" });
  const hand = makeSvg("path", { class: "nbcodex-hand", d: "M62 40H76" });
  const number = makeNode("span", "number");
  const unit = makeNode("span", "unit");
  const timer = makeNode("div", "timer", { role: "timer", "aria-live": "off" }, number, unit);
  const picture = makeSvg(
    "svg",
    { viewBox: "0 0 80 80", "aria-hidden": "true" },
    makeSvg("circle", { ...circle, class: "nbcodex-track" }),
    wedge,
    arc,
    hand,
  );

  function update(left, total, reducedMotion) {
    const [value, name] = left > 0 ? countdownText(left, reducedMotion) : ["now", "due"];
    setText(number, value);
    setText(unit, name);
    const share = Math.min(1, Math.max(0, left / (total || 1)));
    for (const shape of [arc, wedge]) shape.style.strokeDashoffset = 100 - 100 * share;
    hand.style.transform = `rotate(${360 * share}deg)`;
  }

  return { node: makeNode("div", "ring", {}, picture, timer), update };
}

/* The answer so far. It scrolls with its end unless the reader has scrolled up. */
function makeLog() {
  const node = makeNode("div", "log", {
    ...OWN_KEYS,
    tabindex: "0",
    role: "group",
    "aria-label": "Answer so far",
  });
  let block;
  let blockChars;

  function beginBlock(text) {
    block = makeNode("div", "", {}, text);
    blockChars = text.length;
    node.append(block);
  }

  function addText({ text, whole }) {
    const isAtEnd = node.scrollTop + node.clientHeight >= node.scrollHeight - END_TOLERANCE_PX;
    if (whole) {
      node.replaceChildren();
      beginBlock("");
      node.hidden = !text;
    }
    const end = blockChars > BLOCK_CHARS ? text.indexOf("\n") : -1;
    block.append(end < 0 ? text : text.slice(0, end));
    blockChars += text.length;
    if (end >= 0) beginBlock(text.slice(end + 1));
    while (node.children.length > MAX_CHARS / BLOCK_CHARS) node.firstChild.remove();
    if (text) node.hidden = false;
    if (isAtEnd) node.scrollTop = node.scrollHeight;
  }

  addText({ text: "", whole: true });
  return { node, addText };
}

/* A button that stays focusable while it would do nothing; a click then shows the reason. */
function makeButton(action, press) {
  const { label, pressedLabel, hint, hintWhileRunning } = BUTTONS[action];
  const labelNode = makeNode("span", "label", {}, label);
  const hintNode = makeNode("small", "button-hint", { "aria-hidden": "true" });
  const attributes = { ...OWN_KEYS, type: "button", "aria-label": label };
  const node = makeNode("button", "button", attributes, labelNode, hintNode);
  let disabled = ""; // why a click would do nothing
  node.addEventListener("click", () => press(action, disabled));

  function update({ reason, shortReason, isPressed, isRunning, id }) {
    disabled = reason;
    const usualHint = (isRunning && hintWhileRunning) || hint;
    setText(labelNode, isPressed ? pressedLabel : label);
    setText(hintNode, reason ? shortReason : usualHint.replace("ID", shortId(id)));
    node.title = buttonTitle(action, id, reason);
    node.setAttribute("aria-disabled", String(Boolean(reason || isPressed)));
  }

  return { node, update };
}

/* Whether the limit is used up, or has too little room left for this request. */
function causeText(cause) {
  if (!cause?.name) return "waiting";
  if (!("limit" in cause)) return cause.name;
  const { limit, used, requested } = cause;
  const hasRoom = used < limit && used + requested > limit;
  return `${hasRoom ? "would exceed the limit" : "limit reached"}: ${cause.name}`;
}

function openView(feed, model, el) {
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const iconPath = makeSvg("path", {});
  const icon = makeSvg(
    "svg",
    { viewBox: "0 0 16 16", class: "nbcodex-icon", "aria-hidden": "true" },
    iconPath,
  );
  const title = makeNode("strong", "title");
  const modelName = makeNode("span", "model");
  const attempt = makeNode("span", "attempt");
  const buttonRow = makeNode("span", "buttons");
  const [ring, meter, log] = [makeRing(), makeMeter(), makeLog()];
  const cause = makeNode("strong", "cause");
  const limitFigures = makeNode("div", "figures");
  const next = makeNode("div", "next"); // when the request will be sent
  const why = makeNode("div", "why", {}, cause, meter.node, limitFigures, next);
  const wait = makeNode("div", "wait", {}, ring.node, why);
  const hint = makeNode("div", "hint"); // what is going on, where nothing else shows it
  const facts = Object.fromEntries(
    ["in", "out", "speed", "cost", "time", "waited"].map((key) => [key, makeNode("span", key)]),
  );
  const body = makeNode("div", "body", {}, wait, hint, log.node);
  const foot = makeNode("div", "foot", {}, ...Object.values(facts));
  const note = makeNode("div", "note", { role: "status", hidden: "" }); // the result of a click
  const live = makeNode("div", "live", { "aria-live": "polite" }); // for screen readers only
  const root = makeNode(
    "div",
    "panel",
    { role: "group", "aria-label": "Codex request" },
    makeNode("div", "head", {}, icon, title, modelName, attempt, buttonRow),
    body,
    foot,
    note,
    live,
  );
  const buttons = new Map();
  let phase = null;
  let pressed = null;
  let isRemoved = false;
  let width = 0;

  /* `disabled`: why the button would do nothing; empty if it would do something. */
  function press(action, disabled) {
    if (pressed === action) return;
    setText(note, disabled);
    if (disabled) return;
    pressed = action;
    feed.channel.send({ type: "action", name: action }, { onLate: () => notReceived(action) });
    update();
  }

  async function notReceived(action) {
    if (isRemoved) return;
    // An interrupt ends the cell as Cancel does. Retry now and Park have no such way.
    if (action === "cancel" && (await interruptKernel(model.get("kernel_id")))) return;
    pressed = null;
    setText(note, `${BUSY_KERNEL} Use the notebook's own Stop (■).`);
    update();
  }

  function update() {
    const data = feed.data;
    const [label, description] = PHASES[data.phase] ?? [data.phase, ""];
    if (phase !== data.phase) {
      phase = data.phase;
      pressed = null;
      root.dataset.phase = phase;
      iconPath.setAttribute("d", ICONS[phase] ?? CLOCK_ICON);
      setText(title, label);
      title.title = description;
      // A screen reader announces new phases only, not each tick.
      setText(live, data.line);
    }
    // Of a request that has ended, only a line says where its answer is.
    const isEnded = phase === "ended";
    for (const node of [buttonRow, body, foot]) node.hidden = isEnded;
    if (isEnded) setText(note, data.line);
    setText(modelName, data.model);
    setText(attempt, data.attempt > 1 ? `attempt ${data.attempt}` : "");
    updateButtons(data);
    updateWait(data);
    root.dataset.stale = data.stale;
    const stale = data.stale && "The text below is incomplete; the next attempt replaces it.";
    const isEmpty = wait.hidden && log.node.hidden;
    setText(hint, stale || data.reasoning || (isEmpty ? description : ""));
    setText(facts.in, data.tokens_in && `${data.tokens_in} tokens in the prompt`);
    setText(facts.out, data.tokens_out && `${data.tokens_out} tokens of answer`);
    setText(facts.speed, data.speed && `${data.speed} tokens/s`);
    setText(facts.cost, data.cost);
    tick();
    keepHeight();
  }

  /* Never let the panel become lower, so that the page below it does not move up and down with the
   * phases. If the page's width changes, the height is found anew. */
  function keepHeight() {
    if (width !== body.offsetWidth) body.style.minHeight = "";
    width = body.offsetWidth;
    const before = parseFloat(body.style.minHeight) || 0;
    body.style.minHeight = `${Math.max(before, body.offsetHeight)}px`;
  }

  function updateButtons(data) {
    for (const { name, disabled } of data.actions) {
      if (!buttons.has(name)) {
        buttons.set(name, makeButton(name, press));
        buttonRow.append(buttons.get(name).node);
      }
      const isUnreachable = name !== "cancel" && feed.reached === false;
      buttons.get(name).update({
        reason: isUnreachable ? BUSY_KERNEL : disabled,
        shortReason: isUnreachable ? "not while a cell runs" : "it is not waiting",
        isPressed: pressed === name,
        isRunning: RUNNING_PHASES.has(data.phase),
        id: data.id,
      });
    }
  }

  function updateWait(data) {
    wait.hidden = !data.cause && feed.dueAt === null;
    ring.node.hidden = feed.dueAt === null;
    if (wait.hidden) return;
    setText(cause, causeText(data.cause));
    const isDrawn = meter.update(data.cause ?? {}, data.phase !== "cooldown");
    setText(limitFigures, isDrawn ? "" : (data.cause?.figures ?? ""));
    // A refused request is sent at that moment. In a cooldown it is not sent before; in the queue the
    // moment is an estimate.
    const announcements = {
      waiting: `Attempt ${data.attempt + 1} starts by itself at`,
      cooldown: "Reached earlier; this request is sent in its turn, not before",
    };
    const announcement = announcements[data.phase] ?? "It is sent by itself at about";
    setText(next, feed.dueAt === null ? "" : `${announcement} ${data.until}.`);
  }

  function tick() {
    const data = feed.data;
    const age = now() - feed.receivedAt;
    if (feed.dueAt !== null) ring.update(feed.dueAt - now(), data.total_ms, reducedMotion);
    const elapsed = data.elapsed_ms + age;
    const waited = data.waited_ms + (data.waits ? age : 0);
    // As long as the request has only waited, the total time would be the same number again.
    const onlyWaited = waited > 0 && elapsed - waited < 1000;
    setText(facts.time, onlyWaited ? "" : `${formatDuration(elapsed)} in all`);
    setText(facts.waited, waited > 0 ? `waited ${formatDuration(waited)} of ${data.patience}` : "");
  }

  log.addText({ text: feed.text, whole: true });
  el.append(root);
  update();
  const view = { update, addText: log.addText };
  feed.views.add(view);
  const timer = setInterval(
    () => {
      feed.checkClocks();
      tick();
    },
    reducedMotion ? 1000 : 100,
  );
  const observer = new ResizeObserver(() => width === body.offsetWidth || keepHeight());
  observer.observe(body);
  return () => {
    isRemoved = true;
    clearInterval(timer);
    observer.disconnect();
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
