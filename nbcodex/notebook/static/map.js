/* The progress of a map in the page: a bar, its figures, and Stop. */

// The segments of the bar, by the names that `data.counts` has for them.
const SEGMENTS = {
  done: "answered",
  reused: "reused",
  failed: "failed",
  parked: "parked",
  sent: "at the server",
};

// The text of each figure, made from the entry of `data` that has its name.
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
  // Pairs of a segment's name and node; below, triples of a legend's name, label and node.
  const segments = Object.keys(SEGMENTS).map((name) => [
    name,
    makeNode("span", `map-segment-${name}`),
  ]);
  const bar = makeNode(
    "div",
    "map-bar",
    { role: "progressbar", "aria-label": "Rows answered" },
    ...segments.map(([, node]) => node),
  );
  const legend = [...Object.entries(SEGMENTS), ["waiting", "waiting"]].map(([name, label]) => [
    name,
    label,
    makeNode("span", `map-key nbcodex-map-key-${name}`),
  ]);
  const figures = Object.keys(FIGURES).map((name) => [name, makeNode("span", name)]);
  const legendRow = makeNode("div", "map-keys", {}, ...legend.map(([, , node]) => node));
  const figureRow = makeNode("div", "map-figures", {}, ...figures.map(([, node]) => node));
  const stage = makeNode("div", "map-stage"); // what the map waits for
  const failures = makeNode("ul", "map-failures");
  const root = makeNode(
    "div",
    "map",
    {},
    makeNode("div", "map-head", {}, rows, modelName, stop),
    bar,
    legendRow,
    stage,
    figureRow,
    failures,
  );
  const channel = openChannel(model);

  function update() {
    const data = model.get("data");
    root.dataset.phase = data.phase;
    setText(rows, data.rows);
    setText(modelName, data.model);
    const counts = { ...data.counts, waiting: data.waiting };
    // The rows of an iterator have no total: it is assumed to be what was read so far.
    const read = Object.values(counts).reduce((sum, count) => sum + count, 0);
    const total = Math.max(data.total ?? read, 1);
    for (const [name, node] of segments) node.style.width = `${(100 * counts[name]) / total}%`;
    bar.setAttribute("aria-valuemax", total);
    bar.setAttribute("aria-valuenow", counts.done + counts.reused);
    for (const [name, label, node] of legend) {
      const count = counts[name];
      setText(node, count ? `${formatNumber(count)} ${label}` : "");
    }
    // Of a map that has ended, only a line says where its result is.
    const isEnded = data.phase === "ended";
    for (const node of [rows, stop, bar, legendRow, figureRow]) node.hidden = isEnded;
    setText(stage, isEnded ? data.line : data.stage);
    for (const [name, node] of figures) setText(node, FIGURES[name](data[name]));
    failures.hidden = isEnded || !data.failures.length;
    failures.replaceChildren(...data.failures.map((line) => makeNode("li", "", {}, line)));
  }

  async function interrupt() {
    const interrupted = await interruptKernel(model.get("kernel_id"));
    if (!interrupted) stop.textContent = "Use the notebook's own Stop";
  }

  stop.addEventListener("click", () => {
    if (stop.getAttribute("aria-disabled") === "true") return;
    stop.setAttribute("aria-disabled", "true");
    stop.textContent = "Stopping…";
    channel.send({ type: "action", name: "stop" }, { onLate: interrupt });
  });
  model.on("change:data", update);
  channel.start();
  update();
  el.append(root);
  return () => model.off("change:data", update);
}

export default () => ({ render });
