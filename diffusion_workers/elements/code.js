/** Code to read and to copy. */
export default {
  render({ model, el }) {
    el.classList.add("dw-code");
    const pre = document.createElement("pre");
    pre.tabIndex = 0;
    const copy = Object.assign(document.createElement("button"), { type: "button", className: "dw-copy" });
    const bar = Object.assign(document.createElement("div"), { className: "dw-bar" });
    bar.append(copy);
    el.append(bar, pre);
    const show = () => {
      pre.textContent = model.get("value");
      copy.textContent = "Copy";
    };
    copy.onclick = async () => {
      try {
        await navigator.clipboard.writeText(model.get("value"));
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(pre); // no access to the clipboard, as on a page without HTTPS
        copy.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
      }
    };
    model.on("change:value", show);
    show();
    return () => model.off("change:value", show);
  },
};
