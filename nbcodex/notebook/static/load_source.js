/* The module that anywidget sends to the page with each widget. It loads the widget's real module,
 * which is ten times as large and therefore sent only once, as the state of a model that all widgets
 * of the kind refer to (`WidgetSource` in widget_base.py).
 */

// The modules that this page has loaded or is loading, by the id of their source.
const modules = (globalThis.nbcodexModules ??= new Map());

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
  if (!modules.has(id)) {
    const loading = model.widget_manager.get_model(id).then(evaluate);
    loading.catch(() => modules.delete(id)); // the next widget tries again
    modules.set(id, loading);
  }
  return modules.get(id);
}

export default () => {
  let widget; // what the real module exports: `render`, and for some kinds `initialize`
  return {
    async initialize({ model }) {
      widget = (await load(model)).default();
      widget.initialize?.({ model });
    },
    render: ({ model, el }) => widget.render({ model, el }),
  };
};
