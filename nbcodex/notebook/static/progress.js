/* The browser's side of a map: a bar, its figures, and Stop.
 *
 * Everything in `view` comes from a server or from data: it is put in as text, never as markup.
 */

const GRACE_MS = 400; // for Python to say that it has heard a click
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const PARTS = {
  done: "answered", reused: "reused", failed: "failed", parked: "parked", sent: "at the server",
};

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

function make(tag, name, ...children) {
  const node = document.createElement(tag);
  node.className = `nbcodex-map-${name}`;
  node.append(...children);
  return node;
}

const put = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
};

function render({ model, el }) {
  const rows = make("span", "rows"), name = make("span", "model");
  const stop = make("button", "stop", "Stop");
  stop.type = "button";
  stop.title = "Park the rest, keep what is answered; %codex resume goes on";
  const bar = make("div", "bar"), keys = make("div", "keys");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", "Rows answered");
  const parts = Object.keys(PARTS).map((part) => [part, make("span", `part-${part}`)]);
  bar.append(...parts.map(([, node]) => node));
  const legend = [...Object.entries(PARTS), ["waiting", "waiting"]].map(([part, label]) => {
    const node = make("span", `key nbcodex-map-key-${part}`);
    keys.append(node);
    return [part, label, node];
  });
  const held = make("div", "held"), figures = make("div", "figures");
  const told = ["speed", "tokens", "cost", "left", "elapsed"].map((key) => {
    const node = make("span", key);
    figures.append(node);
    return [key, node];
  });
  const failures = make("ul", "failures");
  const root = make("div", "box", make("div", "head", rows, name, stop), bar, keys, held, figures, failures);
  root.className = "nbcodex-map";
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
    failures.replaceChildren(...view.failures.map((line) => {
      const item = document.createElement("li");
      item.textContent = line;
      return item;
    }));
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

export default { render };
