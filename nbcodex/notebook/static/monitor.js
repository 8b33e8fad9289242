/* The browser's side of the monitor: one feed per model, any number of views on it.
 *
 * `view` tells instants of the kernel's clock, and what its clocks read when it was sent: countdowns
 * fall and gauges fill here, from the moment at which it came.
 */

const TICK_MS = 250;
const UNITS = { tokens: "tokens (TPM)", requests: "requests (RPM)" };
const NOTED_MS = 4000; // for a reader to see that a click was heard
const WIDE = 480, HIGH = 90, SLOT = WIDE / 60; // the plot, in its own units
const ARMED_MS = 4000; // in which a second click means what the first one asked
const SLIP_MS = 500; // after which a second click is no double click
const IDLE = "Nothing is under way.";
const LATE = "This kernel hears a button only when its cell has ended. The notebook's own Stop (■) works at once.";

function openFeed(model) {
  const feed = { view: {}, born: 0, clicks: 0, views: new Set(), acks: new Map() };
  const show = () => feed.views.forEach((view) => view.show());

  function look(live) {
    const view = (feed.view = model.get("view"));
    const age = Date.now() - view.wall;
    // What was stored is as old as it says, unless this clock and the kernel's disagree.
    feed.born = Date.now() - (!live && age > 0 && age < 86_400_000 ? age : 0);
    show();
  }

  feed.now = () => feed.view.now + Date.now() - feed.born;
  model.on("msg:custom", (message) => {
    if (message.type !== "heard") return;
    feed.acks.get(message.id)?.();
    feed.acks.delete(message.id);
  });
  model.on("change:view", () => look(true));
  look(false);
  for (const ms of KNOCKS_MS) setTimeout(() => model.send({ type: "sync" }), ms);
  return feed;
}

const count = (n) => Math.round(n).toLocaleString("en-US");
const some = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
const brisk = (ms) => {
  const s = Math.ceil(Math.max(0, ms) / 1000);
  return s < 60 ? `${s} s` : span(s * 1000);
};

const mark = (node, name, value) => {
  if (node.dataset[name] !== String(value)) node.dataset[name] = value;
};

/* Who waits for a limit; a moment is told only as what it surely is not before. */
function inLine(line, now) {
  if (!line) return "nobody in line";
  const ms = line.last === null ? 0 : line.last - now;
  const least = ms > 0 ? ` · the last in ${brisk(ms)} or more` : "";
  return `${count(line.waiting)} in line for up to ${some(line.asked, "token")}${least}`;
}

/* Keep as many nodes as there are items: each is shown in its place, and none is made twice. */
function makeList(parent, build) {
  const kept = new Map();
  return (items, key) => {
    const keys = new Set(items.map(key));
    for (const [name, part] of kept) {
      if (keys.has(name)) continue;
      const focused = part.node.contains(part.node.getRootNode().activeElement);
      part.node.remove();
      kept.delete(name);
      if (focused) parent.closest("[tabindex]")?.focus({ preventScroll: true });
    }
    items.forEach((item, place) => {
      const name = key(item);
      if (!kept.has(name)) kept.set(name, build(item));
      const { node, show } = kept.get(name);
      if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] ?? null);
      show(item);
    });
    return [...kept.values()];
  };
}

function makeGauge(feed) {
  const fill = make("i", "left"), bar = make("div", "gauge", { "aria-hidden": "true" }, fill);
  const words = make("span", "words"), until = make("span", "soft");
  const node = make("div", "level", {}, bar, until, words);
  let gauge, width;
  const tick = () => {
    const passed = Math.max(0, feed.now() - gauge.at) / 1000;
    const left = Math.min(gauge.size, gauge.left + gauge.rate * passed);
    const percent = Math.max(0, Math.round((1000 * left) / gauge.size) / 10);
    if (percent !== width) fill.style.width = `${(width = percent)}%`;
    put(words, `~${count(Math.max(0, left))} of ${count(gauge.size)} ${UNITS[gauge.kind] ?? gauge.kind} left`);
    const full = (1000 * (gauge.size - left)) / gauge.rate;
    put(until, left < gauge.size ? `full in ${brisk(full)}` : "full");
  };
  return { node, tick, show: (item) => { gauge = item; tick(); } };
}

function makeBucket(feed) {
  const model = make("strong", "name"), server = make("span", "soft");
  const levels = make("div", "levels"), nothing = make("span", "soft");
  const shut = make("span", "shut"), line = make("span", "line", { title: ABOUT_LINE }), state = make("div", "state", {}, shut, line);
  const node = make("li", "bucket", {}, make("div", "who", {}, model, server), make("div", "told", {}, levels, nothing), state);
  const list = makeList(levels, () => makeGauge(feed));
  let bucket, parts = [];
  const tick = () => {
    const left = bucket.closed_until === null ? 0 : bucket.closed_until - feed.now();
    const why = bucket.why && ` · ${bucket.why}`;
    mark(node, "closed", left > 0);
    put(shut, left > 0 ? `closed for ${brisk(left)}${why}` : "open");
    put(line, inLine(bucket.line, feed.now()));
    parts.forEach((part) => part.tick());
  };
  const show = (item) => {
    bucket = item;
    put(model, item.model);
    put(server, `at ${item.server}`);
    put(nothing, item.gauges.length ? "" : "The server's answers tell no limits.");
    parts = list(item.gauges, (gauge) => gauge.kind);
    tick();
  };
  return { node, show, tick };
}

const ABOUT_LINE = "A bound and no forecast: what this limit, its hold, and those who come before it leave no doubt of, as things stand.";
const LEGEND = "Cancel keeps any text · Retry now, if refused: 1 request, no tokens · Park: for %codex resume";
const ASKS = { cancel: "Cancel", retry: "Retry now", park: "Park" };
const ABOUT_ALL = {
  cancel: "End all open requests of this kernel; text so far is kept. Asks once more.",
  park: "Put all open requests of this kernel aside for %codex resume. Asks once more.",
};

function makeRow(feed, press, id) {
  const path = draw("path", {});
  const icon = draw("svg", { viewBox: "0 0 16 16", class: "nbcodex-icon", "aria-hidden": "true" }, path);
  const [phase, time, used, prompt, why] = ["phase", "time", "used", "prompt", "why"].map((name) => make("span", name));
  used.title = "Tokens of this attempt: in the prompt, and of the answer so far";
  const buttons = Object.entries(ASKS).map(([action, label]) => {
    const node = make("button", "button", { ...OWN_KEYS, type: "button", "aria-label": `${label} ${short(id)}` }, label);
    node.addEventListener("click", () => press(action, id, row.refusals[action]));
    return [action, node];
  });
  const node = make(
    "li", "row", {}, icon, make("code", "id", { title: id }, short(id)), phase, time, prompt, make("span", "more", {}, used, why),
    make("span", "deeds", {}, ...buttons.map(([, button]) => button)),
  );
  let row;
  const tick = () => {
    const waits = row.due !== null, ms = waits ? row.due - feed.now() : feed.now() - row.since;
    const due = row.phase === "queued" ? "soon" : "due now", when = { held: "after ", queued: "in ~" }[row.phase] ?? "in ";
    put(time, !waits ? `for ${brisk(ms)}` : ms <= 0 ? due : when + brisk(ms));
  };
  const show = (item) => {
    row = item;
    const [label, about] = PHASES[item.phase] ?? [item.phase, ""];
    if (node.dataset.phase !== item.phase) {
      node.dataset.phase = item.phase;
      path.setAttribute("d", ICONS[item.phase] ?? CLOCK);
      phase.title = about;
    }
    mark(node, "waits", item.due !== null);
    put(phase, label);
    put(prompt, item.prompt);
    prompt.title = item.prompt;
    put(why, item.why);
    why.title = item.about;
    put(used, [item.attempt > 1 && `attempt ${item.attempt}`, item.tokens].filter(Boolean).join(" · "));
    for (const [action, button] of buttons) {
      const refusal = item.refusals[action];
      button.title = refusal ? `${ASKS[action]} is not possible now. ${refusal}` : aboutButton(action, id);
      button.setAttribute("aria-disabled", String(Boolean(refusal)));
    }
    tick();
  };
  return { node, show, tick };
}

/* A button for all that is open. One click on it may be a slip: it asks, and a second one means it,
 * unless it is the same slip: a double click, or a key that is held down. */
function makeWhole(action, press) {
  const label = `${ASKS[action]} all`;
  const node = make("button", "button", { ...OWN_KEYS, type: "button" }, label);
  let armed, askedAt, open = 0;
  const name = () => put(node, armed ? `${label} ${count(open)}?` : label);
  const ease = () => {
    clearTimeout(armed);
    armed = undefined;
    name();
  };
  node.addEventListener("keydown", (event) => event.repeat && event.preventDefault());
  node.addEventListener("click", (event) => {
    if (!open) {
      press(action, "all", IDLE);
    } else if (!armed) {
      askedAt = event.timeStamp;
      armed = setTimeout(ease, ARMED_MS);
      name();
    } else if (event.timeStamp - askedAt >= SLIP_MS) {
      ease();
      press(action, "all", "");
    }
  });
  const show = (now) => {
    open = now; // while it asks, too: with many under way the number never stands still
    node.title = open ? ABOUT_ALL[action] : `${label} is not possible now. ${IDLE}`;
    node.setAttribute("aria-disabled", String(!open));
    (open ? name : ease)();
  };
  return { node, show };
}

/* Tokens in each minute of the last hour; a triangle stands over those in which a limit was met. */
function makePlot() {
  const bars = draw("path", { class: "nbcodex-bars" });
  const hits = draw("path", { class: "nbcodex-hits" });
  const grid = draw("path", { class: "nbcodex-grid", d: `M0 12H${WIDE}M0 ${(12 + HIGH) / 2}H${WIDE}M0 ${HIGH}H${WIDE}` });
  const picture = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", preserveAspectRatio: "none" }, grid, bars, hits);
  const most = make("span", "most"), mark = make("span", "key-hit");
  const axis = make("div", "axis", { "aria-hidden": "true" }, make("span", "", {}, "1 h ago"), mark, make("span", "", {}, "now"));
  const node = make("figure", "plot", {}, make("figcaption", "caption", {}, "Tokens by minute", most), picture, axis);
  const show = ({ minutes, hour }) => {
    const top = Math.max(1, ...minutes.map(([tokens]) => tokens));
    const met = minutes.reduce((sum, [, n]) => sum + n, 0);
    let drawn = "", marked = "";
    minutes.forEach(([tokens, n], at) => {
      const x = at * SLOT, height = ((HIGH - 12) * tokens) / top;
      if (tokens) drawn += `M${x + 1} ${HIGH}v${-height.toFixed(1)}h${SLOT - 2}v${height.toFixed(1)}z`;
      if (n) marked += `M${x} 1h${SLOT}l${-SLOT / 2} 8z`;
    });
    bars.setAttribute("d", drawn);
    hits.setAttribute("d", marked);
    picture.setAttribute("aria-label", hour);
    put(most, top > 1 ? `most: ${count(top)}` : "none so far");
    put(mark, met ? `▼ limit met (${count(met)})` : "no limit met");
  };
  return { node, show };
}

function makeTable() {
  // The roles are those that a table has anyway: it loses them where the style turns it.
  const cell = (tag, role, text, attributes = {}) => make(tag, "", { role, ...attributes }, text);
  const row = (...cells) => make("tr", "", { role: "row" }, ...cells);
  const head = make("thead", "", { role: "rowgroup" }), body = make("tbody", "", { role: "rowgroup" });
  const table = make("table", "sums", { role: "table" }, head, body);
  const show = ({ columns, sums }) => {
    const told = JSON.stringify(sums);
    if (table.dataset.told === told) return;
    table.dataset.told = told;
    head.replaceChildren(row(cell("td", "cell", ""), ...columns.map((c) => cell("th", "columnheader", c, { scope: "col" }))));
    body.replaceChildren(...sums.map(([name, ...figures]) =>
      row(cell("th", "rowheader", name, { scope: "row" }), ...figures.map((f) => cell("td", "cell", f || "–")))));
  };
  return { node: make("div", "scroll", { ...OWN_KEYS, tabindex: "0", role: "group", "aria-label": "Totals" }, table), show };
}

function openView(feed, model, el) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const [open, simulated, others, budget] = ["open", "simulated", "others", "budget"].map((name) => make("span", name));
  const [buckets, rows, log] = [make("ul", "buckets"), make("ul", "rows"), make("ol", "entries")];
  const [unlimited, idle, quiet] = [make("p", "empty"), make("p", "empty"), make("p", "empty")];
  const [table, plot] = [makeTable(), makePlot()];
  const whole = ["cancel", "park"].map((action) => makeWhole(action, press));
  const scroll = (label, ...children) =>
    make("div", "scroll", { ...OWN_KEYS, tabindex: "0", role: "group", "aria-label": label }, ...children);
  const part = (name, title, ...children) => make("div", `part nbcodex-part-${name}`, {}, make("div", "caption", {}, ...[title].flat()), ...children);
  const note = make("span", "note", { role: "status", hidden: "" });
  const live = make("div", "live", { "aria-live": "polite" });
  const root = make(
    "div", "monitor", { role: "group", "aria-label": "Codex monitor" },
    make("div", "top", {}, make("strong", "title", {}, "Codex monitor"), open, make("i", "break"), simulated, others, budget),
    part("limits", "Limits", buckets, unlimited),
    make("div", "pair", {}, part("sums", "Used", table.node), plot.node),
    part("open", ["Open requests", make("span", "say", {}, note, make("span", "legend", {}, LEGEND)), make("span", "deeds", {}, ...whole.map(({ node }) => node))], scroll("Open requests", rows, idle)),
    part("log", "Retries", scroll("Retries", log, quiet)), live,
  );
  const listBuckets = makeList(buckets, () => makeBucket(feed));
  const listRows = makeList(rows, (row) => makeRow(feed, press, row.id));
  const listLog = makeList(log, ([when, id, what]) => ({
    node: make("li", "entry", {}, make("time", "", {}, when), make("code", "id", { title: id }, short(id)), make("span", "", {}, what)), show() {},
  }));
  let ticking = [], spoken = "", noted;

  function say(what, ms) {
    clearTimeout(noted);
    put(note, what);
    if (ms) noted = setTimeout(() => put(note, ""), ms);
  }

  function press(action, request, refusal) {
    say(refusal, NOTED_MS);
    if (refusal) return;
    const id = ++feed.clicks;
    const late = setTimeout(() => say(LATE), GRACE_MS);
    feed.acks.set(id, () => {
      clearTimeout(late);
      say(`${ASKS[action]} ${short(request)}: on its way.`, NOTED_MS);
    });
    model.send({ type: "action", name: action, request, id });
  }

  function show() {
    const view = feed.view;
    const [waiting, held] = ["waiting", "held"].map((phase) => view.phases[phase] ?? 0);
    const told = [
      view.open ? some(view.open, "open request") : "no open requests",
      waiting && `${count(waiting)} waiting to retry`, held && `${count(held)} held back`,
    ];
    put(open, told.filter(Boolean).join(" · "));
    put(simulated, view.simulated && "simulated: nothing of it is paid");
    put(others, view.others && `other kernels: ${view.others}`);
    put(budget, view.budget && `budget: ${view.budget}`);
    ticking = [...listBuckets(view.limits, (b) => `${b.model} ${b.server}`), ...listRows(view.rows, (row) => row.id)];
    // Ids are of one width in all rows, so that what follows them stands in columns.
    rows.style.setProperty("--id", Math.max(8, ...view.rows.map((row) => short(row.id).length)));
    whole.forEach((button) => button.show(view.open));
    listLog([...view.log].reverse(), (line) => line.join(" "));
    put(unlimited, view.limits.length ? "" : "No answer has told any limits yet.");
    put(idle, view.open > view.rows.length ? `and ${count(view.open - view.rows.length)} more` : view.open ? "" : IDLE);
    put(quiet, view.log.length ? "" : "No attempt has been refused.");
    table.show(view);
    plot.show(view);
    // Who listens hears that waiting begins or ends, and not how many of fifty wait just now.
    const news = `${view.open ? "requests are open" : "nothing is open"}${waiting + held ? ", some wait" : ""}`;
    if (news !== spoken) put(live, (spoken = news));
  }

  const tick = () => ticking.forEach((part) => part.tick());
  el.append(root);
  show();
  const view = { show };
  feed.views.add(view);
  const timer = setInterval(() => document.hidden || tick(), calm ? 1000 : TICK_MS);
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
    render({ model, el }) {
      return openView(feed, model, el);
    },
  };
};
