/**
 * Two images under one slider, or what differs between them as a heat map.
 *
 * `createComparison(root)` needs nothing but a browser; the default export adapts it to anywidget.
 */

export function createComparison(root) {
  root.classList.add("dw-compare");
  const stage = document.createElement("div");
  stage.className = "dw-compare-stage";
  const names = ["left", "right", "difference"];
  const images = Object.fromEntries(
    names.map((name) => [
      name,
      Object.assign(document.createElement("img"), { className: `dw-compare-${name}`, draggable: false }),
    ]),
  );
  const line = Object.assign(document.createElement("div"), { className: "dw-compare-line" });
  stage.append(images.right, images.left, images.difference, line);
  const slider = Object.assign(document.createElement("input"), {
    type: "range",
    min: 0,
    max: 100,
    value: 50,
    step: 1,
  });
  slider.setAttribute("aria-label", "How much of the left image is shown");
  const heat = Object.assign(document.createElement("input"), { type: "checkbox" });
  const label = document.createElement("label");
  label.append(heat, " difference");
  const bar = Object.assign(document.createElement("div"), { className: "dw-bar" });
  bar.append(slider, label);
  root.append(stage, bar);
  const urls = {};

  const show = () => {
    images.left.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
    line.style.left = `${slider.value}%`;
    line.hidden = heat.checked;
    images.difference.hidden = !heat.checked;
    slider.disabled = heat.checked;
  };
  slider.addEventListener("input", show);
  heat.addEventListener("change", show);
  const slide = (event) => {
    if (!event.buttons || heat.checked) return;
    const box = stage.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  stage.addEventListener("pointerdown", slide);
  stage.addEventListener("pointermove", slide);
  show();

  return {
    setImage(name, data, caption) {
      if (urls[name]) URL.revokeObjectURL(urls[name]);
      urls[name] = data?.byteLength ? URL.createObjectURL(new Blob([data])) : "";
      images[name].src = urls[name];
      images[name].alt = caption;
    },
    /** Images of different sizes have no difference to show. */
    setComparable(comparable) {
      label.hidden = !comparable;
    },
    setWidth(width) {
      stage.style.setProperty("--dw-width", `${Math.max(256, Math.min(width, 640))}px`);
    },
    destroy() {
      for (const url of Object.values(urls)) if (url) URL.revokeObjectURL(url);
    },
  };
}

export default {
  render({ model, el }) {
    const comparison = createComparison(el);
    const show = () => {
      comparison.setWidth(model.get("width"));
      comparison.setComparable(model.get("_difference")?.byteLength > 0);
      for (const name of ["left", "right", "difference"]) comparison.setImage(name, model.get(`_${name}`), name);
    };
    model.on("change:_difference", show);
    show();
    return () => {
      model.off("change:_difference", show);
      comparison.destroy();
    };
  },
};
