/** Persistent storage in IndexedDB. Without it (private windows), everything works but nothing persists. */
import type { GenerationPlan } from 'ez-diffusion-client';
import type { InputImage } from './images';
import { isObject, type JsonObject } from './paths';
import { tell } from './sync';
import { upgradePlan, upgradeSettings } from './upgrade';

export interface GalleryItem {
  id: string;
  created: number;
  blob: Blob;
  width: number;
  height: number;
  seed: number;
  seconds: number | null;
  /** Null if the image has none */
  plan: GenerationPlan | null;
  /** The form it was generated from, with image references instead of data */
  form: JsonObject;
  /** The same for all images of one generation */
  batch?: string | undefined;
  starred?: boolean | undefined;
  /** When it was deleted; for a while a deletion can be undone */
  deleted?: number | undefined;
}

const STORES = { images: 'id', inputs: 'id', settings: 'key' } as const;
type Store = keyof typeof STORES;
const UNDO_FOR_MS = 3_600_000;
/** Grace period: forms in other tabs may use input images that this tab cannot see. */
const INPUTS_FOR_MS = 7 * 86_400_000;
let opened: Promise<IDBDatabase | null> | undefined;

function open(): Promise<IDBDatabase | null> {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open('diffusion-workers', 2);
      request.onupgradeneeded = () => {
        const { objectStoreNames } = request.result;
        for (const [name, keyPath] of Object.entries(STORES))
          if (!objectStoreNames.contains(name)) request.result.createObjectStore(name, { keyPath });
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

async function act<Result>(
  store: Store,
  mode: IDBTransactionMode,
  action: (store: IDBObjectStore) => IDBRequest<Result> | void,
): Promise<Result | undefined> {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(store, mode);
    const request = action(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = () => reject(transaction.error ?? new Error('the browser did not store it'));
  });
}

/** Migrate an item stored by an earlier version of this page to the current schema. */
function upgradeItem(item: GalleryItem): GalleryItem {
  return { ...item, plan: item.plan && upgradePlan(item.plan), form: upgradeSettings(item.form) };
}

export async function loadItems(): Promise<GalleryItem[]> {
  const items = ((await act('images', 'readonly', (store) => store.getAll())) ?? []) as GalleryItem[];
  return items
    .filter((item) => !item.deleted)
    .map(upgradeItem)
    .sort((a, b) => b.created - a.created);
}

/** Add or change items of the gallery. */
export async function saveItems(items: readonly GalleryItem[]): Promise<void> {
  await act('images', 'readwrite', (store) => {
    for (const item of items) store.put(item);
  });
  tell({ kind: 'gallery' });
}

/** Mark items as deleted; `saveItems` brings them back. */
export function deleteItems(items: readonly GalleryItem[]): Promise<void> {
  const deleted = Date.now();
  return saveItems(items.map((item) => ({ ...item, deleted })));
}

export async function saveInputImage(image: InputImage): Promise<void> {
  await act('inputs', 'readwrite', (store) => store.put({ ...image, used: Date.now() }));
}

export async function loadInputImages(ids: string[]): Promise<InputImage[]> {
  const found = await Promise.all(
    ids.map((id) => act('inputs', 'readonly', (store) => store.get(id) as IDBRequest<InputImage | undefined>)),
  );
  return found.filter((image) => image !== undefined);
}

/** Purge deleted images, and input images that no item or form has used for a week. */
export async function sweep(inUse: (form: JsonObject) => Iterable<string>, form: JsonObject): Promise<void> {
  const now = Date.now();
  const items = ((await act('images', 'readonly', (store) => store.getAll())) ?? []) as GalleryItem[];
  const gone = items.filter((item) => item.deleted && now - item.deleted > UNDO_FOR_MS);
  const used = new Set(items.filter((item) => !gone.includes(item)).flatMap((item) => [...inUse(item.form)]));
  const own = new Set(inUse(form));
  await act('images', 'readwrite', (store) => {
    for (const { id } of gone) store.delete(id);
  });
  await act('inputs', 'readwrite', (store) => {
    const request = store.openCursor();
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return;
      const image = cursor.value as InputImage & { used?: number };
      if (own.has(image.id) || image.used === undefined) cursor.update({ ...image, used: now });
      else if (!used.has(image.id) && now - image.used > INPUTS_FOR_MS) cursor.delete();
      cursor.continue();
    };
  });
}

export async function loadSetting<Value>(key: string): Promise<Value | undefined> {
  const found = (await act('settings', 'readonly', (store) => store.get(key))) as { value: Value } | undefined;
  return found?.value;
}

export async function saveSetting(key: string, value: unknown): Promise<void> {
  await act('settings', 'readwrite', (store) => store.put({ key, value }));
}

export interface StoredForm {
  form: JsonObject;
  seedLocked: boolean;
}

const TAB = 'form';
const LAST = 'lastForm';

function isStored(value: unknown): value is StoredForm & JsonObject {
  return isObject(value) && isObject(value['form']);
}

/** The form of this tab; a new tab starts with the form edited last in any tab. */
export async function loadForm(): Promise<StoredForm | undefined> {
  const earlier = await loadSetting<JsonObject>('form'); // by a version in which all tabs had one form
  if (isObject(earlier)) {
    await act('settings', 'readwrite', (store) => store.delete('form'));
    return { form: upgradeSettings(earlier), seedLocked: (await loadSetting<boolean>('seedLocked')) ?? false };
  }
  const own: unknown = JSON.parse(sessionStorage.getItem(TAB) ?? 'null');
  const found = isStored(own) ? own : await loadSetting<StoredForm>(LAST);
  return isStored(found) ? { form: upgradeSettings(found.form), seedLocked: found.seedLocked } : undefined;
}

export function saveForm(stored: StoredForm): void {
  sessionStorage.setItem(TAB, JSON.stringify(stored));
  void saveSetting(LAST, stored);
}
