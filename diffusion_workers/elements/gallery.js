/**
 * Images as pages of thumbnails: choose one or two, search, mark favorites, delete and undo.
 *
 * `createGallery(root, callbacks)` needs nothing but a browser; the default export adapts it to anywidget. It receives
 * the ordered ids of a page and requests only those that it has not cached, so each thumbnail is sent once.
 */

const make = (tag, className, properties = {}) => Object.assign(document.createElement(tag), { className, ...properties });

export function createGallery(root, callbacks) {
  const { onSelect, onFavorite, onDelete, onUndo, onNeed, onPage, onQuery, onOnlyFavorites } = callbacks;
  root.classList.add("dw-gallery");
  const known = new Map(); // id -> { caption, label, favorite, url }
  const entries = new Map(); // id -> its element
  let order = [];
  let selected = [];
  let batch = false;

  const head = make("div", "dw-bar dw-gallery-head");
  const query = make("input", "dw-gallery-query", { type: "search", placeholder: "Search prompt or seed" });
  query.setAttribute("aria-label", "Search the images by prompt or seed");
  const starred = make("button", "dw-gallery-starred", { type: "button", textContent: "★ Favorites" });
  const count = make("span", "dw-gallery-count");
  const pages = make("span", "dw-gallery-pages");
  const previous = make("button", "dw-gallery-previous", { type: "button", textContent: "‹", title: "Previous page" });
  const next = make("button", "dw-gallery-next", { type: "button", textContent: "›", title: "Next page" });
  const place = make("span", "dw-gallery-count");
  for (const element of [previous, next]) element.setAttribute("aria-label", element.title);
  pages.append(previous, place, next);
  head.append(query, starred, count, pages);
  const undo = make("div", "dw-gallery-undo");
  undo.setAttribute("role", "status");
  const undoText = make("span", "");
  const undoButton = make("button", "dw-gallery-restore", { type: "button", textContent: "Undo" });
  undo.append(undoText, undoButton);
  const list = make("ul", "");
  list.setAttribute("aria-label", "Images; shift-click selects a second one");
  const empty = make("div", "dw-empty");
  root.append(head, undo, list, empty);

  const mark = () => {
    for (const [id, item] of entries) item.firstChild.setAttribute("aria-pressed", String(selected.includes(id)));
  };
  const choose = (id, more) => {
    const others = selected.filter((other) => other !== id);
    selected = more ? [...others.slice(-1), ...(others.length < selected.length ? [] : [id])] : [id];
    mark();
    onSelect(selected);
  };
  const tool = (className, work) => {
    const element = make("button", className, { type: "button" });
    element.onclick = work;
    return element;
  };
  const remove = (id) => {
    const item = entries.get(id);
    (item.nextSibling ?? item.previousSibling)?.firstChild.focus();
    onDelete(id);
  };
  const created = (id) => {
    const item = make("li", "");
    item.dataset.id = id;
    const open = make("button", "dw-gallery-open", { type: "button" });
    open.append(make("img", "", { alt: "", hidden: true }));
    open.onclick = (event) => choose(id, event.shiftKey || event.ctrlKey || event.metaKey);
    open.onkeydown = (event) => {
      const step = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
      if (step) {
        event.preventDefault();
        item[step]?.firstChild.focus();
      }
      if (event.key === "Delete" && !batch) {
        event.preventDefault();
        remove(id);
      }
    };
    const tools = make("span", "dw-gallery-tools");
    const star = tool("dw-gallery-star", () => onFavorite(id, !known.get(id)?.favorite));
    const bin = tool("dw-gallery-delete", () => remove(id));
    Object.assign(bin, { textContent: "✕", title: "Delete" });
    bin.setAttribute("aria-label", "Delete");
    tools.append(star, bin);
    item.append(open, make("span", "dw-gallery-label"), tools);
    return item;
  };
  const fill = (id) => {
    const item = entries.get(id);
    const found = known.get(id);
    if (!item || !found) return;
    const [open, label, tools] = item.children;
    const [image] = open.children;
    image.hidden = !found.url;
    if (found.url && image.src !== found.url) image.src = found.url;
    image.alt = open.title = found.caption ?? "";
    label.textContent = found.label ?? "";
    tools.hidden = batch;
    const title = found.favorite ? "Remove from favorites" : "Add to favorites";
    Object.assign(tools.firstChild, { textContent: found.favorite ? "★" : "☆", title });
    tools.firstChild.setAttribute("aria-label", title);
    if (found.favorite) item.dataset.favorite = "true";
    else delete item.dataset.favorite;
  };
  const askForMissing = () => {
    const missing = order.filter((id) => !known.get(id)?.url);
    if (missing.length) onNeed(missing);
  };

  let typing = null;
  query.oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(() => onQuery(query.value), 200);
  };
  starred.onclick = () => onOnlyFavorites(starred.getAttribute("aria-pressed") !== "true");
  undoButton.onclick = onUndo;

  return {
    setOrder(ids) {
      const focused = list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
      order = [...ids];
      for (const [id, item] of entries) {
        if (order.includes(id)) continue;
        item.remove();
        entries.delete(id);
      }
      order.forEach((id, index) => {
        if (!entries.has(id)) entries.set(id, created(id));
        const item = entries.get(id);
        if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
        fill(id);
      });
      if (focused) entries.get(focused)?.firstChild.focus();
      mark();
      askForMissing();
    },
    /** Thumbnails arrive as bytes; an item without one keeps the one that it has. */
    setItems(items, thumbnails) {
      items.forEach((item, index) => {
        const before = known.get(item.id);
        const bytes = thumbnails[index];
        let url = before?.url;
        if (bytes?.byteLength) {
          if (url) URL.revokeObjectURL(url);
          url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
        }
        known.set(item.id, { ...item, url });
        fill(item.id);
      });
    },
    setSelected(ids) {
      selected = [...ids];
      mark();
    },
    setState({ page, pages: last, total, matches, query: text, only_favorites: only, deleted, is_batch: isBatch }) {
      batch = isBatch;
      root.classList.toggle("dw-batch", batch);
      head.hidden = batch || !total;
      if (document.activeElement !== query) query.value = text;
      starred.setAttribute("aria-pressed", String(only));
      const filtered = text || only;
      count.textContent = filtered ? `${matches} of ${total}` : `${total} image${total === 1 ? "" : "s"}`;
      pages.hidden = last < 2;
      place.textContent = `${page + 1} / ${last}`;
      previous.disabled = page <= 0;
      next.disabled = page >= last - 1;
      previous.onclick = () => onPage(page - 1);
      next.onclick = () => onPage(page + 1);
      undo.hidden = !deleted;
      undoText.textContent = deleted;
      empty.hidden = batch || matches > 0;
      empty.replaceChildren(
        make("b", "", { textContent: total ? "No matching images" : "No images yet" }),
        total ? "Change the search, or show all images." : "Write a prompt and press Generate, or Ctrl+Enter.",
      );
    },
    destroy() {
      for (const { url } of known.values()) if (url) URL.revokeObjectURL(url);
    },
  };
}

const STATE = ["page", "pages", "total", "matches", "query", "only_favorites", "deleted", "is_batch"];

export default {
  render({ model, el }) {
    const set = (name, value) => {
      model.set(name, value);
      model.save_changes();
    };
    const gallery = createGallery(el, {
      onSelect: (ids) => set("selected", ids),
      onFavorite: (id, on) => model.send({ kind: "favorite", id, on }),
      onDelete: (id) => model.send({ kind: "delete", id }),
      onUndo: () => model.send({ kind: "undo" }),
      onNeed: (ids) => model.send({ kind: "need", ids }),
      onPage: (page) => set("page", page),
      onQuery: (query) => set("query", query),
      onOnlyFavorites: (only) => set("only_favorites", only),
    });
    const showItems = (message, buffers) => {
      if (message.kind === "items") gallery.setItems(message.items, buffers);
    };
    const showOrder = () => gallery.setOrder(model.get("order"));
    const showSelected = () => gallery.setSelected(model.get("selected"));
    const showState = () => gallery.setState(Object.fromEntries(STATE.map((name) => [name, model.get(name)])));
    const handlers = [["msg:custom", showItems], ["change:order", showOrder], ["change:selected", showSelected]];
    handlers.push(...STATE.map((name) => [`change:${name}`, showState]));
    for (const [name, work] of handlers) model.on(name, work);
    showState();
    showOrder();
    showSelected();
    return () => {
      for (const [name, work] of handlers) model.off(name, work);
      gallery.destroy();
    };
  },
};
