/**
 * A place to drop, paste or choose an image.
 *
 * `createDropZone(root, callbacks)` needs nothing but a browser; the default export adapts it to anywidget and sends
 * the file in pieces, with `pieces.js`, which Python prepends to this file.
 */

export function createDropZone(root, { onFile, onRemove, onProblem, maxBytes = 64 * 2 ** 20 }) {
  root.classList.add("dw-drop");
  const zone = document.createElement("button");
  zone.type = "button";
  zone.className = "dw-drop-zone";
  const shown = document.createElement("img");
  shown.alt = "";
  const text = document.createElement("span");
  const file = Object.assign(document.createElement("input"), {
    type: "file",
    accept: "image/*",
    hidden: true,
    tabIndex: -1,
  });
  const remove = Object.assign(document.createElement("button"), {
    type: "button",
    className: "dw-drop-remove",
    textContent: "Remove",
  });
  zone.append(shown, text);
  root.append(zone, remove, file);
  let url = null;

  const take = (chosen) => {
    if (!chosen) return;
    const problem = tooLarge(chosen, maxBytes);
    if (problem) onProblem(problem);
    else onFile(chosen);
  };
  zone.onclick = () => file.click();
  file.onchange = () => {
    take(file.files[0]);
    file.value = "";
  };
  remove.onclick = () => {
    onRemove();
    zone.focus();
  };
  root.addEventListener("paste", (event) => {
    const [chosen] = event.clipboardData?.files ?? [];
    if (chosen) {
      event.preventDefault();
      event.stopPropagation();
      take(chosen);
    }
  });
  for (const kind of ["dragenter", "dragover"]) {
    root.addEventListener(kind, (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.dataset.over = "true";
    });
  }
  root.addEventListener("dragleave", () => {
    delete zone.dataset.over;
  });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    delete zone.dataset.over;
    take(event.dataTransfer?.files[0]);
  });

  return {
    setLabel(label) {
      text.textContent = label;
      zone.setAttribute("aria-label", label);
    },
    setImage(data) {
      if (url) URL.revokeObjectURL(url);
      url = data?.byteLength ? URL.createObjectURL(new Blob([data])) : null;
      shown.hidden = remove.hidden = !url;
      if (url) shown.src = url;
      else shown.removeAttribute("src");
    },
    destroy() {
      if (url) URL.revokeObjectURL(url);
    },
  };
}

export default {
  render({ model, el }) {
    let turn = Promise.resolve();
    const zone = createDropZone(el, {
      maxBytes: model.get("max_bytes"),
      onFile(chosen) {
        turn = turn.then(() => sendPieces(model, chosen));
      },
      onRemove() {
        model.send({ kind: "remove" });
      },
      onProblem(text) {
        model.send({ kind: "problem", text });
      },
    });
    const showLabel = () => zone.setLabel(model.get("label"));
    const showImage = () => zone.setImage(model.get("_thumbnail"));
    model.on("change:label", showLabel);
    model.on("change:_thumbnail", showImage);
    showLabel();
    showImage();
    return () => {
      model.off("change:label", showLabel);
      model.off("change:_thumbnail", showImage);
      zone.destroy();
    };
  },
};
