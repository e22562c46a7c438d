/**
 * Keeps key events in a panel away from the notebook, and handles the shortcuts of the panel.
 *
 * A notebook handles its shortcuts before the focused element gets the event: with focus on a button, `x` would cut the
 * cell. It skips elements with `data-lm-suppress-shortcuts`, but checks only the focused element itself. Ctrl+Enter
 * presses Generate, Escape closes a menu or presses Stop; other keys with Ctrl or Cmd, such as Ctrl+S, are left to the
 * notebook.
 *
 * Python prepends this file to each of its elements; the first one loaded installs the event listeners.
 */

const OWN = ".dw-panel, .dw-prompt, .dw-mask, .dw-drop, .dw-references, .dw-compare, .dw-gallery, .dw-grid, .dw-grid-toggle, .dw-maps, .dw-code";
const FOCUSABLE = "a[href], button, input, select, textarea, [tabindex]";
const SUPPRESS = "data-lm-suppress-shortcuts";
const KEPT_WITH_CTRL = new Set(["enter", "z", "y", "a", "c", "x", "v", "arrowup", "arrowdown"]);

function press(panel, name) {
  const button = panel?.querySelector(`button.${name}`);
  if (!button || button.disabled) return false;
  button.click();
  return true;
}

export function keepKeys(view = window) {
  if (view.dwKeepsKeys) return;
  view.dwKeepsKeys = true;
  const ownerOf = (target) => (target instanceof view.Element ? target.closest(OWN) : null);
  const suppress = (target) => target.setAttribute(SUPPRESS, "true");
  view.addEventListener(
    "focusin",
    ({ target }) => {
      const owner = ownerOf(target);
      if (!owner) return;
      suppress(target);
      for (const element of owner.querySelectorAll(FOCUSABLE)) suppress(element);
    },
    true,
  );
  view.addEventListener(
    "keydown",
    (event) => {
      const { target } = event;
      if (!ownerOf(target)) return;
      const withCtrl = event.ctrlKey || event.metaKey;
      if (withCtrl && !KEPT_WITH_CTRL.has(event.key.toLowerCase())) target.removeAttribute(SUPPRESS);
      else suppress(target);
      const panel = target.closest(".dw-panel");
      const used =
        (event.key === "Enter" && withCtrl && press(panel, "dw-generate")) ||
        (event.key === "Escape" && target.closest(".dw-prompt")?.dwCloseMenu?.()) ||
        (event.key === "Escape" && !event.isComposing && press(panel, "dw-stop"));
      if (!used) return;
      event.preventDefault();
      event.stopPropagation();
    },
    true,
  );
  view.addEventListener(
    "beforeinput", // JupyterLab prevents undo, redo and line breaks of any field in a notebook
    (event) => {
      const isTheirs = event.inputType.startsWith("history") || event.inputType === "insertLineBreak";
      if (isTheirs && ownerOf(event.target)) event.stopPropagation();
    },
    true,
  );
}

if (typeof window !== "undefined") keepKeys();
