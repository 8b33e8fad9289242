/* The browser's side of a request's panel: one feed per model, any number of views on it.
 *
 * Everything in `view` and in the text comes from a server or a model: it is put in as text, never
 * as markup. Times count down here, by the page's own clock, which nobody can set.
 */

const PARTED_MS = 1000; // between the page's clock and the wall's: one was set, or the machine slept
const REACH_MS = 2000; // for Python to answer at all while its cell runs
const MOST = 400_000; // characters of its end that a long answer is shown with
const BLOCK = 4000; // characters after which the log begins a new block: layout stays cheap
const BEGUN = new Set(["sending", "thinking", "streaming"]); // an attempt is under way
const DEAF = "This kernel hears no button while a cell runs.";

const now = () => performance.now();

/* What the model's messages add up to. Views subscribe; the text outlives each of them. */
function openFeed(model) {
  const feed = {
    view: {}, text: "", seq: 0, born: 0, due: null, reached: null, clicks: 0,
    views: new Set(), acks: new Map(),
  };
  const tell = (what, detail) => feed.views.forEach((view) => view[what](detail));
  let asked = -Infinity, apart = Date.now() - now();

  function askForAll() {
    if (now() - asked < GRACE_MS) return;
    asked = now();
    model.send({ type: "sync" });
  }

  /* The page's clock stands still in sleep, and the wall's can be set: where they part, the kernel
   * knows how long it still is. */
  feed.checkClocks = () => {
    const before = apart;
    apart = Date.now() - now();
    if (Math.abs(apart - before) > PARTED_MS && !feed.view.ended) askForAll();
  };

  function hearText({ seq, text, whole, news }) {
    if (!whole && seq !== feed.seq + 1) return askForAll();
    feed.text = (whole ? text : feed.text + text).slice(-MOST);
    feed.seq = seq;
    tell("addText", { text, whole });
    if (!news) return;
    feed.view = { ...feed.view, ...news };
    tell("show");
  }

  function hear(message) {
    if (message.type === "text") return hearText(message);
    if (message.type !== "heard") return;
    knocks.forEach(clearTimeout);
    feed.acks.get(message.id)?.();
    if (feed.reached !== true) {
      feed.reached = true;
      tell("show");
    }
  }

  function look(live) {
    const view = (feed.view = model.get("view"));
    const waits = view.remaining_ms !== null;
    // What arrives now is true now, whatever the kernel's clock says. What was stored is older by
    // that clock, unless it and ours disagree beyond belief.
    const left = view.deadline_ms - Date.now();
    const stored = !live && waits && left > 0 && left < view.remaining_ms;
    feed.born = now() - (stored ? view.remaining_ms - left : 0);
    feed.due = waits ? feed.born + view.remaining_ms : null;
    tell("show");
    if (view.seq > feed.seq) askForAll();
  }

  model.on("msg:custom", hear);
  model.on("change:view", () => look(true));
  look(false);
  const knocks = KNOCKS_MS.map((ms) => setTimeout(() => model.send({ type: "sync" }), ms));
  knocks.push(setTimeout(() => {
    feed.reached = false;
    tell("show");
  }, REACH_MS));
  return feed;
}

/* The countdown's digits and their unit, as they stand in the ring. */
function digits(ms, calm) {
  const s = Math.max(0, ms) / 1000;
  if (s < 9.95 && !calm) return [s.toFixed(1), "s left"];
  const whole = Math.ceil(s), two = (n) => String(n).padStart(2, "0");
  if (whole < 60) return [String(whole), "s left"];
  if (whole < 3600) return [`${Math.floor(whole / 60)}:${two(whole % 60)}`, "min left"];
  return [`${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}`, "h left"];
}

/* How full the server's bucket is, and how much of this request does not fit. */
function makeMeter() {
  const parts = ["used", "asked", "mark"].map((name) => make("i", name));
  const bar = make("div", "meter", { "aria-hidden": "true" }, ...parts);
  const words = ["used", "asked", "mark"].map((name) => make("span", `key nbcodex-key-${name}`));
  const over = make("strong", "over");
  const node = make("div", "fill", {}, bar, make("div", "keys", {}, ...words, over));
  const show = ({ resource, limit, used, requested }, ours) => {
    node.hidden = ![limit, used, requested].every((n) => Number.isFinite(n) && n >= 0) || !limit;
    if (node.hidden) return false;
    const full = Math.max(limit, used + requested);
    const n = (value) => Math.round(value).toLocaleString("en-US");
    parts[0].style.width = `${(100 * used) / full}%`;
    parts[1].style.width = `${(100 * requested) / full}%`;
    parts[2].style.left = `${(100 * limit) / full}%`;
    put(words[0], `used ${n(used)}`);
    const reserve = resource === "tokens" ? " (prompt + the output it may use)" : "";
    put(words[1], `${ours ? "this" : "that"} request ${n(requested)}${reserve}`);
    put(words[2], `limit ${n(limit)}`);
    put(over, ours && used + requested > limit ? `${n(used + requested - limit)} too many when it was asked` : "");
    return true;
  };
  return { node, show };
}

/* What a limit did: it may have room, and only too little for the request. */
function met(cause) {
  if (!cause || !("limit" in cause)) return "";
  const { limit, used, requested } = cause;
  return used < limit && used + requested > limit ? "would exceed the limit: " : "limit reached: ";
}

function makeRing() {
  const circle = { cx: 40, cy: 40, r: 35, pathLength: 100 };
  const arc = draw("circle", { ...circle, class: "nbcodex-arc" });
  // A wedge, as on a kitchen timer: what is left of the wait, never what is done of it.
  const wedge = draw("circle", { ...circle, r: 15, class: "nbcodex-wedge" });
  const hand = draw("path", { class: "nbcodex-hand", d: "M62 40H76" });
  const number = make("span", "number"), unit = make("span", "unit");
  const timer = make("div", "timer", { role: "timer", "aria-live": "off" }, number, unit);
  const picture = draw(
    "svg", { viewBox: "0 0 80 80", "aria-hidden": "true" },
    draw("circle", { ...circle, class: "nbcodex-track" }), wedge, arc, hand,
  );
  return {
    node: make("div", "ring", {}, picture, timer),
    show(left, total, calm) {
      const [value, name] = left > 0 ? digits(left, calm) : ["now", "due"];
      put(number, value);
      put(unit, name);
      const share = Math.min(1, Math.max(0, left / (total || 1)));
      for (const part of [arc, wedge]) part.style.strokeDashoffset = 100 - 100 * share;
      hand.style.transform = `rotate(${360 * share}deg)`;
    },
  };
}

/* The answer so far: it follows its end unless the reader has scrolled up. */
function makeLog() {
  const node = make("div", "log", {
    ...OWN_KEYS, tabindex: "0", role: "group", "aria-label": "Answer so far",
  });
  let block, size;
  const begin = (text) => {
    node.append((block = make("div", "", {}, text)));
    size = text.length;
  };
  function add({ text, whole }) {
    const follows = node.scrollTop + node.clientHeight >= node.scrollHeight - 12;
    if (whole) {
      node.replaceChildren();
      begin("");
      node.hidden = !text;
    }
    const end = size > BLOCK ? text.indexOf("\n") : -1;
    block.append(end < 0 ? text : text.slice(0, end));
    size += text.length;
    if (end >= 0) begin(text.slice(end + 1));
    while (node.children.length > MOST / BLOCK) node.firstChild.remove();
    if (text) node.hidden = false;
    if (follows) node.scrollTop = node.scrollHeight;
  }
  add({ text: "", whole: true });
  return { node, add };
}

/* One button, which can always be reached: where it would do nothing, it says why. */
function makeButton(name, press) {
  const [label, busy, hint, , midway] = BUTTONS[name];
  const [words, gloss] = [make("span", "label", {}, label), make("small", "gloss", { "aria-hidden": "true" })];
  const node = make("button", "button", { ...OWN_KEYS, type: "button", "aria-label": label }, words, gloss);
  let refusal = "";
  node.addEventListener("click", () => press(name, refusal));
  const show = (why, pressed, brief, id, begun) => {
    refusal = why;
    put(words, pressed ? busy : label);
    put(gloss, why ? brief : (begun && midway || hint).replace("ID", short(id)));
    node.title = why ? `${label} is not possible now. ${why}` : aboutButton(name, id);
    node.setAttribute("aria-disabled", String(Boolean(why || pressed)));
  };
  return { node, show };
}

function openView(feed, model, el) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const path = draw("path", {});
  const icon = draw("svg", { viewBox: "0 0 16 16", class: "nbcodex-icon", "aria-hidden": "true" }, path);
  const [title, name, tries] = [make("strong", "title"), make("span", "model"), make("span", "tries")];
  const buttons = make("span", "buttons");
  const [ring, meter, log] = [makeRing(), makeMeter(), makeLog()];
  const [cause, figures, next] = [make("strong", "cause"), make("div", "figures"), make("div", "next")];
  const wait = make("div", "wait", {}, ring.node, make("div", "why", {}, cause, meter.node, figures, next));
  const hint = make("div", "hint");
  const facts = ["in", "out", "speed", "cost", "time", "waited"].map((key) => make("span", key));
  const body = make("div", "body", {}, wait, hint, log.node);
  const note = make("div", "note", { role: "status", hidden: "" });
  const live = make("div", "live", { "aria-live": "polite" });
  const root = make(
    "div", "panel", { role: "group", "aria-label": "Codex request" },
    make("div", "head", {}, icon, title, name, tries, buttons),
    body, make("div", "foot", {}, ...facts), note, live,
  );
  const shown = new Map();
  let phase = null, pressed = null, gone = false, width = 0;

  function press(action, refusal) {
    if (pressed === action) return;
    put(note, refusal);
    if (refusal) return;
    const id = ++feed.clicks;
    const late = setTimeout(() => unheard(action), GRACE_MS);
    feed.acks.set(id, () => clearTimeout(late));
    pressed = action;
    model.send({ type: "action", name: action, id });
    show();
  }

  async function unheard(action) {
    if (gone || feed.view.ended) return;
    const done = action === "cancel" && (await interrupt(model.get("kernel_id")).catch(() => false));
    if (done) return;
    pressed = null;
    put(note, "This kernel hears no button while this cell runs. Use the notebook's own Stop (■).");
    show();
  }

  function show() {
    const view = feed.view;
    const [label, about] = PHASES[view.phase] ?? [view.phase, ""];
    if (phase !== view.phase) {
      phase = view.phase;
      pressed = null;
      root.dataset.phase = phase;
      path.setAttribute("d", ICONS[phase] ?? CLOCK);
      put(title, label);
      title.title = about;
      put(live, view.line);
    }
    put(name, view.model);
    put(tries, view.attempt > 1 ? `attempt ${view.attempt}` : "");
    showButtons(view);
    showWait(view);
    root.dataset.stale = view.stale;
    const stale = view.stale && "The text below broke off; the next attempt replaces it.";
    put(hint, stale || view.thought || (wait.hidden && log.node.hidden ? about : ""));
    put(facts[0], view.tokens_in && `${view.tokens_in} tokens in the prompt`);
    put(facts[1], view.tokens_out && `${view.tokens_out} tokens of answer`);
    put(facts[2], view.speed && `${view.speed} tokens/s`);
    put(facts[3], view.cost);
    tick();
    keepHeight();
  }

  /* What comes and goes within a request moves nothing below it, until the page itself changes. */
  function keepHeight() {
    if (width !== body.offsetWidth) body.style.minHeight = "";
    width = body.offsetWidth;
    body.style.minHeight = `${Math.max(parseFloat(body.style.minHeight) || 0, body.offsetHeight)}px`;
  }

  function showButtons(view) {
    for (const action of view.actions) {
      if (!shown.has(action.name)) {
        shown.set(action.name, makeButton(action.name, press));
        buttons.append(shown.get(action.name).node);
      }
      const deaf = action.name !== "cancel" && feed.reached === false && !view.ended;
      const why = deaf ? DEAF : action.refusal;
      const brief = deaf ? "unheard by this kernel" : view.ended ? "it has ended" : "it is not waiting";
      shown.get(action.name).show(why, pressed === action.name, brief, view.id, BEGUN.has(view.phase));
    }
  }

  function showWait(view) {
    wait.hidden = !view.cause && feed.due === null;
    ring.node.hidden = feed.due === null;
    if (wait.hidden) return;
    const held = view.phase === "held";
    put(cause, `${met(view.cause)}${view.cause?.name || "waiting"}`);
    const drawn = meter.show(view.cause ?? {}, !held);
    put(figures, drawn ? "" : (view.cause?.figures ?? ""));
    // What another request has met, and what is only reckoned, promises no moment.
    const what = {
      waiting: `Attempt ${view.attempt + 1} starts by itself at`,
      held: "Met by another request; this one is sent by itself in its turn, not before",
    }[view.phase] ?? "It is sent by itself at about";
    put(next, feed.due === null ? "" : `${what} ${view.until}.`);
  }

  function tick() {
    const view = feed.view, age = view.ended ? 0 : now() - feed.born;
    if (feed.due !== null) ring.show(feed.due - now(), view.total_ms, calm);
    const waited = view.waited_ms + (view.waits ? age : 0);
    const worked = view.elapsed_ms + age - waited;
    put(facts[4], waited > 0 && worked < 1000 ? "" : `${span(view.elapsed_ms + age)} in all`);
    put(facts[5], waited > 0 ? `waited ${span(waited)} of ${view.patience}` : "");
  }

  log.add({ text: feed.text, whole: true });
  el.append(root);
  show();
  const view = { show, addText: log.add };
  feed.views.add(view);
  const timer = setInterval(() => {
    feed.checkClocks();
    tick();
  }, calm ? 1000 : 100);
  const resized = new ResizeObserver(() => width === body.offsetWidth || keepHeight());
  resized.observe(body);
  return () => {
    gone = true;
    clearInterval(timer);
    resized.disconnect();
    feed.views.delete(view);
  };
}

export default () => {
  let feed;
  return {
    initialize({ model }) {
      feed = openFeed(model);
    },
    render({ model, el }) {
      return openView(feed, model, el);
    },
  };
};
