/** The state of the page: the form, the server, the gallery, and what is on the stage. */
import { computed, effect, signal } from '@preact/signals';
import {
  connect,
  tokenProblem,
  type GenerationPlan,
  type GenerationRequest,
  type Health,
  type ModelList,
} from 'ez-diffusion-client';
import { clearErrors, forgetTouched } from './errors';
import { get, set, type Json, type JsonObject } from './paths';
import { bringBack, idsIn, withData } from './images';
import type { Schema } from './schema';
import { loadForm, loadSetting, saveForm, saveSetting, sweep, type GalleryItem } from './storage';
import { onMessage, tell } from './sync';

export type Theme = 'auto' | 'light' | 'dark';
export type View =
  | { kind: 'live' }
  | { kind: 'item'; id: string }
  | { kind: 'batch'; ids: string[] }
  | { kind: 'compare'; a: string; b: string }
  | { kind: 'grid' };

const EMPTY_FORM: JsonObject = { prompt: '', preview_interval: 4 };
const SWEEP_MS = 3_600_000;

export const form = signal<JsonObject>(EMPTY_FORM);
export const seedLocked = signal(false);
export const schema = signal<Schema | null>(null);
export const models = signal<ModelList | null>(null);
export const health = signal<Health | null>(null);
export const connectionError = signal<string | null>(null);
export const token = signal('');
export const theme = signal<Theme>('auto');
export const items = signal<readonly GalleryItem[]>([]);
/** Images of the server's folder that were opened in this tab. */
export const openedItems = signal<readonly GalleryItem[]>([]);
export const view = signal<View>({ kind: 'live' });
export const status = signal('');
export const dryRun = signal<GenerationPlan | null>(null);

/** The last undoable step; offered only while its message is the current status. */
const lastStep = signal<{ text: string; undo: () => void } | null>(null);
export const undoable = computed(() => (lastStep.value?.text === status.value ? lastStep.value : null));

/** Show a status message with an undo. */
export function announce(text: string, undo: () => void): void {
  lastStep.value = { text, undo };
  status.value = text;
}

export function undoLast(): boolean {
  const step = undoable.value;
  if (!step) return false;
  lastStep.value = null;
  status.value = 'Undone.';
  step.undo();
  return true;
}

/** Base URL of the server, which serves this page, possibly under a path prefix. */
export const serverUrl = new URL('.', location.href).href.replace(/\/$/, '');

/** Called when a request got no answer at all. */
export const onUnreachable = { call: (): void => undefined };

async function fetchAndNotice(input: RequestInfo | URL, init?: RequestInit): Promise<Response> {
  try {
    return await fetch(input, init);
  } catch (error) {
    const aborted = init?.signal?.aborted || (input instanceof Request && input.signal.aborted);
    if (!aborted) onUnreachable.call();
    throw error;
  }
}

export const client = computed(() =>
  connect({ baseUrl: serverUrl, token: tokenProblem(token.value) === undefined ? token.value : undefined, fetch: fetchAndNotice }),
);

export const model = computed(() => {
  const name = form.value['model'] ?? models.value?.default;
  return models.value?.models.find((found) => found.name === name) ?? null;
});

/** How many reference images the chosen model takes. */
export const maxReferences = computed(() => model.value?.max_reference_images ?? 0);

export function value(path: string): Json | undefined {
  return get(form.value, path);
}

/** Whether the chosen model only changes images, and draws none from text alone. */
export const editsOnly = computed(() => {
  const tasks = model.value?.tasks;
  return Boolean(tasks?.includes('edit') && !tasks.includes('text_to_image'));
});

/** Whether the chosen model uses a field; a field that is set is always shown. */
export function applies(name: string): boolean {
  return value(name) !== undefined || !model.value?.unused_fields?.includes(name);
}

/** Set a field; `undefined` removes it from the request. */
export function edit(path: string, changed: Json | undefined): void {
  let next = set(form.value, path, changed);
  if (changed === undefined && path === 'image')
    for (const depending of ['strength', 'mask_image', 'inpaint', 'resize_mode'])
      next = set(next, depending, undefined);
  if (changed === undefined && path === 'mask_image') next = set(next, 'inpaint', undefined);
  if (path === 'seed') seedLocked.value = changed !== undefined;
  form.value = next;
  clearErrors(path);
}

export function replaceForm(next: JsonObject, lockSeed: boolean): void {
  form.value = { ...EMPTY_FORM, ...next };
  seedLocked.value = lockSeed;
  clearErrors();
  forgetTouched();
}

/** Replace the form and announce it with an undo. */
export function replaceFormUndoably(next: JsonObject, lockSeed: boolean, text: string): void {
  const [before, locked] = [form.value, seedLocked.value];
  replaceForm(next, lockSeed);
  announce(text, () => replaceForm(before, locked));
}

/** Build the request from a form, with its image data. */
export function requestOf(source: JsonObject, lockSeed = seedLocked.value): GenerationRequest {
  const { seed, ...rest } = withData(source);
  const request = lockSeed && seed !== undefined ? { ...rest, seed } : rest;
  return request as unknown as GenerationRequest; // the server validates it; errors appear at the fields
}

export const request = computed(() => requestOf(form.value));

export function itemAt(id: string): GalleryItem | undefined {
  return items.value.find((item) => item.id === id) ?? openedItems.value.find((item) => item.id === id);
}

export const shownItem = computed(() => (view.value.kind === 'item' ? itemAt(view.value.id) : undefined));

async function restoreShared(): Promise<void> {
  theme.value = (await loadSetting<Theme>('theme')) ?? 'auto';
  token.value = (await loadSetting<string>('token')) ?? '';
}

/** Restore the settings of the last visit, then save every change. */
export async function restoreSettings(): Promise<void> {
  const [stored] = await Promise.all([loadForm(), restoreShared()]);
  if (stored) {
    form.value = await bringBack(stored.form);
    seedLocked.value = stored.seedLocked;
  }
  effect(() => saveForm({ form: form.value, seedLocked: seedLocked.value }));
  for (const [key, source] of Object.entries({ theme, token })) {
    let kept: string = source.value;
    effect(() => {
      if (source.value === kept) return;
      kept = source.value;
      void saveSetting(key, kept).then(() => tell({ kind: 'setting', key }));
    });
  }
  onMessage((message) => message.kind === 'setting' && void restoreShared());
  effect(() => {
    document.documentElement.dataset['theme'] = theme.value;
  });
  const tidy = () => void sweep(idsIn, form.value);
  tidy();
  setInterval(tidy, SWEEP_MS);
}
