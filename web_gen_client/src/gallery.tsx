/** Generated images: those that this browser keeps, and those in the folder of the server. */
import { computed, effect, signal } from '@preact/signals';
import type { Output } from 'ez-diffusion-client';
import { useEffect, useRef, useState } from 'preact/hooks';
import { changeInFolder, deleteFromFolder, fileOf, folder, folderProblem, openOutput, readFolder } from './folder';
import { ITEM_TYPE } from './image_input';
import { Menu } from './menu';
import { announce, health, itemAt, items, status, view } from './state';
import { deleteItems, loadItems, saveItems, type GalleryItem } from './storage';
import { onMessage } from './sync';
import { zip } from './zip';

const FIRST_SHOWN = 120;
const ZIP_LIMIT = 2000;
const addresses = new Map<string, string>();

/** The first image of a comparison, while the second is being chosen. */
export const comparing = signal<string | null>(null);
const query = signal('');
const onlyStarred = signal(false);
export const source = signal<'browser' | 'folder'>('browser');

/** The cached object URL of an item. */
export function addressOf(item: GalleryItem): string {
  const known = addresses.get(item.id) ?? URL.createObjectURL(item.blob);
  addresses.set(item.id, known);
  return known;
}

export function promptOf(item: GalleryItem): string {
  return String(item.plan?.prompt ?? item.form['prompt'] ?? '');
}

const found = computed(() => {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  return items.value.filter((item) => {
    const prompt = promptOf(item).toLowerCase();
    return (item.starred || !onlyStarred.value) && words.every((word) => prompt.includes(word));
  });
});

/** Items over the storage quota, which live only in this tab. */
const unsaved = new Map<string, GalleryItem>();

async function reload(): Promise<void> {
  const stored = await loadItems();
  items.value = [...unsaved.values(), ...stored].sort((a, b) => b.created - a.created);
  const gone = (id: string) => !itemAt(id);
  const now = view.value;
  if (now.kind === 'item' && gone(now.id)) view.value = { kind: 'live' };
}

/** Follow changes in other tabs, and reload the server's folder (debounced) when the filter changes. */
export function followGalleries(): void {
  onMessage((message) => message.kind === 'gallery' && void reload());
  let timer: ReturnType<typeof setTimeout> | undefined;
  effect(() => {
    const wanted = { query: query.value, starred: onlyStarred.value };
    if (source.value !== 'folder') return;
    clearTimeout(timer);
    timer = setTimeout(() => void readFolder(wanted), folder.value ? 250 : 0);
  });
}

/** Add new images to the gallery; those over the storage quota last until a reload. */
export async function keepItems(made: readonly GalleryItem[]): Promise<void> {
  items.value = [...made, ...items.value];
  try {
    await saveItems(made);
  } catch {
    for (const item of made) unsaved.set(item.id, item);
    status.value = 'Browser storage is full: this image will be lost on reload.';
  }
  if (source.value === 'folder') setTimeout(() => void readFolder(), 500);
}

export function select(id: string): void {
  const first = comparing.value;
  comparing.value = null;
  view.value = first && first !== id ? { kind: 'compare', a: first, b: id } : { kind: 'item', id };
}

/** Delete images and offer an undo. */
async function removeItems(gone: readonly GalleryItem[], text: string): Promise<void> {
  const before = view.value;
  const ids = new Set(gone.map((item) => item.id));
  const at = items.value.findIndex((item) => ids.has(item.id));
  items.value = items.value.filter((item) => !ids.has(item.id));
  const next = items.value[Math.min(at, items.value.length - 1)];
  if (before.kind === 'item' && ids.has(before.id))
    view.value = next ? { kind: 'item', id: next.id } : { kind: 'live' };
  if (before.kind === 'batch' || before.kind === 'compare') view.value = { kind: 'live' };
  for (const id of ids) unsaved.delete(id);
  announce(text, () => void bringBackItems(gone, before));
  await deleteItems(gone);
}

async function bringBackItems(gone: readonly GalleryItem[], before: typeof view.value): Promise<void> {
  await saveItems(gone.map(({ deleted: _deleted, ...item }) => item));
  await reload();
  view.value = before;
}

export async function remove(item: GalleryItem): Promise<void> {
  if (items.value.includes(item)) return removeItems([item], 'Image deleted.');
  view.value = { kind: 'live' };
  return deleteFromFolder(item.id);
}

export async function toggleStar(item: GalleryItem): Promise<void> {
  const starred = !item.starred;
  if (!items.value.some((other) => other.id === item.id)) return changeInFolder(item.id, { starred });
  const changed = { ...item, starred };
  items.value = items.value.map((other) => (other.id === item.id ? changed : other));
  await saveItems([changed]);
}

export function fileName(item: { prompt: string; seed: number; type: string }): string {
  const words = item.prompt
    .slice(0, 200)
    .replaceAll(/[^\p{L}\p{N}]+/gu, '-')
    .slice(0, 48);
  return `${words || 'image'}-${item.seed}.${item.type.split('/')[1] ?? 'png'}`;
}

export function saveFile(blob: Blob, name: string): void {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Every image that matches, as one file. */
async function downloadAll(): Promise<void> {
  const files: { name: string; blob: Blob; created: number }[] = [];
  if (source.value === 'browser') {
    for (const item of found.value)
      files.push({
        name: fileName({ prompt: promptOf(item), seed: item.seed, type: item.blob.type }),
        blob: item.blob,
        created: item.created,
      });
  } else {
    while (folder.value?.next && folder.value.outputs.length < ZIP_LIMIT) await readFolder(undefined, true);
    for (const output of folder.value?.outputs.slice(0, ZIP_LIMIT) ?? []) {
      status.value = `Reading ${files.length + 1} of ${folder.value?.total ?? 0} …`;
      const name = fileName({ ...output, type: `image/${output.format}` });
      files.push({ name, blob: await fileOf(output.id), created: Date.parse(output.created) });
    }
  }
  const entries = await Promise.all(
    files.map(async ({ name, blob, created }, index) => ({
      name: `${String(index + 1).padStart(4, '0')}-${name}`,
      data: new Uint8Array(await blob.arrayBuffer()),
      date: new Date(created),
    })),
  );
  saveFile(zip(entries), 'images.zip');
  status.value = `${entries.length} ${entries.length === 1 ? 'image' : 'images'} in images.zip.`;
}

async function attempt(work: () => Promise<unknown>): Promise<void> {
  try {
    await work();
  } catch (error) {
    status.value = error instanceof Error ? error.message : String(error);
  }
}

function move(event: KeyboardEvent): void {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const buttons = [...(event.currentTarget as HTMLElement).querySelectorAll('button')];
  const at = buttons.indexOf(document.activeElement as HTMLButtonElement);
  const item = view.value.kind === 'item' ? itemAt(view.value.id) : undefined;
  if (event.key === 'Delete' && item) return void remove(item);
  const next = step === undefined || at < 0 ? undefined : buttons[at + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.click();
}

function isShown(id: string): boolean {
  const now = view.value;
  if (now.kind === 'item') return now.id === id || comparing.value === id;
  if (now.kind === 'compare') return now.a === id || now.b === id;
  return comparing.value === id || (now.kind === 'batch' && now.ids.includes(id));
}

interface ThumbProps {
  id: string;
  prompt: string;
  seed: number;
  starred: boolean;
  address: string | undefined;
  open: () => void;
}

function Thumb({ id, prompt, seed, starred, address, open }: ThumbProps) {
  const click = (event: MouseEvent) => {
    if (event.shiftKey && view.value.kind === 'item' && itemAt(view.value.id)) comparing.value = view.value.id;
    open();
  };
  return (
    <li>
      <button
        type="button"
        aria-pressed={isShown(id)}
        aria-label={`${prompt}, seed ${seed}${starred ? ', starred' : ''}`}
        title={`${prompt}\nseed ${seed}`}
        draggable
        onDragStart={(event) => event.dataTransfer?.setData(ITEM_TYPE, id)}
        onClick={click}
      >
        {address && <img src={address} alt="" loading="lazy" draggable={false} />}
      </button>
      {starred && (
        <span class="star" aria-hidden="true">
          ★
        </span>
      )}
    </li>
  );
}

/** The thumbnail of an image of the folder, fetched when it comes into view. */
function OutputThumb({ output }: { output: Output }) {
  const place = useRef<HTMLDivElement>(null);
  const [address, setAddress] = useState<string>();
  useEffect(() => {
    let made = '';
    const element = place.current?.parentElement;
    const watching = new IntersectionObserver(([entry]) => {
      if (!entry?.isIntersecting) return;
      watching.disconnect();
      void attempt(async () => setAddress((made = URL.createObjectURL(await fileOf(output.id, true)))));
    });
    if (element) watching.observe(element);
    return () => (watching.disconnect(), URL.revokeObjectURL(made));
  }, [output.id]);
  const open = () => void attempt(async () => select((await openOutput(output)).id));
  return (
    <div class="contents" ref={place}>
      <Thumb {...output} address={address} open={open} />
    </div>
  );
}

function FolderList() {
  const listed = folder.value;
  if (folderProblem.value)
    return (
      <p class="note" role="alert">
        {folderProblem.value}
      </p>
    );
  if (!listed) return <p class="note">Reading …</p>;
  return (
    <>
      {listed.outputs.length === 0 && <p class="note">No matching images.</p>}
      <ul class="thumbs" onKeyDown={move}>
        {listed.outputs.map((output) => (
          <OutputThumb key={output.id} output={output} />
        ))}
      </ul>
      {listed.next && (
        <button type="button" onClick={() => void readFolder(undefined, true)}>
          Show more
        </button>
      )}
    </>
  );
}

function BrowserList() {
  const [shown, setShown] = useState(FIRST_SHOWN);
  const all = found.value;
  if (items.value.length === 0) return <p class="note">Generated images appear here and stay in this browser.</p>;
  return (
    <>
      {all.length === 0 && <p class="note">No matching images.</p>}
      <ul class="thumbs" onKeyDown={move}>
        {all.slice(0, shown).map((item) => (
          <Thumb
            key={item.id}
            id={item.id}
            prompt={promptOf(item)}
            seed={item.seed}
            starred={item.starred === true}
            address={addressOf(item)}
            open={() => select(item.id)}
          />
        ))}
      </ul>
      {all.length > shown && (
        <button type="button" onClick={() => setShown(shown + FIRST_SHOWN)}>
          Show {Math.min(FIRST_SHOWN, all.length - shown)} more
        </button>
      )}
    </>
  );
}

function Filter() {
  return (
    <div class="joined">
      <input
        type="search"
        aria-label="Search the prompts"
        placeholder="Search"
        value={query.value}
        onInput={(event) => (query.value = event.currentTarget.value)}
      />
      <button
        type="button"
        aria-label="Only starred images"
        aria-pressed={onlyStarred.value}
        onClick={() => (onlyStarred.value = !onlyStarred.value)}
      >
        ★
      </button>
    </div>
  );
}

export function Gallery() {
  const inFolder = source.value === 'folder';
  const count = inFolder ? (folder.value?.total ?? 0) : found.value.length;
  const text = `${count} ${count === 1 ? 'image' : 'images'} deleted.`;
  return (
    <section class="gallery" aria-label="Gallery">
      <header>
        <h2>Gallery</h2>
        <span class="note">{count || ''}</span>
        <span class="spring" />
        {count > 0 && (
          <Menu label="⋯" name="More gallery actions">
            <button type="button" onClick={() => void attempt(downloadAll)}>
              Download {count === 1 ? 'the image' : `all ${count}`} as ZIP
            </button>
            {!inFolder && (
              <button type="button" class="danger" onClick={() => void removeItems(found.value, text)}>
                Delete {count === 1 ? 'the image' : `all ${count}`}
              </button>
            )}
          </Menu>
        )}
      </header>
      {health.value?.outputs && (
        <div class="segments" role="group" aria-label="Images of">
          <button type="button" aria-pressed={!inFolder} onClick={() => (source.value = 'browser')}>
            This browser
          </button>
          <button type="button" aria-pressed={inFolder} onClick={() => (source.value = 'folder')}>
            Server folder
          </button>
        </div>
      )}
      {(items.value.length > 0 || inFolder) && <Filter />}
      {comparing.value && (
        <p class="hint" role="status">
          Choose the second image.{' '}
          <button type="button" onClick={() => (comparing.value = null)}>
            Cancel
          </button>
        </p>
      )}
      {inFolder ? <FolderList /> : <BrowserList />}
    </section>
  );
}
