/**
 * A prompt: a text area with counted tokens, marked mistakes, completion and weights by Ctrl+Up and Ctrl+Down.
 *
 * Marks are drawn in a layer behind the text area that mirrors its text. Insertions go through the browser's own
 * editing, so that they can be undone.
 */

const STEP = 0.1;
const MOST_SHOWN = 8;
const MOST_MARKED = 10000; // characters

/** Text, selection start and end after changing a weight; null if there is nothing to weight. */
export function weighed(text, start, end, up) {
  if (start === end) {
    const before = text.slice(0, start).match(/[^\s,()[\]{}:|<>]*$/)[0].length;
    const after = text.slice(end).match(/^[^\s,()[\]{}:|<>]*/)[0].length;
    [start, end] = [start - before, end + after];
  }
  while (start < end && /\s/.test(text[start])) start++;
  while (end > start && /\s/.test(text[end - 1])) end--;
  if (start === end) return null;
  const behind = text.slice(end).match(/^:([+-]?[\d.]+)\)/);
  const isWeighed = text[start - 1] === "(" && text[start - 2] !== "\\" && behind && !Number.isNaN(Number(behind[1]));
  const [from, to] = isWeighed ? [start - 1, end + behind[0].length] : [start, end];
  const before = isWeighed ? Number(behind[1]) : 1;
  const weight = Math.round(Math.max(0, before + (up ? STEP : -STEP)) * 100) / 100;
  const words = text.slice(start, end);
  const shown = weight === 1 ? words : `(${words}:${weight})`;
  const at = from + (weight === 1 ? 0 : 1);
  return { from, to, shown, start: at, end: at + words.length };
}

/** The word before the caret, and the names that begin with it. */
export function completions(text, caret, names, withSyntax) {
  const before = text.slice(0, caret);
  const tag = withSyntax && before.match(/<(?:lora|lyco):([^<>:]*)$/);
  const wildcard = withSyntax && !tag && before.match(/__([\w*/.-]*)$/);
  const word = (tag || wildcard || before.match(/[^\s,()[\]{}:|<>"]{2,}$/) || [null])[0];
  if (word === null) return { word: "", found: [] };
  const start = (tag ? tag[1] : wildcard ? wildcard[1] : word).toLowerCase();
  const fits = ({ kind }) => (tag ? kind === "lora" : wildcard ? kind === "wildcard" : kind !== "wildcard");
  const found = [];
  for (const each of names) {
    const name = each.text.toLowerCase();
    const isNew = name !== start || each.kind === "lora" || each.kind === "style" || tag || wildcard;
    if (fits(each) && name.startsWith(start) && isNew) found.push(each);
    if (found.length === MOST_SHOWN) break;
  }
  return { word, found, isTag: Boolean(tag) };
}

const freshId = () => `dw-prompt-${Math.random().toString(36).slice(2)}`;

function make(tag, className, more = {}) {
  return Object.assign(document.createElement(tag), { className }, more);
}

/** An editor in `root`; with an `id`, the caller provides the label. `area` is its text area. */
export function createPrompt(root, { onInput, onAdd, id: given }) {
  const id = given ?? freshId();
  root.classList.add("dw-prompt", "jupyter-widgets", "widget-inline-hbox");
  const label = make("label", "widget-label", { htmlFor: id });
  const column = make("div", "dw-prompt-column");
  const box = make("div", "dw-prompt-box");
  const layer = make("div", "dw-prompt-layer", { ariaHidden: "true" });
  const area = make("textarea", "dw-prompt-text", { id, spellcheck: false });
  const menu = make("ul", "dw-prompt-menu", { id: `${id}-menu`, hidden: true });
  const note = make("div", "dw-prompt-note", { id: `${id}-note` });
  menu.setAttribute("role", "listbox");
  area.setAttribute("aria-describedby", note.id);
  area.setAttribute("aria-autocomplete", "list");
  area.setAttribute("aria-controls", menu.id);
  box.append(layer, area);
  column.append(box, menu, note);
  if (!given) root.append(label);
  root.append(column);
  let names = [];
  let withSyntax = false;
  let annotation = {};
  let offered = { word: "", found: [] };
  let chosen = -1;

  const paint = () => {
    layer.replaceChildren();
    note.replaceChildren();
    const isOf = annotation.text === area.value && area.value.length <= MOST_MARKED;
    if (!isOf) return;
    const { marks = [], borders = [], text } = annotation;
    const characters = [...text]; // code points, as in Python
    const cuts = [...new Set([0, characters.length, ...borders, ...marks.flatMap((each) => [each.start, each.end])])];
    cuts.sort((one, other) => one - other);
    cuts.forEach((from, index) => {
      if (borders.includes(from)) layer.append(make("span", "dw-prompt-border"));
      const to = cuts[index + 1];
      if (to === undefined) return;
      const mark = marks.find((each) => each.start <= from && to <= each.end);
      const part = make(mark ? "mark" : "span", "", { textContent: characters.slice(from, to).join("") });
      layer.append(part);
    });
    layer.append("\n"); // gives an empty last line its height
    layer.scrollTop = area.scrollTop;
    if (annotation.note) note.append(make("span", "dw-prompt-count", { textContent: annotation.note }));
    for (const each of marks.slice(0, 3)) {
      const jump = make("button", "dw-prompt-mistake", { type: "button" });
      jump.textContent = `character ${each.start + 1}: ${each.message}`;
      jump.onclick = () => {
        const places = [each.start, each.end].map((at) => characters.slice(0, at).join("").length);
        area.focus();
        area.setSelectionRange(...places);
      };
      note.append(jump);
    }
  };

  const replace = (from, to, text) => {
    area.focus();
    area.setSelectionRange(from, to);
    if (!document.execCommand(text ? "insertText" : "delete", false, text)) {
      area.setRangeText(text, from, to, "end");
      area.dispatchEvent(new InputEvent("input", { bubbles: true }));
    }
  };

  const close = () => {
    menu.hidden = true;
    chosen = -1;
    area.removeAttribute("aria-activedescendant");
  };

  const accept = (each) => {
    const caret = area.selectionEnd;
    const from = caret - offered.word.length;
    const { isTag } = offered;
    close();
    if (isTag) replace(from, caret, `<lora:${each.text}:1>`);
    else if (each.kind === "wildcard") replace(from, caret, `__${each.text}__`);
    else if (each.kind === "lora" || each.kind === "style") {
      replace(from, caret, "");
      onAdd(each.kind, each.text);
    } else replace(from, caret, each.text);
    close();
  };

  const show = () => {
    menu.replaceChildren();
    offered.found.forEach((each, index) => {
      const item = make("li", "", { id: `${id}-${index}` });
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", String(index === chosen));
      const what = each.kind === "lora" && !offered.isTag ? "add this LoRA" : each.kind === "style" ? "add this style" : each.note;
      item.append(make("span", "", { textContent: each.text }), make("small", "", { textContent: what }));
      item.onmousedown = (event) => {
        event.preventDefault(); // the focus stays in the text
        accept(each);
      };
      menu.append(item);
    });
    menu.hidden = !offered.found.length;
    if (chosen >= 0) area.setAttribute("aria-activedescendant", `${id}-${chosen}`);
    else area.removeAttribute("aria-activedescendant");
  };

  const offer = () => {
    offered = area.selectionStart === area.selectionEnd
      ? completions(area.value, area.selectionEnd, names, withSyntax)
      : { word: "", found: [] };
    chosen = -1;
    show();
  };

  area.addEventListener("input", () => {
    paint();
    offer();
    onInput(area.value);
  });
  area.addEventListener("scroll", () => (layer.scrollTop = area.scrollTop));
  area.addEventListener("blur", close);
  area.addEventListener("click", close);
  // runs before the window listener, so that Escape stops a generation only if the menu is closed
  area.addEventListener("keydown", (event) => {
    const isWeight = (event.ctrlKey || event.metaKey) && (event.key === "ArrowUp" || event.key === "ArrowDown");
    if (isWeight) {
      event.preventDefault();
      const change = weighed(area.value, area.selectionStart, area.selectionEnd, event.key === "ArrowUp");
      if (!change) return;
      replace(change.from, change.to, change.shown);
      area.setSelectionRange(change.start, change.end);
      close();
      return;
    }
    if (menu.hidden || event.isComposing) return;
    const count = offered.found.length;
    if (event.key === "ArrowDown") chosen = (chosen + 1) % count;
    else if (event.key === "ArrowUp") chosen = chosen < 0 ? count - 1 : chosen - 1;
    else if (event.key === "Tab" && !event.shiftKey) accept(offered.found[Math.max(chosen, 0)]);
    else if (event.key === "Enter" && chosen >= 0 && !event.ctrlKey) accept(offered.found[chosen]);
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (!menu.hidden) show();
  });

  return {
    area,
    note,
    close: () => {
      const wasOpen = !menu.hidden;
      close();
      return wasOpen;
    },
    set(name, value) {
      if (name === "value") {
        if (area.value !== value) area.value = value;
        paint();
      } else if (name === "description") label.textContent = value;
      else if (name === "placeholder") area.placeholder = value;
      else if (name === "tooltip") label.title = area.title = value;
      else if (name === "rows") area.rows = value;
      else if (name === "names") names = value;
      else if (name === "with_syntax") withSyntax = value;
      else if (name === "annotation") {
        annotation = value;
        paint();
      }
    },
  };
}

const TRAITS = ["description", "placeholder", "tooltip", "rows", "names", "with_syntax", "value", "annotation"];

export default {
  render({ model, el }) {
    const prompt = createPrompt(el, {
      onInput(text) {
        model.set("value", text);
        model.save_changes();
      },
      onAdd: (kind, name) => model.send({ kind, name }),
    });
    el.dwCloseMenu = prompt.close;
    const listeners = TRAITS.map((name) => [`change:${name}`, () => prompt.set(name, model.get(name))]);
    for (const [event, listener] of listeners) {
      model.on(event, listener);
      listener();
    }
    return () => listeners.forEach(([event, listener]) => model.off(event, listener));
  },
};
