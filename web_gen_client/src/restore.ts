/** Restore the form from the metadata of an image, which the server parses. */
import { orThrow, restore, type GenerationPlan, type LostSetting, type RestoredRequest } from 'ez-diffusion-client';
import { asDataUri, bringBack, imageAt } from './images';
import { get, set, type JsonObject } from './paths';
import { announce, client, form, items, replaceForm, seedLocked } from './state';
import type { GalleryItem } from './storage';

async function read(file: Blob): Promise<{ found: RestoredRequest; warnings: string[] }> {
  const result = await orThrow(restore({ client: client.value, body: { image: await asDataUri(file) } }));
  if (!result.restored) throw new Error('the server restored no request');
  return { found: result.restored, warnings: (result.warnings ?? []).map(({ message }) => message) };
}

/** The restored request, with the input images that `source` still has filled in, and their paths. */
function withInputs(found: RestoredRequest, source: JsonObject | undefined): { next: JsonObject; given: Set<string> } {
  const given = new Set<string>();
  let next = found.request as JsonObject;
  for (const path of found.missing_images ?? []) {
    const known = source && get(source, path);
    if (!imageAt(known)) continue;
    next = set(next, path, known);
    given.add(path);
  }
  const references = (found.missing_images ?? []).filter((path) => path.startsWith('reference_images['));
  if (references.some((path) => !given.has(path))) {
    next = set(next, 'reference_images', undefined); // a partial list would shift their positions
    for (const path of references) given.delete(path);
  } else next = set(next, 'expected_references', undefined); // the list is complete
  return { next, given };
}

function previewInterval(): JsonObject {
  return { preview_interval: form.value['preview_interval'] ?? 0 };
}

/** The plan in the metadata of a file, and the request that reproduces it. */
export async function restoredFrom(file: Blob): Promise<{ plan: GenerationPlan | null; request: JsonObject }> {
  const { found } = await read(file);
  return { plan: found.plan ?? null, request: found.request as JsonObject };
}

/** The form that reproduces a gallery item: every setting in its plan, and its own seed. */
export async function formOf(item: GalleryItem): Promise<JsonObject> {
  await bringBack(item.form);
  const found = await read(item.blob)
    .then((result) => result.found)
    .catch(() => null);
  const own = { ...item.form, seed: item.seed }; // without a server or without metadata
  const base = found && found.source === 'plan' ? withInputs(found, item.form).next : own;
  return { ...base, num_images: 1, ...previewInterval() };
}

function sameGeneration(plan: GenerationPlan): GalleryItem | undefined {
  const key = (other: GenerationPlan) => JSON.stringify({ ...other, image_index: null, environment: null });
  return items.value.find((item) => item.plan && key(item.plan) === key(plan));
}

function sentence({ name, given, reason }: LostSetting): string {
  return `${name}${given ? ` ${given}` : ''} (${reason})`;
}

function sentences(lost: LostSetting[]): string {
  return lost.map(sentence).join('; ');
}

/** Replace the form with the settings of a dropped file (undoable); false if it has no metadata. */
export async function restoreFile(file: Blob): Promise<boolean> {
  const { found, warnings } = await read(file);
  const [problem] = found.lost ?? [];
  if (found.source === 'none' && problem) throw new Error(sentence(problem));
  if (found.source === 'none') return false;
  if (Object.keys(found.request).length === 0) throw new Error(`No settings restored: ${sentences(found.lost ?? [])}.`);
  const source = found.plan ? sameGeneration(found.plan)?.form : undefined;
  if (source) await bringBack(source);
  const { next, given } = withInputs(found, source);
  const [before, locked] = [form.value, seedLocked.value];
  replaceForm({ ...next, ...previewInterval() }, 'seed' in next);
  const lost = (found.lost ?? []).filter(({ name }) => !given.has(name));
  const restored = lost.length ? `Settings restored, except: ${sentences(lost)}.` : 'Settings restored.';
  const text = [restored, ...warnings.map((warning) => `Note: ${warning}.`)].join(' ');
  announce(text, () => replaceForm(before, locked));
  return true;
}
