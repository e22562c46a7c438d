/**
 * Images as a list of thumbnails: choose one or two, mark favourites, delete.
 *
 * `createGallery(root, callbacks)` needs nothing but a browser; the default export fits it to anywidget.
 */

export function createGallery(root, { onSelect, onFavourite, onDelete }) {
  root.classList.add("dw-gallery");
  root.dataset.lmSuppressShortcuts = "true";
  const list = document.createElement("ul");
  list.setAttribute("aria-label", "Images of this session; shift-click selects a second one");
  root.append(list);
  let selected = [];

  const mark = () => {
    for (const item of list.children)
      item.firstChild.setAttribute("aria-pressed", String(selected.includes(item.dataset.id)));
  };
  const choose = (id, more) => {
    const others = selected.filter((other) => other !== id);
    selected = more ? [...others.slice(-1), ...(others.length < selected.length ? [] : [id])] : [id];
    mark();
    onSelect(selected);
  };
  const act = (text, title, work) => {
    const element = Object.assign(document.createElement("button"), { type: "button", textContent: text, title });
    element.setAttribute("aria-label", title);
    element.onclick = work;
    return element;
  };
  const entry = ({ id, src, caption, favourite }) => {
    const item = document.createElement("li");
    item.dataset.id = id;
    const open = Object.assign(document.createElement("button"), {
      type: "button",
      className: "dw-gallery-open",
      title: caption,
    });
    open.append(Object.assign(document.createElement("img"), { src, alt: caption }));
    open.onclick = (event) => choose(id, event.shiftKey || event.ctrlKey || event.metaKey);
    open.onkeydown = (event) => {
      const step = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
      if (step) {
        event.preventDefault();
        item[step]?.firstChild.focus();
      }
      if (event.key === "Delete") {
        event.preventDefault();
        (item.nextSibling ?? item.previousSibling)?.firstChild.focus();
        onDelete(id);
      }
    };
    const tools = Object.assign(document.createElement("span"), { className: "dw-gallery-tools" });
    const star = act(favourite ? "★" : "☆", favourite ? "No favourite any more" : "Make it a favourite", () =>
      onFavourite(id, !favourite),
    );
    tools.append(
      star,
      act("✕", "Delete", () => onDelete(id)),
    );
    item.append(open, tools);
    return item;
  };

  return {
    setItems(items) {
      const focused = list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
      list.replaceChildren(...items.map(entry));
      if (focused) [...list.children].find((item) => item.dataset.id === focused)?.firstChild.focus();
      mark();
    },
    setSelected(ids) {
      selected = [...ids];
      mark();
    },
  };
}

export default {
  render({ model, el }) {
    const gallery = createGallery(el, {
      onSelect(ids) {
        model.set("selected", ids);
        model.save_changes();
      },
      onFavourite(id, on) {
        model.send({ kind: "favourite", id, on });
      },
      onDelete(id) {
        model.send({ kind: "delete", id });
      },
    });
    const showItems = () => gallery.setItems(model.get("items"));
    const showSelected = () => gallery.setSelected(model.get("selected"));
    model.on("change:items", showItems);
    model.on("change:selected", showSelected);
    showItems();
    showSelected();
    return () => {
      model.off("change:items", showItems);
      model.off("change:selected", showSelected);
    };
  },
};
