/* The progress of a map in the page: a bar, its figures, and Stop. */

const PARTS = {
  done: "answered",
  reused: "reused",
  failed: "failed",
  parked: "parked",
  sent: "at the server",
};

const FIGURES = {
  speed: (text) => text && `${text} tokens/s`,
  tokens: (text) => text,
  cost: (text) => text,
  left: (text) => text && `${text} left`,
  elapsed: (text) => text && `${text} so far`,
};

function render({ model, el }) {
  const rows = makeNode("span", "map-rows");
  const modelName = makeNode("span", "model");
  const stop = makeNode(
    "button",
    "button nbcodex-map-stop",
    {
      ...OWN_KEYS,
      type: "button",
      title: "Park the rest and keep the answers; %codex resume continues",
    },
    "Stop",
  );
  const segments = Object.keys(PARTS).map((part) => [part, makeNode("span", `map-part-${part}`)]);
  const bar = makeNode(
    "div",
    "map-bar",
    { role: "progressbar", "aria-label": "Rows answered" },
    ...segments.map(([, node]) => node),
  );
  const legend = [...Object.entries(PARTS), ["waiting", "waiting"]].map(([part, label]) => [
    part,
    label,
    makeNode("span", `map-key nbcodex-map-key-${part}`),
  ]);
  const figures = Object.keys(FIGURES).map((key) => [key, makeNode("span", key)]);
  const stage = makeNode("div", "map-stage");
  const failures = makeNode("ul", "map-failures");
  const root = makeNode(
    "div",
    "map",
    {},
    makeNode("div", "map-head", {}, rows, modelName, stop),
    bar,
    makeNode("div", "map-keys", {}, ...legend.map(([, , node]) => node)),
    stage,
    makeNode("div", "map-figures", {}, ...figures.map(([, node]) => node)),
    failures,
  );
  const channel = openChannel(model);

  function update() {
    const view = model.get("view");
    root.dataset.phase = view.phase;
    setText(rows, view.rows);
    setText(modelName, view.model);
    const known = segments.reduce((sum, [part]) => sum + (view.parts[part] || 0), 0);
    const total = Math.max(view.total ?? known + view.waiting, 1);
    for (const [part, node] of segments) {
      node.style.width = `${(100 * (view.parts[part] || 0)) / total}%`;
    }
    bar.setAttribute("aria-valuemax", total);
    bar.setAttribute("aria-valuenow", view.parts.done + view.parts.reused);
    for (const [part, label, node] of legend) {
      const count = part === "waiting" ? view.waiting : view.parts[part];
      setText(node, count ? `${formatNumber(count)} ${label}` : "");
    }
    setText(stage, view.stage);
    for (const [key, node] of figures) setText(node, FIGURES[key](view[key]));
    failures.hidden = !view.failures.length;
    failures.replaceChildren(...view.failures.map((line) => makeNode("li", "", {}, line)));
  }

  async function interrupt() {
    const interrupted = await interruptKernel(model.get("kernel_id"));
    if (!interrupted) stop.textContent = "Use the notebook's own Stop";
  }

  stop.addEventListener("click", () => {
    if (stop.getAttribute("aria-disabled") === "true") return;
    stop.setAttribute("aria-disabled", "true");
    stop.textContent = "Stopping…";
    channel.send({ type: "stop" }, { onLate: interrupt });
  });
  model.on("change:view", update);
  channel.start();
  update();
  el.append(root);
  return () => model.off("change:view", update);
}

export default () => ({ render });
