/** A button that opens a list of further actions. The browser closes it on Escape and on a click elsewhere. */
import type { ComponentChildren } from 'preact';
import { useId, useRef, useState } from 'preact/hooks';

interface MenuProps {
  label: ComponentChildren;
  /** Accessible name, if the label is a symbol */
  name?: string | undefined;
  children: ComponentChildren;
}

function moveFocus(event: KeyboardEvent): void {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const buttons = [...(event.currentTarget as HTMLElement).querySelectorAll<HTMLElement>('button:not(:disabled)')];
  const at = buttons.indexOf(document.activeElement as HTMLElement);
  if (step === undefined || buttons.length === 0) return;
  event.preventDefault();
  event.stopPropagation();
  buttons[(at + step + buttons.length) % buttons.length]?.focus();
}

export function Menu({ label, name, children }: MenuProps) {
  const id = useId();
  const button = useRef<HTMLButtonElement>(null);
  const list = useRef<HTMLDivElement>(null);
  const [open, setOpen] = useState(false);
  const place = (event: ToggleEvent) => {
    const opened = event.newState === 'open';
    setOpen(opened);
    if (!opened || !button.current || !list.current) return;
    const [anchor, own] = [button.current.getBoundingClientRect(), list.current.getBoundingClientRect()];
    const below = anchor.bottom + 4 + own.height <= innerHeight;
    const left = Math.max(8, Math.min(anchor.left, innerWidth - own.width - 8));
    const top = below ? anchor.bottom + 4 : Math.max(8, anchor.top - own.height - 4);
    Object.assign(list.current.style, { left: `${left}px`, top: `${top}px` });
    list.current.querySelector<HTMLElement>('button:not(:disabled)')?.focus();
  };
  return (
    <>
      <button ref={button} type="button" aria-label={name} aria-expanded={open} popovertarget={id}>
        {label}
      </button>
      <div
        ref={list}
        id={id}
        popover="auto"
        class="menu"
        role="group"
        aria-label={name ?? (typeof label === 'string' ? label : undefined)}
        onToggle={place}
        onKeyDown={moveFocus}
        onClick={(event) => (event.target as HTMLElement).closest('button') && list.current?.hidePopover()}
      >
        {children}
      </div>
    </>
  );
}
