/** What survives a reload, in IndexedDB. Without it (a private window), everything works and nothing is kept. */
import type { GenerationPlan } from 'ez-diffusion-client';
import type { InputImage } from './images';
import type { JsonObject } from './paths';
import { upgradePlan, upgradeSettings } from './upgrade';

export interface GalleryItem {
  id: string;
  created: number;
  blob: Blob;
  width: number;
  height: number;
  seed: number;
  seconds: number | null;
  /** Absent where the image came without */
  plan: GenerationPlan | null;
  /** The form it was made from, with names in place of images */
  form: JsonObject;
}

const STORES = { images: 'id', inputs: 'id', settings: 'key' } as const;
type Store = keyof typeof STORES;
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
  action: (store: IDBObjectStore) => IDBRequest<Result>,
): Promise<Result | undefined> {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(store, mode);
    const request = action(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? new Error('the browser did not store it'));
  });
}

/** An item as an earlier version of this page has stored it, in the schema of today. */
function upgradeItem(item: GalleryItem): GalleryItem {
  return { ...item, plan: item.plan && upgradePlan(item.plan), form: upgradeSettings(item.form) };
}

export async function loadItems(): Promise<GalleryItem[]> {
  const items = ((await act('images', 'readonly', (store) => store.getAll())) ?? []) as GalleryItem[];
  return items.map(upgradeItem).sort((a, b) => b.created - a.created);
}

export async function saveItem(item: GalleryItem): Promise<void> {
  await act('images', 'readwrite', (store) => store.put(item));
}

export async function deleteItem(id: string): Promise<void> {
  await act('images', 'readwrite', (store) => store.delete(id));
}

export async function saveInputImage(image: InputImage): Promise<void> {
  await act('inputs', 'readwrite', (store) => store.put(image));
}

export async function loadInputImages(ids: string[]): Promise<InputImage[]> {
  const found = await Promise.all(
    ids.map((id) => act('inputs', 'readonly', (store) => store.get(id) as IDBRequest<InputImage | undefined>)),
  );
  return found.filter((image) => image !== undefined);
}

/** Delete the input images that nothing refers to. */
export async function keepInputImages(used: ReadonlySet<string>): Promise<void> {
  const keys = (await act('inputs', 'readonly', (store) => store.getAllKeys())) ?? [];
  for (const key of keys) if (!used.has(String(key))) await act('inputs', 'readwrite', (store) => store.delete(key));
}

export async function loadSetting<Value>(key: string): Promise<Value | undefined> {
  const found = (await act('settings', 'readonly', (store) => store.get(key))) as { value: Value } | undefined;
  return found?.value;
}

export async function saveSetting(key: string, value: unknown): Promise<void> {
  await act('settings', 'readwrite', (store) => store.put({ key, value }));
}
