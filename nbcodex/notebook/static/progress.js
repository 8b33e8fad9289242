/* The browser's side of a map: a bar, its figures, and Stop.
 *
 * Everything in `view` comes from a server or from data: it is put in as text, never as markup.
 */

const PARTS = {
  done: "answered", reused: "reused", failed: "failed", parked: "parked", sent: "at the server",
};

function render({ model, el }) {
  const rows = make("span", "map-rows"), name = make("span", "model");
  const stop = make("button", "button nbcodex-map-stop", {
    ...OWN_KEYS, type: "button", title: "Park the rest, keep what is answered; %codex resume goes on",
  }, "Stop");
  const parts = Object.keys(PARTS).map((part) => [part, make("span", `map-part-${part}`)]);
  const bar = make(
    "div", "map-bar", { role: "progressbar", "aria-label": "Rows answered" }, ...parts.map(([, node]) => node),
  );
  const legend = [...Object.entries(PARTS), ["waiting", "waiting"]].map(([part, label]) => [
    part, label, make("span", `map-key nbcodex-map-key-${part}`),
  ]);
  const keys = make("div", "map-keys", {}, ...legend.map(([, , node]) => node));
  const told = ["speed", "tokens", "cost", "left", "elapsed"].map((key) => [key, make("span", key)]);
  const held = make("div", "map-held"), failures = make("ul", "map-failures");
  const figures = make("div", "map-figures", {}, ...told.map(([, node]) => node));
  const root = make("div", "map", {}, make("div", "map-head", {}, rows, name, stop), bar, keys, held, figures, failures);
  const say = {
    speed: (v) => v && `${v} tokens/s`, tokens: (v) => v, cost: (v) => v,
    left: (v) => v && `${v} left`, elapsed: (v) => v && `${v} so far`,
  };

  function show() {
    const view = model.get("view");
    root.dataset.phase = view.phase;
    put(rows, view.rows);
    put(name, view.model);
    const ended = parts.reduce((sum, [part]) => sum + (view.parts[part] || 0), 0);
    const whole = Math.max(view.total ?? ended + view.waiting, 1);
    for (const [part, node] of parts) node.style.width = `${(100 * (view.parts[part] || 0)) / whole}%`;
    bar.setAttribute("aria-valuemax", whole);
    bar.setAttribute("aria-valuenow", view.parts.done + view.parts.reused);
    for (const [part, label, node] of legend) {
      const count = part === "waiting" ? view.waiting : view.parts[part];
      put(node, count ? `${count.toLocaleString("en")} ${label}` : "");
    }
    put(held, view.held);
    for (const [key, node] of told) put(node, say[key](view[key]));
    failures.hidden = !view.failures.length;
    failures.replaceChildren(...view.failures.map((line) => make("li", "", {}, line)));
  }

  let clicks = 0, timer = null;
  function hear(message) {
    if (message.type === "heard") clearTimeout(timer);
  }
  function click() {
    if (stop.getAttribute("aria-disabled") === "true") return;
    stop.setAttribute("aria-disabled", "true");
    stop.textContent = "Stopping…";
    model.send({ type: "stop", id: ++clicks });
    // Where the kernel hears no click while a cell runs, its server can interrupt it.
    timer = setTimeout(async () => {
      const done = await interrupt(model.get("kernel_id")).catch(() => false);
      if (!done) stop.textContent = "Use the notebook's own Stop";
    }, GRACE_MS);
  }

  stop.addEventListener("click", click);
  model.on("change:view", show);
  model.on("msg:custom", hear);
  show();
  el.append(root);
  return () => {
    clearTimeout(timer);
    model.off("change:view", show);
    model.off("msg:custom", hear);
  };
}

export default () => ({ render });
