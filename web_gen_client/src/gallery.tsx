/** Generated images, kept in the browser. */
import { signal } from '@preact/signals';
import { useState } from 'preact/hooks';
import { ITEM_TYPE } from './image_input';
import { idsIn } from './images';
import { form, itemAt, items, status, view } from './state';
import { deleteItem, keepInputImages, type GalleryItem } from './storage';

const FIRST_SHOWN = 120;
const addresses = new Map<string, string>();

/** The first image of a comparison, while the second is being chosen. */
export const comparing = signal<string | null>(null);

/** An address under which the page can show an item. */
export function addressOf(item: GalleryItem): string {
  const known = addresses.get(item.id) ?? URL.createObjectURL(item.blob);
  addresses.set(item.id, known);
  return known;
}

export function select(id: string): void {
  const first = comparing.value;
  comparing.value = null;
  view.value = first && first !== id ? { kind: 'compare', a: first, b: id } : { kind: 'item', id };
}

export async function remove(id: string): Promise<void> {
  const at = items.value.findIndex((item) => item.id === id);
  items.value = items.value.filter((item) => item.id !== id);
  const address = addresses.get(id);
  if (address) URL.revokeObjectURL(address);
  addresses.delete(id);
  const next = items.value[Math.min(at, items.value.length - 1)];
  if ('id' in view.value && view.value.id === id) view.value = next ? { kind: 'item', id: next.id } : { kind: 'live' };
  await deleteItem(id);
  await forgetInputImages();
}

async function removeAll(): Promise<void> {
  for (const { id } of items.value) {
    await deleteItem(id);
    URL.revokeObjectURL(addresses.get(id) ?? '');
  }
  addresses.clear();
  items.value = [];
  view.value = { kind: 'live' };
  await forgetInputImages();
  status.value = 'The gallery is empty.';
}

/** Delete input images that neither the form nor an item of the gallery uses. */
function forgetInputImages(): Promise<void> {
  return keepInputImages(
    new Set([form.value, ...items.value.map((item) => item.form)].flatMap((source) => [...idsIn(source)])),
  );
}

function move(event: KeyboardEvent): void {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const buttons = [...(event.currentTarget as HTMLElement).querySelectorAll('button')];
  const at = buttons.indexOf(document.activeElement as HTMLButtonElement);
  const next = step === undefined || at < 0 ? undefined : buttons[at + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.click();
}

function promptOf(item: GalleryItem): string {
  return String(item.plan?.prompt ?? item.form['prompt'] ?? '');
}

function Thumb({ item }: { item: GalleryItem }) {
  const shown =
    (view.value.kind === 'item' && view.value.id === item.id) ||
    (view.value.kind === 'compare' && [view.value.a, view.value.b].includes(item.id)) ||
    comparing.value === item.id;
  const start = (event: DragEvent) => {
    event.dataTransfer?.setData(ITEM_TYPE, item.id);
  };
  const click = (event: MouseEvent) => {
    if (event.shiftKey && view.value.kind === 'item' && itemAt(view.value.id)) comparing.value = view.value.id;
    select(item.id);
  };
  return (
    <li>
      <button
        type="button"
        aria-pressed={shown}
        aria-label={`${promptOf(item)}, seed ${item.seed}`}
        title={`${promptOf(item)}\nseed ${item.seed}`}
        draggable
        onDragStart={start}
        onClick={click}
      >
        <img src={addressOf(item)} alt="" loading="lazy" draggable={false} />
      </button>
    </li>
  );
}

export function Gallery() {
  const [shown, setShown] = useState(FIRST_SHOWN);
  const [asking, setAsking] = useState(false);
  const all = items.value;
  return (
    <section class="gallery" aria-label="Gallery">
      <header>
        <h2>Gallery</h2>
        <span class="note">{all.length || ''}</span>
        <span class="spring" />
        {all.length > 0 &&
          (asking ? (
            <>
              <button type="button" class="danger" onClick={() => (setAsking(false), void removeAll())}>
                Delete all {all.length}
              </button>
              <button type="button" onClick={() => setAsking(false)}>
                Keep
              </button>
            </>
          ) : (
            <button type="button" onClick={() => setAsking(true)}>
              Empty
            </button>
          ))}
      </header>
      {comparing.value && (
        <p class="hint" role="status">
          Choose the second image.{' '}
          <button type="button" onClick={() => (comparing.value = null)}>
            Cancel
          </button>
        </p>
      )}
      {all.length === 0 ? (
        <p class="note">Generated images appear here and stay in this browser.</p>
      ) : (
        <ul class="thumbs" onKeyDown={move}>
          {all.slice(0, shown).map((item) => (
            <Thumb key={item.id} item={item} />
          ))}
        </ul>
      )}
      {all.length > shown && (
        <button type="button" onClick={() => setShown(shown + FIRST_SHOWN)}>
          Show {Math.min(FIRST_SHOWN, all.length - shown)} more
        </button>
      )}
    </section>
  );
}
