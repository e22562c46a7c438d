/** The state of the page: the form, the server, the gallery, and what is on the stage. */
import { computed, effect, signal } from '@preact/signals';
import { connect, type GenerationPlan, type GenerationRequest, type Health, type ModelList } from 'ez-diffusion-client';
import { clearErrors, forgetTouched } from './errors';
import { get, isObject, set, type Json, type JsonObject } from './paths';
import { bringBack, withData } from './images';
import type { Schema } from './schema';
import { loadSetting, saveSetting, type GalleryItem } from './storage';
import { upgradeSettings } from './upgrade';

export type Theme = 'auto' | 'light' | 'dark';
export type View =
  { kind: 'live' } | { kind: 'item'; id: string } | { kind: 'compare'; a: string; b: string } | { kind: 'grid' };

const EMPTY_FORM: JsonObject = { prompt: '', preview_interval: 4 };

export const form = signal<JsonObject>(EMPTY_FORM);
export const seedLocked = signal(false);
export const schema = signal<Schema | null>(null);
export const models = signal<ModelList | null>(null);
export const health = signal<Health | null>(null);
export const connectionError = signal<string | null>(null);
export const token = signal('');
export const theme = signal<Theme>('auto');
export const items = signal<readonly GalleryItem[]>([]);
export const view = signal<View>({ kind: 'live' });
export const status = signal('');
export const dryRun = signal<GenerationPlan | null>(null);

/** Where the server is: it serves this page, perhaps below a path. */
export const serverUrl = new URL('.', location.href).href.replace(/\/$/, '');
export const client = computed(() => connect({ baseUrl: serverUrl, token: token.value || undefined }));

export const model = computed(() => {
  const name = form.value['model'] ?? models.value?.default;
  return models.value?.models.find((found) => found.name === name) ?? null;
});

export function value(path: string): Json | undefined {
  return get(form.value, path);
}

/** What a field holds now; `undefined` takes it out of the request. */
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

/** The request that a form stands for, with the data of its images. */
export function requestOf(source: JsonObject, lockSeed = seedLocked.value): GenerationRequest {
  const { seed, ...rest } = withData(source);
  const request = lockSeed && seed !== undefined ? { ...rest, seed } : rest;
  return request as unknown as GenerationRequest; // the server checks it, and its errors stand at the fields
}

export const request = computed(() => requestOf(form.value));

export function itemAt(id: string): GalleryItem | undefined {
  return items.value.find((item) => item.id === id);
}

export const shownItem = computed(() => (view.value.kind === 'item' ? itemAt(view.value.id) : undefined));

/** The settings of the last visit, and from then on each change of them. */
export async function restoreSettings(): Promise<void> {
  const [storedForm, locked, storedTheme, storedToken] = await Promise.all([
    loadSetting<JsonObject>('form'),
    loadSetting<boolean>('seedLocked'),
    loadSetting<Theme>('theme'),
    loadSetting<string>('token'),
  ]);
  if (isObject(storedForm)) form.value = await bringBack(upgradeSettings(storedForm));
  seedLocked.value = locked ?? false;
  theme.value = storedTheme ?? 'auto';
  token.value = storedToken ?? '';
  const kept = { form, seedLocked, theme, token };
  for (const [key, source] of Object.entries(kept)) effect(() => void saveSetting(key, source.value));
  effect(() => {
    document.documentElement.dataset['theme'] = theme.value;
  });
}
