/* Unpacks a widget's module and style, which would be most of what a short answer sends to the page.
 */

async function unpack(model) {
  const packed = new Blob([model.get("packed")]).stream();
  const unpacked = packed.pipeThrough(new DecompressionStream("deflate"));
  const { css, js } = await new Response(unpacked).json();
  const url = URL.createObjectURL(new Blob([js], { type: "text/javascript" }));
  const { default: make } = await import(url);
  URL.revokeObjectURL(url);
  return { css, ...make() };
}

export default () => {
  let side;
  return {
    async initialize(given) {
      side = await unpack(given.model);
      side.initialize?.(given);
    },
    render(given) {
      // No element of the output: whoever looks through an answer's outputs finds no style in them.
      const sheet = new CSSStyleSheet();
      sheet.replaceSync(side.css);
      document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
      const leave = side.render(given);
      return () => {
        leave();
        document.adoptedStyleSheets = document.adoptedStyleSheets.filter((each) => each !== sheet);
      };
    },
  };
};
