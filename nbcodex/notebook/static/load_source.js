/* The module that each widget is sent to the page with. It loads the widget's real module, which is
 * ten times as large and therefore sent only once, as the state of a model that all widgets of the
 * kind refer to (`WidgetSource` in widget_base.py). This page keeps what it has loaded.
 */

const loaded = (globalThis.nbcodexModules ??= new Map());

async function evaluate(source) {
  // Not an element of the output, where scripts that read an answer's outputs would find it.
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(source.get("css"));
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  const url = URL.createObjectURL(new Blob([source.get("js")], { type: "text/javascript" }));
  try {
    return await import(url);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function load(model) {
  const id = model.get("source");
  if (!loaded.has(id)) {
    const loading = model.widget_manager.get_model(id).then(evaluate);
    loading.catch(() => loaded.delete(id)); // the next widget tries again
    loaded.set(id, loading);
  }
  return loaded.get(id);
}

export default () => {
  let side;
  return {
    async initialize({ model }) {
      side = (await load(model)).default();
      side.initialize?.({ model });
    },
    render: ({ model, el }) => side.render({ model, el }),
  };
};
