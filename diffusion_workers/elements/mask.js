/**
 * A mask that is painted over an image, at the resolution of the image.
 *
 * `createMaskEditor(root, callbacks)` needs nothing but a browser; the default export adapts it to anywidget.
 * A mask is a PNG: white where the image is repainted, black where it stays.
 */

const PAINT = [255, 64, 129];
const UNDO_BYTES = 128 * 2 ** 20;

const button = (label, title, key) => {
  const element = document.createElement("button");
  Object.assign(element, { type: "button", textContent: label, title: key ? `${title} (${key})` : title });
  return element;
};

const imageFrom = async (data) => createImageBitmap(new Blob([data]));

function sameBytes(one, other) {
  // two DataViews
  if (one?.byteLength !== other?.byteLength) return false;
  const [left, right] = [one, other].map((view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength));
  return left.every((value, at) => value === right[at]);
}

/** Paint where a mask is light; `invert` paints where it is dark. */
function fillFromMask(pen, bitmap) {
  const { width, height } = pen.canvas;
  pen.clearRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i] * (pixels.data[i + 3] / 255) > 127;
    pixels.data.set([...PAINT, on ? 255 : 0], i);
  }
  pen.putImageData(pixels, 0, 0);
}

/** The mask as a PNG, encoded synchronously: an async encoder can miss the request sent right after the stroke. */
function maskBytes(layer) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [layer.width, layer.height];
  const pen = canvas.getContext("2d");
  const pixels = layer.getContext("2d").getImageData(0, 0, layer.width, layer.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const value = pixels.data[i + 3] > 127 ? 255 : 0;
    pixels.data.set([value, value, value, 255], i);
  }
  pen.putImageData(pixels, 0, 0);
  const text = atob(canvas.toDataURL("image/png").split(",")[1]);
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}

export function createMaskEditor(root, { onMask, onFeather, onProblem }) {
  root.classList.add("dw-mask");
  const bar = document.createElement("div");
  bar.className = "dw-bar";
  bar.setAttribute("role", "toolbar");
  bar.setAttribute("aria-label", "Mask");
  const stage = document.createElement("div");
  stage.className = "dw-mask-stage";
  const back = document.createElement("canvas");
  const layer = document.createElement("canvas");
  layer.tabIndex = 0;
  layer.className = "dw-mask-layer";
  layer.setAttribute("role", "application");
  layer.setAttribute(
    "aria-label",
    "Mask: drag to paint; arrow keys move the brush, space paints, E erases, Z undoes, Y redoes, I inverts, " +
      "[ and ] change the size of the brush, + and - zoom, 0 fits",
  );
  const ring = document.createElement("div");
  ring.className = "dw-mask-ring";
  const sheet = document.createElement("div");
  sheet.className = "dw-mask-sheet";
  sheet.append(back, layer, ring);
  stage.append(sheet);
  const pen = layer.getContext("2d", { willReadFrequently: true });
  const state = { erase: false, brush: 24, undo: [], redo: [], last: null, at: null, zoom: 1, drag: null };

  const paint = button("Paint", "Paint the mask", "B");
  const erase = button("Erase", "Erase paint", "E");
  const undo = button("Undo", "Undo the last change", "Z");
  const redo = button("Redo", "Redo the last change", "Y");
  const invert = button("Invert", "Invert the mask", "I");
  const clear = button("Clear", "Clear the mask");
  const upload = button("Load…", "Load a mask file: white is painted");
  const zoomOut = button("−", "Zoom out", "-");
  const zoomIn = button("+", "Zoom in", "+");
  const fit = button("100 %", "Fit the whole image", "0");
  zoomOut.setAttribute("aria-label", "Zoom out");
  zoomIn.setAttribute("aria-label", "Zoom in");
  const zoomGroup = document.createElement("span");
  zoomGroup.className = "dw-group";
  zoomGroup.append(zoomOut, fit, zoomIn);
  const file = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", hidden: true });
  const size = Object.assign(document.createElement("input"), { type: "range", min: 1, max: 256, value: state.brush });
  const feather = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 256, value: 4 });
  const labeled = (text, input) => {
    const label = document.createElement("label");
    const output = document.createElement("output");
    const show = () => {
      output.textContent = `${input.value} px`;
    };
    input.addEventListener("input", show);
    show();
    label.append(text, input, output);
    return { label, show };
  };
  const sizeLabel = labeled("Brush", size);
  const featherLabel = labeled("Feather", feather);
  const hint = document.createElement("div");
  hint.className = "dw-hint";
  hint.textContent = "Shift+wheel: brush size · Ctrl+wheel: zoom · drag with the middle button or Alt: move";
  bar.append(paint, erase, undo, redo, invert, clear, upload, file, sizeLabel.label, featherLabel.label, zoomGroup);
  root.append(bar, stage, hint);

  const scale = () => layer.getBoundingClientRect().width / layer.width || 1;
  const showRing = () => {
    ring.hidden = !state.at;
    if (!state.at) return;
    const factor = scale();
    const diameter = state.brush * factor;
    Object.assign(ring.style, {
      width: `${diameter}px`,
      height: `${diameter}px`,
      left: `${state.at.x * factor - diameter / 2}px`,
      top: `${state.at.y * factor - diameter / 2}px`,
    });
  };
  const showTools = () => {
    paint.setAttribute("aria-pressed", String(!state.erase));
    erase.setAttribute("aria-pressed", String(state.erase));
    undo.disabled = !state.undo.length;
    redo.disabled = !state.redo.length;
    layer.style.filter = Number(feather.value) ? `blur(${(Number(feather.value) * scale()) / 2}px)` : "";
    showRing();
  };
  const snapshot = () => pen.getImageData(0, 0, layer.width, layer.height);
  const remember = () => {
    state.undo.push(snapshot());
    state.redo = [];
    while (state.undo.length > 1 && state.undo.length * layer.width * layer.height * 4 > UNDO_BYTES) state.undo.shift();
  };
  const changed = () => {
    showTools();
    onMask(maskBytes(layer));
  };
  const change = (work) => {
    remember();
    work();
    changed();
  };
  const dab = (from, to) => {
    pen.globalCompositeOperation = state.erase ? "destination-out" : "source-over";
    pen.strokeStyle = pen.fillStyle = `rgb(${PAINT})`;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = state.brush;
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
  };
  const point = (event) => {
    const box = layer.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * layer.width) / box.width,
      y: ((event.clientY - box.top) * layer.height) / box.height,
    };
  };
  layer.addEventListener("pointerdown", (event) => {
    if (event.button === 1 || (event.button === 0 && event.altKey)) {
      event.preventDefault();
      layer.setPointerCapture(event.pointerId);
      state.drag = { x: event.clientX + stage.scrollLeft, y: event.clientY + stage.scrollTop };
      return;
    }
    if (event.button) return;
    layer.setPointerCapture(event.pointerId);
    remember();
    state.last = state.at = point(event);
    dab(state.last, state.last);
    showRing();
  });
  layer.addEventListener("pointermove", (event) => {
    if (state.drag) {
      stage.scrollTo(state.drag.x - event.clientX, state.drag.y - event.clientY);
      return;
    }
    state.at = point(event);
    showRing();
    if (!state.last) return;
    dab(state.last, state.at);
    state.last = state.at;
  });
  const end = () => {
    state.drag = null;
    if (!state.last) return;
    state.last = null;
    changed();
  };
  layer.addEventListener("pointerup", end);
  layer.addEventListener("pointercancel", end);
  layer.addEventListener("pointerleave", () => {
    if (!state.last) {
      state.at = null;
      showRing();
    }
  });

  const setErase = (on) => {
    state.erase = on;
    showTools();
  };
  const setBrush = (value) => {
    state.brush = Math.min(256, Math.max(1, value));
    size.value = state.brush;
    sizeLabel.show();
    showRing();
  };
  const step = (from, to) => {
    const other = from.pop();
    if (!other) return;
    to.push(snapshot());
    pen.putImageData(other, 0, 0);
    changed();
  };
  const undoOne = () => step(state.undo, state.redo);
  const redoOne = () => step(state.redo, state.undo);
  /** Zoom around the pointer, given in client coordinates. */
  const setZoom = (value, at) => {
    const box = stage.getBoundingClientRect();
    const x = (at?.x ?? box.left + box.width / 2) - box.left;
    const y = (at?.y ?? box.top + box.height / 2) - box.top;
    const zoom = Math.min(8, Math.max(1, value));
    const [left, top] = [(stage.scrollLeft + x) / state.zoom, (stage.scrollTop + y) / state.zoom];
    state.zoom = zoom;
    sheet.style.width = `${100 * zoom}%`;
    stage.scrollTo(left * zoom - x, top * zoom - y);
    fit.textContent = `${Math.round(100 * zoom)} %`;
    zoomOut.disabled = zoom === 1;
    zoomIn.disabled = zoom === 8;
    showTools();
  };
  const invertAll = () =>
    change(() => {
      const pixels = pen.getImageData(0, 0, layer.width, layer.height);
      for (let i = 0; i < pixels.data.length; i += 4)
        pixels.data.set([...PAINT, pixels.data[i + 3] > 127 ? 0 : 255], i);
      pen.putImageData(pixels, 0, 0);
    });
  const clearAll = () => change(() => pen.clearRect(0, 0, layer.width, layer.height));
  const move = (dx, dy, event) => {
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(state.brush / 3));
    const from = state.at || { x: layer.width / 2, y: layer.height / 2 };
    state.at = {
      x: Math.min(layer.width, Math.max(0, from.x + dx * step)),
      y: Math.min(layer.height, Math.max(0, from.y + dy * step)),
    };
    showRing();
  };
  layer.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.shiftKey) return;
      event.preventDefault();
      const up = (event.deltaY || event.deltaX) < 0;
      if (event.ctrlKey) setZoom(state.zoom * (up ? 1.25 : 0.8), { x: event.clientX, y: event.clientY });
      else setBrush(Math.round(up ? state.brush * 1.15 + 1 : state.brush / 1.15 - 1));
      state.at = point(event);
      showRing();
    },
    { passive: false },
  );
  const keys = {
    ArrowLeft: (event) => move(-1, 0, event),
    ArrowRight: (event) => move(1, 0, event),
    ArrowUp: (event) => move(0, -1, event),
    ArrowDown: (event) => move(0, 1, event),
    " ": () => {
      state.at ||= { x: layer.width / 2, y: layer.height / 2 };
      change(() => dab(state.at, state.at));
    },
    b: () => setErase(false),
    e: () => setErase(true),
    z: (event) => (event.shiftKey ? redoOne() : undoOne()),
    y: redoOne,
    "+": () => setZoom(state.zoom * 1.25),
    "-": () => setZoom(state.zoom / 1.25),
    0: () => setZoom(1),
    i: invertAll,
    "[": () => setBrush(state.brush - 4),
    "]": () => setBrush(state.brush + 4),
  };
  layer.addEventListener("keydown", (event) => {
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const withCtrl = event.ctrlKey || event.metaKey;
    if (!act || event.altKey || (withCtrl && !"zy".includes(event.key.toLowerCase()))) return;
    event.preventDefault();
    event.stopPropagation();
    act(event);
  });
  paint.onclick = () => setErase(false);
  erase.onclick = () => setErase(true);
  undo.onclick = undoOne;
  redo.onclick = redoOne;
  zoomIn.onclick = () => setZoom(state.zoom * 1.25);
  zoomOut.onclick = () => setZoom(state.zoom / 1.25);
  fit.onclick = () => setZoom(1);
  invert.onclick = invertAll;
  clear.onclick = clearAll;
  upload.onclick = () => file.click();
  file.onchange = async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      const bitmap = await imageFrom(chosen);
      change(() => fillFromMask(pen, bitmap));
      onProblem("");
    } catch {
      onProblem(`${chosen.name} is not an image that the browser can read; use a PNG, JPEG or WebP`);
    }
  };
  size.addEventListener("input", () => setBrush(Number(size.value)));
  feather.addEventListener("input", () => {
    showTools();
    onFeather(Number(feather.value));
  });
  showTools();

  const setMask = (bitmap) => {
    if (bitmap) fillFromMask(pen, bitmap);
    else pen.clearRect(0, 0, layer.width, layer.height);
    showTools();
  };
  const decoded = (data) => (data?.byteLength ? imageFrom(data) : null);
  stage.hidden = bar.hidden = hint.hidden = true;

  return {
    /** Show another image and its mask. Nothing can be painted before both are loaded. */
    async setImage(data, width, height, mask) {
      root.inert = true;
      try {
        const [image, bitmap] = await Promise.all([decoded(data), decoded(mask)]);
        for (const canvas of [back, layer]) [canvas.width, canvas.height] = [width || 1, height || 1];
        stage.style.setProperty("--dw-width", `${Math.max(256, Math.min(width, 640))}px`);
        stage.style.aspectRatio = `${width || 1} / ${height || 1}`;
        state.undo = [];
        state.redo = [];
        setZoom(1);
        setBrush(Math.max(4, Math.round(Math.min(width, height) / 6)));
        if (image) back.getContext("2d").drawImage(image, 0, 0, width, height);
        stage.hidden = bar.hidden = hint.hidden = !image;
        setMask(bitmap);
      } finally {
        root.inert = false;
      }
    },
    async setMask(data) {
      setMask(await decoded(data));
    },
    setFeather(value) {
      feather.value = value;
      featherLabel.show();
      showTools();
    },
  };
}

export default {
  async render({ model, el }) {
    let own = null;
    const editor = createMaskEditor(el, {
      onMask(bytes) {
        own = new DataView(bytes.buffer);
        model.set("_mask", own);
        model.save_changes();
      },
      onFeather(value) {
        model.set("feather", value);
        model.save_changes();
      },
      onProblem(text) {
        model.set("problem", text);
        model.save_changes();
      },
    });
    let turn = Promise.resolve();
    const inTurn = (work) => {
      turn = turn.then(work, work);
      return turn;
    };
    const show = () =>
      inTurn(() =>
        editor.setImage(model.get("_background"), model.get("width"), model.get("height"), model.get("_mask")),
      );
    const showMask = () => {
      if (!own || !sameBytes(model.get("_mask"), own)) inTurn(() => editor.setMask(model.get("_mask")));
    };
    const showFeather = () => editor.setFeather(model.get("feather"));
    model.on("change:_background", show);
    model.on("change:_mask", showMask);
    model.on("change:feather", showFeather);
    showFeather();
    await show();
    return () => {
      model.off("change:_background", show);
      model.off("change:_mask", showMask);
      model.off("change:feather", showFeather);
    };
  },
};
