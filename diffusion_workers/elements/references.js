/**
 * An ordered list of images: drop, paste or choose them, drag to reorder, or use the buttons to move and remove them.
 *
 * `createReferences(root, callbacks)` needs nothing but a browser; the default export adapts it to anywidget and sends
 * files in pieces, with `pieces.js`, which Python prepends to this file.
 */

const DRAGGED = "application/x-dw-reference";

export function createReferences(root, { onFiles, onMove, onRemove, onWeight }) {
  root.classList.add("dw-references");
  const make = (tag, className, properties = {}) => Object.assign(document.createElement(tag), { className, ...properties });
  const list = make("ol", "dw-references-list");
  list.setAttribute("aria-label", "Reference images, in order");
  const zone = make("button", "dw-references-add", { type: "button" });
  const file = make("input", "", { type: "file", accept: "image/*", multiple: true, hidden: true, tabIndex: -1 });
  const said = make("span", "dw-unseen");
  said.setAttribute("role", "status");
  root.append(list, zone, file, said);
  const entries = new Map(); // id -> { item, shown, url, buttons }
  let order = [];
  let limit = null;
  let weighted = false;

  zone.onclick = () => file.click();
  file.onchange = () => {
    onFiles([...file.files]);
    file.value = "";
  };
  const move = (id, to) => {
    if (to < 0 || to >= order.length || order.indexOf(id) === to) return;
    said.textContent = `Image ${order.indexOf(id) + 1} is image ${to + 1} now.`;
    onMove(id, to);
  };
  const remove = (id) => {
    const at = order.indexOf(id);
    const beside = entries.get(order[at + 1] ?? order[at - 1]);
    said.textContent = `Image ${at + 1} is removed.`;
    (beside?.buttons.remove ?? zone).focus();
    onRemove(id);
  };
  const created = (id) => {
    const item = make("li", "", { draggable: true });
    item.dataset.id = id;
    const shown = make("img", "", { draggable: false });
    const number = make("span", "dw-references-number");
    const size = make("span", "dw-references-size");
    const tool = (name, text, work) => {
      const button = make("button", `dw-references-${name}`, { type: "button", textContent: text });
      button.onclick = work;
      return button;
    };
    const buttons = {
      earlier: tool("earlier", "←", () => move(id, order.indexOf(id) - 1)),
      later: tool("later", "→", () => move(id, order.indexOf(id) + 1)),
      remove: tool("remove", "✕", () => remove(id)),
    };
    const tools = make("span", "dw-references-tools");
    tools.append(...Object.values(buttons));
    const weight = make("input", "dw-references-weight", { type: "number", min: "0", max: "10", step: "0.05" });
    weight.onchange = () => onWeight(id, weight.value === "" ? null : Number(weight.value));
    item.append(number, shown, size, weight, tools);
    item.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData(DRAGGED, id);
      event.dataTransfer.effectAllowed = "move";
    });
    item.addEventListener("dragover", (event) => {
      if (event.dataTransfer.types.includes(DRAGGED)) item.dataset.over = "true";
    });
    for (const kind of ["dragleave", "drop", "dragend"]) item.addEventListener(kind, () => delete item.dataset.over);
    item.addEventListener("drop", (event) => {
      const dragged = event.dataTransfer.getData(DRAGGED);
      if (!entries.has(dragged)) return;
      event.preventDefault();
      event.stopPropagation();
      delete zone.dataset.over;
      move(dragged, order.indexOf(id));
    });
    return { item, shown, number, size, weight, buttons, url: null };
  };
  const name = () => {
    const full = limit !== null && order.length >= limit;
    const most = limit === null ? "" : `, ${order.length} of at most ${limit}`;
    zone.textContent = full ? `${order.length} of ${limit}: remove one to add another` : `Drop, paste or choose images${most}`;
    zone.disabled = full;
  };

  root.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    event.stopPropagation();
    onFiles(files);
  });
  for (const kind of ["dragenter", "dragover"]) {
    root.addEventListener(kind, (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (!event.dataTransfer?.types.includes(DRAGGED)) zone.dataset.over = "true";
    });
  }
  root.addEventListener("dragleave", () => {
    delete zone.dataset.over;
  });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    delete zone.dataset.over;
    const files = [...(event.dataTransfer?.files ?? [])];
    if (files.length) onFiles(files);
  });

  const showWeights = () => {
    for (const { weight } of entries.values()) weight.hidden = !weighted && weight.value === "";
  };

  return {
    setWeighted(value) {
      weighted = value;
      showWeights();
    },
    setLimit(value) {
      limit = value;
      name();
    },
    setImages(images) {
      const focused = root.contains(document.activeElement) ? document.activeElement : null;
      order = images.map(({ id }) => id);
      for (const [id, { item, url }] of entries) {
        if (order.includes(id)) continue;
        URL.revokeObjectURL(url);
        item.remove();
        entries.delete(id);
      }
      images.forEach(({ id, size, thumbnail, weight }, index) => {
        if (!entries.has(id)) entries.set(id, created(id));
        const entry = entries.get(id);
        if (!entry.url) entry.shown.src = entry.url = URL.createObjectURL(new Blob([thumbnail], { type: "image/jpeg" }));
        if (list.children[index] !== entry.item) list.insertBefore(entry.item, list.children[index] ?? null);
        entry.number.textContent = String(index + 1);
        entry.size.textContent = size;
        if (document.activeElement !== entry.weight) entry.weight.value = weight ?? "";
        entry.weight.placeholder = (1 / images.length).toFixed(2);
        entry.weight.title = "Weight; leave empty for an equal share";
        entry.weight.setAttribute("aria-label", `Weight of reference image ${index + 1}`);
        entry.shown.alt = `Reference image ${index + 1}, ${size}`;
        const titles = { earlier: "Move earlier", later: "Move later", remove: "Remove" };
        for (const [kind, button] of Object.entries(entry.buttons)) {
          button.title = titles[kind];
          button.setAttribute("aria-label", `${titles[kind]}: reference image ${index + 1}`);
        }
        entry.buttons.earlier.disabled = index === 0;
        entry.buttons.later.disabled = index === images.length - 1;
      });
      showWeights();
      list.hidden = !images.length;
      name();
      if (!focused || document.activeElement === focused || !root.contains(focused)) return;
      if (!focused.disabled) focused.focus();
      else focused.parentElement.querySelector("button:not(:disabled)")?.focus(); // at an end of the list
    },
    destroy() {
      for (const { url } of entries.values()) if (url) URL.revokeObjectURL(url);
    },
  };
}

export default {
  render({ model, el }) {
    let turn = Promise.resolve();
    const references = createReferences(el, {
      onFiles(files) {
        model.send({ kind: "files" });
        for (const file of files) {
          const problem = tooLarge(file, model.get("max_bytes"));
          turn = turn.then(() => (problem ? model.send({ kind: "problem", text: problem }) : sendPieces(model, file)));
        }
      },
      onMove: (id, to) => model.send({ kind: "move", id, to }),
      onRemove: (id) => model.send({ kind: "remove", id }),
      onWeight: (id, weight) => model.send({ kind: "weight", id, weight }),
    });
    const showImages = () => references.setImages(model.get("_shown"));
    const showLimit = () => references.setLimit(model.get("limit"));
    model.on("change:_shown", showImages);
    const showWeighted = () => references.setWeighted(model.get("weighted"));
    model.on("change:limit", showLimit);
    model.on("change:weighted", showWeighted);
    showLimit();
    showWeighted();
    showImages();
    return () => {
      model.off("change:_shown", showImages);
      model.off("change:limit", showLimit);
      model.off("change:weighted", showWeighted);
      references.destroy();
    };
  },
};
