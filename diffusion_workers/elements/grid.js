/**
 * Tables of images that fill in progressively: each cell is sent once, when it is done.
 *
 * `createGrid(root, callbacks)` needs nothing but a browser; the default export adapts it to anywidget.
 */

const make = (tag, className, properties = {}) => Object.assign(document.createElement(tag), { className, ...properties });

export function createGrid(root) {
  root.classList.add("dw-grid");
  const head = make("div", "dw-grid-head");
  const text = make("div", "dw-grid-progress");
  text.setAttribute("role", "status");
  const bar = make("div", "dw-grid-bar");
  const filled = make("span", "");
  bar.append(filled);
  head.append(text, bar);
  const shared = make("div", "dw-grid-shared");
  const body = make("div", "dw-grid-body");
  root.append(head, shared, body);
  const places = new Map(); // number of a cell -> its td
  const urls = [];

  return {
    setTables(tables) {
      places.clear();
      body.replaceChildren(
        ...tables.map(({ title, columns, rows }) => {
          const table = make("table", "");
          if (title) table.append(make("caption", "", { textContent: title }));
          const top = make("tr", "");
          top.append(make("td", ""), ...columns.map((label) => make("th", "", { textContent: label, scope: "col" })));
          table.append(top);
          for (const { label, cells } of rows) {
            const row = make("tr", "");
            row.append(make("th", "", { textContent: label, scope: "row" }));
            for (const number of cells) {
              const place = make("td", "");
              place.append(make("div", "dw-grid-wait", { textContent: "…" }));
              places.set(number, place);
              row.append(place);
            }
            table.append(row);
          }
          return table;
        }),
      );
    },
    setCells(cells, images) {
      cells.forEach(({ number, alt, failed }, index) => {
        const place = places.get(number);
        if (!place) return;
        if (images[index]?.byteLength) {
          const url = URL.createObjectURL(new Blob([images[index]], { type: "image/jpeg" }));
          urls.push(url);
          place.replaceChildren(make("img", "", { src: url, alt, title: alt }));
        } else {
          const box = make("div", "dw-grid-wait", { textContent: alt });
          if (failed) box.dataset.failed = "true";
          place.replaceChildren(box);
        }
      });
    },
    setProgress(line, done, total) {
      text.textContent = line;
      filled.style.width = `${(100 * done) / Math.max(1, total)}%`;
      bar.hidden = done >= total;
    },
    setShared(line) {
      shared.textContent = line;
      shared.hidden = !line;
    },
    destroy() {
      for (const url of urls) URL.revokeObjectURL(url);
    },
  };
}

export default {
  render({ model, el }) {
    const grid = createGrid(el);
    const showCells = (message, buffers) => {
      if (message.kind === "cells") grid.setCells(message.cells, buffers);
    };
    const showProgress = () => {
      grid.setProgress(model.get("progress"), model.get("done"), model.get("total"));
      grid.setShared(model.get("shared"));
    };
    grid.setTables(model.get("tables"));
    showProgress();
    model.on("msg:custom", showCells);
    model.on("change:progress", showProgress);
    if (model.get("done")) model.send({ kind: "need" });
    return () => {
      model.off("msg:custom", showCells);
      model.off("change:progress", showProgress);
      grid.destroy();
    };
  },
};
