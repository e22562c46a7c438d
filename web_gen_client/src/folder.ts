/** The output folder of a server started with `--outputs`. */
import { signal } from '@preact/signals';
import { changeOutput, getOutput, listOutputs, orThrow, type Output, type OutputChange } from 'ez-diffusion-client';
import { restoredFrom } from './restore';
import { announce, client, itemAt, openedItems, status } from './state';
import type { GalleryItem } from './storage';

export const PAGE_SIZE = 60;

interface Listed {
  outputs: readonly Output[];
  next: string | null;
  total: number;
}

export const folder = signal<Listed | null>(null);
export const folderProblem = signal('');
let asked = { query: '', starred: false };
let latest = 0;

/** Read the first page of what matches, or the next page of it. */
export async function readFolder(wanted = asked, more = false): Promise<void> {
  asked = wanted;
  const turn = ++latest;
  const before = more ? folder.value?.next : undefined;
  const query = { ...wanted, limit: PAGE_SIZE, ...(before ? { before } : {}) };
  try {
    const page = await orThrow(listOutputs({ client: client.value, query }));
    if (turn !== latest) return;
    const kept = more ? (folder.value?.outputs ?? []) : [];
    folder.value = { outputs: [...kept, ...page.outputs], next: page.next ?? null, total: page.total };
    folderProblem.value = '';
  } catch (error) {
    if (turn === latest) folderProblem.value = error instanceof Error ? error.message : String(error);
  }
}

export async function fileOf(id: string, thumbnail = false): Promise<Blob> {
  const options = { client: client.value, path: { output_id: id }, query: { thumbnail }, parseAs: 'blob' as const };
  return (await orThrow(getOutput(options))) as Blob;
}

/** An image of the folder as a gallery item, with the plan from its metadata. */
export async function openOutput(output: Output): Promise<GalleryItem> {
  const known = itemAt(output.id);
  if (known) return known;
  const blob = await fileOf(output.id);
  const found = await restoredFrom(blob).catch(() => null);
  const item: GalleryItem = {
    id: output.id,
    created: Date.parse(output.created),
    blob,
    width: output.width,
    height: output.height,
    seed: output.seed,
    seconds: null,
    plan: found?.plan ?? null,
    form: found?.request ?? { prompt: output.prompt, seed: output.seed, model: output.model },
    starred: output.starred,
  };
  openedItems.value = [item, ...openedItems.value].slice(0, 50);
  return item;
}

export async function changeInFolder(id: string, change: OutputChange): Promise<void> {
  const changed = await orThrow(changeOutput({ client: client.value, path: { output_id: id }, body: change }));
  openedItems.value = openedItems.value.map((item) => (item.id === id ? { ...item, starred: changed.starred } : item));
  await readFolder();
}

export async function deleteFromFolder(id: string): Promise<void> {
  try {
    await changeInFolder(id, { deleted: true });
    announce('Deleted in the folder of the server.', () => void changeInFolder(id, { deleted: false }));
  } catch (error) {
    status.value = error instanceof Error ? error.message : String(error);
  }
}
